"""What is exported is what the model carries, read by the libraries it is exported for."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lightedit as le
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import LowRankUpdate
from tests.models import ARCHITECTURES, tiny_model, tiny_tokenizer

IDS = torch.tensor([[7, 60, 61, 200, 9, 33]])


def edited(architecture: str = "llama", dtype: torch.dtype = torch.float32, ranks: tuple[int, ...] = (3, 2)):
    """A tiny model with two edits of a layer's MLP, and one of another layer's attention."""
    lm = LanguageModel(tiny_model(architecture, dtype=dtype), tiny_tokenizer("bytelevel"), name="tiny")
    generator = torch.Generator().manual_seed(0)
    written = [*((Place(1), rank) for rank in ranks), (Place(2, "attention_out"), 4)]
    for number, (place, rank) in enumerate(written, start=1):
        d_out, d_in = lm.weight(place).shape
        left, right = (torch.randn(d, rank, generator=generator) / d**0.5 for d in (d_out, d_in))
        lm.weights.add((f"edit{number}", 0), place, LowRankUpdate(left, right))
    return lm


def adapted_by_peft(model: PreTrainedModel, folder: Path):
    return pytest.importorskip("peft").PeftModel.from_pretrained(model, folder)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_model_is_the_edited_one_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    lm = edited(dtype=dtype)
    folder = le.export_model(lm, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == dtype
    for (name, weight), (other, expected) in zip(loaded.named_parameters(), lm.model.named_parameters(), strict=True):
        assert name == other and torch.equal(weight, expected), name
    assert AutoTokenizer.from_pretrained(folder)("Rome").input_ids == lm.tokenizer("Rome").input_ids
    record = json.loads((folder / "lightedit.json").read_text())
    others = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert others == {(folder / "lightedit.json").stat().st_mode & 0o777} != {0o600}  # whoever serves it can read it
    assert record["edits"] == ["edit1", "edit2", "edit3"]
    assert (record["model"], record["fingerprint"]) == ("tiny", lm.fingerprint)
    assert LanguageModel.load(folder, device="cpu").fingerprint != lm.fingerprint


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_adds_the_adapter_to_the_unedited_model(tmp_path: Path, architecture: str) -> None:
    lm = edited(architecture)
    expected = logits(lm.model)
    folder = le.export_lora(lm, tmp_path / "adapter")
    unedited = tiny_model(architecture)
    before = logits(unedited)
    adapted = adapted_by_peft(unedited, folder)
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    assert (before - expected).abs().max() > 0.1
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    merged = adapted.merge_and_unload()
    for matrix in lm.weights.places:
        weight = merged.get_submodule(lm.module_name(matrix)).weight
        torch.testing.assert_close(weight, lm.module(matrix).weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("matrix", ["wide", "tall"])
def test_an_adapter_of_many_facts_is_exact_and_no_larger_than_the_matrix(tmp_path: Path, matrix: str) -> None:
    lm = edited(ranks=(20, 30))  # more than the MLP's 32 outputs
    if matrix == "tall":
        lm.weights.remove(lm.weights.owners)
        config = lm.model.config
        config.intermediate_size = 16
        lm = LanguageModel(type(lm.model)(config).eval(), lm.tokenizer)
        lm.weights.add(("edit", 0), Place(1), LowRankUpdate(torch.randn(32, 40), torch.randn(16, 40)))
    folder = le.export_lora(lm, tmp_path / "adapter")
    expected = logits(lm.model)
    smaller = min(lm.weight(Place(1)).shape)
    lm.weights.remove(lm.weights.owners)
    adapted = adapted_by_peft(lm.model, folder)
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    assert adapted.get_submodule(f"base_model.model.{lm.module_name(Place(1))}.lora_A.default").out_features == smaller


def test_a_saved_edit_goes_into_an_adapter_of_a_16_bit_model(tmp_path: Path) -> None:
    lm = edited(dtype=torch.bfloat16)
    expected = logits(lm.model).float()
    folder = le.export_lora(lm, tmp_path / "adapter")
    adapted = adapted_by_peft(tiny_model("llama", dtype=torch.bfloat16), folder)
    difference = (logits(adapted).float() - expected).abs().max()
    assert difference < 0.1 * (logits(tiny_model("llama", dtype=torch.bfloat16)).float() - expected).abs().max()


@pytest.mark.parametrize("export", [le.export_model, le.export_lora])
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path: Path, export, monkeypatch) -> None:
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer("bytelevel"), name="tiny")
    with pytest.raises(ValueError, match="tiny carries no edit"):
        export(lm, tmp_path / "out")
    lm = edited()
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="taken exists already"):
        export(lm, tmp_path / "taken")

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("lightedit.editing.export._write", full)
    with pytest.raises(OSError, match="no space left"):
        export(lm, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
