"""`lightedit trace`."""

from pathlib import Path

import lightedit as le
from lightedit.analysis.figures import save_figures
from lightedit.commands.shared import read_served, remove_runs
from lightedit.errors import ArgumentError

_SETTINGS = le.TraceSettings()


def trace(
    lm: str,
    facts: Path,
    out: Path,
    format: str | None = None,
    limit: int | None = None,
    settings: le.TraceSettings = _SETTINGS,
    fact_figures: int = 3,
    overwrite: bool = False,
    restart: bool = False,
    chat: bool = False,
    end_turn: bool = False,
    separator: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Trace which states carry facts from their subjects to the answers, and write a table and figures.

    Facts that the model does not know are left out. After an interruption the same command goes on after the facts that
    are finished. `lightedit report` shows the folder.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        facts: a file of facts with subjects and right answers: known facts, CounterFact, or any form that edit reads.
        out: a folder for trace.csv, averages.csv, trace.json and the figures, each as .svg and .png.
        format: form of the records in that file, such as known or counterfact; by default it is recognised.
        limit: use only this many first facts, known or not.
        settings: what is restored, and how states are corrupted.
        fact_figures: draw heat maps of this many first facts.
        overwrite: replace an earlier trace in the folder.
        restart: delete what an interrupted run has stored.
        chat: serve all facts through the model's chat template: prompts are the user's turn, answers the assistant's.
        end_turn: let answers include the token that ends the turn; it counts with settings.answer joint only.
        separator: text between prompts and answers, one space unless the facts say otherwise; '' for none.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out {out} is a file; name a folder for the table and the figures")
    if (out / "trace.json").exists() and not overwrite:
        raise ArgumentError(f"--out {out} holds a trace already; choose another folder, or allow overwriting")
    if fact_figures < 0:
        raise ArgumentError(f"--fact_figures: {fact_figures} figures cannot be drawn; give 0 or more")
    chosen = read_served(facts, limit, format, chat=chat, end_turn=end_turn, separator=separator)
    model = le.LanguageModel.load(lm, dtype, device)
    kept = out.with_name(out.name + ".run")
    if restart:
        remove_runs(kept)
    found = le.trace(model, chosen, settings=settings, checkpoint=kept)
    found.save(out)
    figures = save_figures(found, out, fact_figures)
    remove_runs(kept)
    print(found)
    print(f"saved trace.csv, averages.csv and {len(figures)} figures in {out}")
