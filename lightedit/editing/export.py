"""Export of edits: the edited model as a folder of its own, or the edits only, as a LoRA adapter."""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from lightedit.errors import ArgumentError
from lightedit.files import whole_folder
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import Change, DenseUpdate, LowRankUpdate
from lightedit.lm.kinds import KindName
from lightedit.lm.loading import save_pretrained
from lightedit.lm.storage import check_storage

# PEFT's names of kinds of models
_TASKS: dict[KindName, str] = {
    "causal": "CAUSAL_LM",
    "classifier": "SEQ_CLS",
    "encoder-decoder": "SEQ_2_SEQ_LM",
}


def export_model(lm: LanguageModel, folder: str | Path) -> Path:
    """Write the edited model and its tokenizer into a new folder, atomically.

    transformers loads the folder like any other, with the present weights bit for bit. `lightedit.json` in it names
    the edits and the model in which they were made. They cannot be reverted in the exported model, so keep the edits.

    Args:
        lm: the model, with its edits applied.
        folder: path of the new folder.

    Raises:
        ArgumentError: the folder exists, or the model carries no edit.
        UnsupportedModelError: a PEFT adapter was added to the model after it was edited.
    """
    folder = Path(folder)
    record = _record(lm, folder)
    with whole_folder(folder) as unfinished:
        save_pretrained(lm.model, lm.tokenizer, unfinished)
        _write(unfinished / "lightedit.json", record)
    return folder


def export_lora(lm: LanguageModel, folder: str | Path) -> Path:
    """Write the changes of all edits as a LoRA adapter into a new folder, atomically.

    `peft.PeftModel.from_pretrained(model, folder)` adds the adapter to the unedited model, and `merge_and_unload`
    writes it into the weights. Servers that take PEFT adapters can switch it on or off for each request. Its rank is
    the number of facts, or the matrix's smaller dimension if that is less, so nothing is approximated. The adapter is
    float32. In a 16-bit model its output therefore lacks the rounding of the edited weights.

    Args:
        lm: the model, with its edits applied.
        folder: path of the new folder.

    Raises:
        ArgumentError: the folder exists, the model carries no edit, or an edit changes more than matrices.
        UnsupportedModelError: a PEFT adapter was added to the model after it was edited.
    """
    folder = Path(folder)
    record = _record(lm, folder)
    changes = {place: _factors(place, lm.weights.change(place)) for place in lm.weights.places}
    tensors = {
        f"base_model.model.{lm.module_name(matrix)}.lora_{factor}.weight": tensor.float().contiguous()
        for matrix, change in changes.items()
        for factor, tensor in (("A", change.right.T), ("B", change.left))
    }
    ranks = {lm.module_name(matrix): change.rank for matrix, change in changes.items()}
    largest = max(ranks.values())
    smaller = {name: rank for name, rank in ranks.items() if rank < largest}
    config = {
        "peft_type": "LORA",
        "task_type": _TASKS[lm.kind],
        "base_model_name_or_path": lm.model.name_or_path or lm.name,
        "target_modules": list(ranks),
        # PEFT scales the product by alpha / rank, which is 1 here
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "fan_in_fan_out": isinstance(lm.module(next(iter(changes))), Conv1D),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    with whole_folder(folder) as unfinished:
        save_file(tensors, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        _write(unfinished / "adapter_config.json", config)
        _write(unfinished / "lightedit.json", record)
    return folder


def check_export(folder: Path) -> None:
    """Raise ArgumentError if `folder` exists, so that nothing can be exported to it."""
    if folder.exists():
        raise ArgumentError(f"{folder} exists already; name a new folder for the export")


def _record(lm: LanguageModel, folder: Path) -> dict[str, object]:
    check_export(folder)
    check_storage(lm.model)
    if not lm.weights.edits:
        raise ArgumentError(f"{lm.name} carries no edit, so there is nothing to export; apply one first")
    for place in lm.weights.places:
        if adaptors := lm.weights.adaptors(place):
            raise ArgumentError(
                f"the edit runs a module of its own at {place} ({adaptors[0].kind}), which no file of weights can "
                "hold; ship the edit's folder, and apply it to the model with lightedit"
            )
    return {
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "edits": lm.weights.edits,
        "versions": {name: version(name) for name in ("lightedit", "torch", "transformers")},
    }


def _factors(place: Place, change: Change) -> LowRankUpdate:
    """The same change as factors, with at most min(d_out, d_in) columns.

    Raises:
        ArgumentError: the change is not that of a matrix only.
    """
    if isinstance(change, LowRankUpdate):
        d_out, d_in = change.left.shape[0], change.right.shape[0]
        if change.rank <= min(d_out, d_in):
            return change
        dense = change.to("cpu", torch.float64).dense()
    elif isinstance(change, DenseUpdate) and change.weight is not None and change.bias is None:
        dense = change.weight.to("cpu", torch.float64)
        d_out, d_in = dense.shape
    else:
        raise ArgumentError(
            f"the edit changes more than the matrix of {place}, which a LoRA adapter cannot hold; export the model"
        )
    eye = torch.eye(min(d_out, d_in), dtype=dense.dtype)
    return LowRankUpdate(eye, dense.T) if d_out <= d_in else LowRankUpdate(dense, eye)


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
