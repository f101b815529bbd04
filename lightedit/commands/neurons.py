"""`lightedit neurons`."""

from pathlib import Path

import lightedit as le
from lightedit.analysis.found_neurons import NEURONS_FILE
from lightedit.analysis.neuron_figures import save_neuron_figures
from lightedit.commands.shared import read_served, remove_runs
from lightedit.errors import ArgumentError

_SETTINGS = le.NeuronSettings()


def neurons(
    lm: str,
    facts: Path,
    out: Path,
    format: str | None = None,
    limit: int | None = None,
    settings: le.NeuronSettings = _SETTINGS,
    overwrite: bool = False,
    restart: bool = False,
    chat: bool = False,
    end_turn: bool = False,
    separator: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Find the knowledge neurons of facts, print them, and write a table and figures.

    Facts that the model does not know are left out. After an interruption the same command goes on after the facts that
    are finished.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        facts: a file of facts with right answers, in any form that edit reads.
        out: a folder for neurons.csv, neurons.json and the figures, each as .svg and .png.
        format: form of the records in that file, such as known or counterfact; by default it is recognised.
        limit: use only this many first facts, known or not.
        settings: how neurons are found.
        overwrite: replace an earlier result in the folder.
        restart: delete what an interrupted run has stored.
        chat: serve all facts through the model's chat template: prompts are the user's turn, answers the assistant's.
        end_turn: let answers include the token that ends the turn.
        separator: text between prompts and answers, one space unless the facts say otherwise; '' for none.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out {out} is a file; name a folder for the table and the figures")
    if (out / NEURONS_FILE).exists() and not overwrite:
        raise ArgumentError(f"--out {out} holds {NEURONS_FILE} already; choose another folder, or allow overwriting")
    chosen = read_served(facts, limit, format, chat=chat, end_turn=end_turn, separator=separator)
    model = le.LanguageModel.load(lm, dtype, device)
    kept = out.with_name(out.name + ".run")
    if restart:
        remove_runs(kept)
    found = le.neurons(model, chosen, settings=settings, checkpoint=kept)
    found.save(out)
    figures = save_neuron_figures(found, out)
    remove_runs(kept)
    print(found)
    print(f"saved neurons.csv and {len(figures)} figures in {out}")
