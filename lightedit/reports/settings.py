"""Settings and provenance of runs, side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightedit.reports.html import Html, element, scrolling_table
from lightedit.reports.reading import ReportedRun

_SHORT = 60  # most characters of a list that is shown in full; a longer one is folded


def settings_section(runs: Sequence[ReportedRun]) -> Html | None:
    """A table with one row a setting and one column a run; None if no run has settings."""
    known = [dict(_settings(run)) for run in runs]
    names = list(dict.fromkeys(name for settings in known for name in settings))
    if not names:
        return None
    heads = [
        element("th", "setting", scope="col"),
        *(element("th", element("bdi", run.name), scope="col") for run in runs),
    ]
    rows = [element("tr", *heads)]
    for name in names:
        values = [settings.get(name) for settings in known]
        differs = any(value != values[0] for value in values)
        # marked by a sign, too, because colour alone is not accessible
        title = element("th", name, element("span", " ≠", title="differs") if differs else None, scope="row")
        rows.append(element("tr", title, *(element("td", _shown(value)) for value in values), class_=_row(differs)))
    legend = element("p", "Rows marked ≠ differ between the runs.") if len(runs) > 1 else None
    table = scrolling_table("Settings and provenance", *rows)
    return element("section", element("h2", "Settings and provenance"), legend, table, id="settings")


def _row(differs: bool) -> str | None:
    return "differs" if differs else None


def _settings(run: ReportedRun) -> Iterator[tuple[str, Any]]:
    """Names and values of a run's settings; the names of nested settings contain dots."""
    edit = run.edit
    if edit is None:
        return
    rounds = edit.facts_in_round
    yield from {
        "edit": edit.id,
        "model": edit.model,
        "model's fingerprint": edit.fingerprint,
        "facts written": len(edit.facts),
        "rounds": len(rounds),
        "facts in each round": rounds[0] if len(set(rounds)) == 1 else rounds,
    }.items()
    record = edit.record.to_dict()
    yield from _flat({**record.pop("inputs"), **record}, "")


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, list):
        return element("bdi", str(value))
    text = ", ".join(_plain(part) for part in value)
    if len(text) <= _SHORT:
        return element("bdi", text)
    items = [element("li", element("bdi", _plain(part))) for part in value]
    return element("details", element("summary", f"{len(value)} entries"), element("ol", *items))


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
