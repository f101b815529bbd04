"""`lightedit hidden-states`."""

from pathlib import Path

import lightedit as le
from lightedit.analysis.hidden_figures import save_hidden_states_figure
from lightedit.analysis.similarities import STATES_FILE
from lightedit.analysis.update_norms import NORMS_TABLE, edits_by_name
from lightedit.commands.shared import remove_runs
from lightedit.data.fact import served_as
from lightedit.errors import ArgumentError

_SETTINGS = le.HiddenStateSettings()


def hidden_states(
    out: Path,
    lm: str | None = None,
    facts: Path | None = None,
    format: str | None = None,
    limit: int | None = None,
    settings: le.HiddenStateSettings = _SETTINGS,
    edits: list[Path] | None = None,
    overwrite: bool = False,
    restart: bool = False,
    chat: bool = False,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Compare what enters attention and MLP with what leaves them, layer by layer, and write a table and a figure.

    With --edits, the norms of ΔW by layer of these saved edits are written too, or alone where --lm and --facts are not
    given. After an interruption the same command goes on after the prompts that are finished. `lightedit report` shows
    the folder.

    Args:
        out: a folder for hidden_states.csv, hidden_states.json and the figure, as .svg and .png.
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        facts: a file of facts, of whose prompts the last token is read; any form that edit reads.
        format: form of the records in that file; by default it is recognised.
        limit: use only this many first facts.
        settings: what is compared, and how.
        edits: folders of saved edits, such as an edit and its ablations, for update_norms.csv and its figure.
        overwrite: replace an earlier result in the folder.
        restart: delete what an interrupted run has stored.
        chat: serve all prompts through the model's chat template, as the user's turn.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    _check(out, lm, facts, edits, overwrite)
    saved = {} if edits is None else edits_by_name(edits)
    norms = None if edits is None else le.update_norms(saved)
    if lm is not None and facts is not None:
        chosen = served_as(le.read_facts(facts, limit, format), chat=chat)
        model = le.LanguageModel.load(lm, dtype, device)
        for edit in saved.values():
            edit.check_model(model)
        kept = out.with_name(out.name + ".run")
        if restart:
            remove_runs(kept)
        found = le.hidden_states(model, chosen, settings=settings, checkpoint=kept)
        found.save(out)
        figures = save_hidden_states_figure(found, out)
        remove_runs(kept)
        print(found)
        print(f"saved hidden_states.csv and {', '.join(file.name for file in figures)} in {out}")
    if norms is not None:
        norms.save(out)
        print(norms)
        print(f"saved update_norms.csv, update_norms.svg, update_norms.png in {out}")


def _check(out: Path, lm: str | None, facts: Path | None, edits: list[Path] | None, overwrite: bool) -> None:
    """Raise ArgumentError if the arguments do not go together, or an earlier result would be replaced."""
    if (lm is None) != (facts is None):
        raise ArgumentError("--lm and --facts go together: hidden states are those of a model at the facts' prompts")
    if lm is None and edits is None:
        raise ArgumentError("there is nothing to do; give --lm and --facts, or --edits for norms of ΔW")
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out {out} is a file; name a folder for the table and the figure")
    written = [STATES_FILE] if lm is not None else []
    written += [NORMS_TABLE] if edits is not None else []
    for name in written:
        if (out / name).exists() and not overwrite:
            raise ArgumentError(f"--out {out} holds {name} already; choose another folder, or allow overwriting")
