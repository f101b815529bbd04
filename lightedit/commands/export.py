"""`lightedit export`."""

from pathlib import Path
from typing import Literal

import lightedit as le
from lightedit.editing.export import check_export
from lightedit.errors import ArgumentError


def export(
    lm: str,
    edits: Path | list[Path],
    out: Path,
    form: Literal["model", "lora"] = "model",
    dtype: str = "auto",
    device: str = "cpu",
) -> None:
    """Export edits as an edited model in transformers' format, or as a LoRA adapter for the unedited model.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        edits: folder of a saved edit, or a list of several in brackets, which are applied in that order.
        out: a new folder.
        form: model writes the whole model with its tokenizer, lora only the change, in PEFT's format.
        dtype: float32, bfloat16, float16, or auto for the dtype in which the model is stored.
        device: such as cpu or cuda.
    """
    check_export(out)
    saved = [le.Edit.load(folder) for folder in ([edits] if isinstance(edits, Path) else edits)]
    if not saved:
        raise ArgumentError("--edits names none, so there is nothing to export; give the folder of an edit")
    model = le.LanguageModel.load(lm, dtype, device)
    for one in saved:
        one.check_model(model)
    for one in saved:
        one.apply(model)
    written = le.export_model(model, out) if form == "model" else le.export_lora(model, out)
    print(f"saved the {'edited model' if form == 'model' else 'LoRA adapter'} in {written}")
