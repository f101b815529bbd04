"""The page of a report: all sections in one HTML file, without scripts, fonts or other external files."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lightedit.data.words import counted
from lightedit.errors import ArgumentError, MissingFileError
from lightedit.files import whole_file
from lightedit.reports.curves import curves_section
from lightedit.reports.facts import facts_section
from lightedit.reports.hidden import hidden_states_section
from lightedit.reports.html import Html, element, group
from lightedit.reports.outcomes import outcomes_section
from lightedit.reports.reading import ReportedRun, read_runs
from lightedit.reports.scores import scores_section
from lightedit.reports.settings import settings_section
from lightedit.reports.traces import traces_section

_MADE = element("meta", name="generator", content="lightedit report")
_SECTIONS = (
    ("Outcomes", "outcomes"),
    ("Scores", "scores"),
    ("Over the rounds", "rounds"),
    ("Facts", "facts"),
    ("Causal tracing", "traces"),
    ("Hidden states", "hidden-states"),
    ("Settings and provenance", "settings"),
)
# Forbids the page to load anything, in case escaping failed somewhere
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def report(
    runs: str | Path | Sequence[str | Path], out: str | Path = "report.html", *, overwrite: bool = False
) -> Path:
    """Write one HTML file about one run, or about several side by side.

        report(["edits/memit", "edits/encore"], "report.html")

    The file holds the outcome of every fact, with the model's words before and after; the scores before and after the
    edit, with their intervals; curves of retention, norms and drift for runs with rounds; the best, median and worst
    facts with the model's answers to their prompts; causal traces and studies of hidden states; settings and
    provenance. It is self-contained.

    Args:
        runs: one folder or file, or several; see `read_runs`.
        out: the file, written atomically; an earlier report is replaced.
        overwrite: also replace a file that is not a report.

    Returns:
        `out`.

    Raises:
        MissingFileError: a run's path or the folder of `out` does not exist.
        ArgumentError: a path holds no run, or a damaged one, or `out` exists and is not a report.
    """
    out = Path(out)
    _check_free(out, overwrite)
    content = page(read_runs([runs] if isinstance(runs, str | Path) else runs))
    with whole_file(out) as unfinished:
        # a JSON file may hold a lone surrogate, which UTF-8 cannot encode
        unfinished.write_bytes(content.encode("utf-8", "replace"))
    return out


def page(runs: Sequence[ReportedRun]) -> Html:
    """The whole page as HTML."""
    title = f"Edit report: {', '.join(run.name for run in runs)}"
    style = files("lightedit.reports").joinpath("style.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        _MADE,
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Html(style)),
    )
    parts = (
        *(outcomes_section, scores_section, curves_section, facts_section),
        *(traces_section, hidden_states_section, settings_section),
    )
    sections = [section(runs) for section in parts]
    links = [
        element("a", name, href=f"#{target}")
        for (name, target), section in zip(_SECTIONS, sections, strict=True)
        if section is not None
    ]
    body = element(
        "body", element("main", element("h1", "Edit report"), *map(_summary, runs), element("nav", *links), *sections)
    )
    return Html(f"<!doctype html>\n{element('html', head, body, lang='en')}\n")


def _summary(run: ReportedRun) -> Html:
    """A sentence about a run, and a warning if a limit ended it."""
    edit = run.edit
    if edit is None:
        scores = run.after or run.before
        study = run.trace or run.hidden_states
        if scores is None and study is not None:
            return element("p", element("b", element("bdi", run.name)), f": {study}.", class_="lead")
        what = f"scores of {counted(len(scores.records))}" if scores is not None else "figures of a log"
    else:
        name = edit.record.method.get("name")
        rounds = "one round" if len(edit.rounds) == 1 else f"{len(edit.rounds)} rounds"
        layers = ", ".join(map(str, edit.layers))
        what = f"{name} wrote {counted(len(edit.facts))} into {edit.model} in {rounds}, layers {layers}"
    stopped = edit.record.stopped if edit is not None else None
    return group(
        element("p", element("b", element("bdi", run.name)), ": ", what, ".", class_="lead"),
        element("p", element("b", "Ended early: "), str(stopped), class_="warning") if stopped else None,
    )


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.absolute().parent.is_dir():
        raise MissingFileError(f"{out}: the folder {out.absolute().parent} does not exist; make it first")
    if out.is_dir():
        raise ArgumentError(f"{out} is a folder; name a file in it, such as {out / 'report.html'}")
    if out.exists() and not overwrite:
        with out.open("rb") as file:
            start = file.read(1000)
        if _MADE.encode() not in start:
            raise ArgumentError(f"{out} exists and is no report; choose another file, or allow overwriting")
