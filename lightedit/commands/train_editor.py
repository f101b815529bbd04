"""`lightedit train-editor`."""

from pathlib import Path

import lightedit as le
from lightedit.commands.shared import read_served, remove_runs
from lightedit.methods.hypernetworks.saving import SavedNetwork
from lightedit.methods.hypernetworks.training import check_out, said, trainable

_SETTINGS = le.EditorTrainingSettings()


def train_editor(
    lm: str,
    facts: Path,
    out: Path,
    method: le.Method,
    format: str | None = None,
    limit: int | None = None,
    settings: le.EditorTrainingSettings = _SETTINGS,
    overwrite: bool = False,
    restart: bool = False,
    chat: bool = False,
    end_turn: bool = False,
    separator: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Train the hyper-network of MEND or KE for a model, and save it for edit --method.

    The last facts are held out for validation, and the network that does best on them is saved. After an interruption
    the same command goes on after the last validation.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        facts: a file of facts with paraphrases and neighbourhood prompts, in any form that edit reads.
        out: a new folder for the network; edit takes it as method.folder.
        method: MEND or KE, with its settings as method.layers, method.lr and so on.
        format: form of the records in that file, such as counterfact or zsre; by default it is recognised.
        limit: use only this many first facts.
        settings: steps, batch size, validation and limits of the training.
        overwrite: replace an earlier network in the folder.
        restart: delete what an interrupted training has stored.
        chat: serve all facts through the model's chat template: prompts are the user's turn, answers the assistant's.
        end_turn: let answers include the token that ends the turn.
        separator: text between prompts and answers, one space unless the facts say otherwise; '' for none.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    check_out(out, overwrite)
    new = trainable(method)
    chosen = read_served(facts, limit, format, chat=chat, end_turn=end_turn, separator=separator)
    model = le.LanguageModel.load(lm, dtype, device)
    if restart:
        remove_runs(out.with_name(out.name + ".run"))
    le.train_editor(model, chosen, new, out, settings=settings, overwrite=overwrite)
    training = SavedNetwork.read(out).training
    print(f"before training, {said(training['before'])}")
    print(f"saved, {said(training['figures'])}")
    print(f"trained for {training['steps']} steps" + (f"; {reason}" if (reason := training["stopped"]) else ""))
    print(f"saved the network in {out}; edit with --method {type(new).__name__} --method.folder {out}")
