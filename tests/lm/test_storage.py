"""Weights that cannot be read and written in place are refused in words, before work starts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import lightedit as le
from lightedit.errors import ArgumentError, UnsupportedModelError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import LowRankUpdate
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS, MEMIT, covariance_of, run, scored

DEVICES = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
DEVICES |= {f"model.layers.{layer}": "cpu" for layer in range(4)}


def loaded(model: nn.Module) -> LanguageModel:
    return LanguageModel(model, tiny_tokenizer("bytelevel"), name="tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny float32 model."""
    path = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer("bytelevel").save_pretrained(path)
    return path


# Adapters


def adapted(model: PreTrainedModel, **changes):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["down_proj"], "init_lora_weights": False} | changes)
    return peft.get_peft_model(model, config)


def test_a_model_with_an_adapter_is_refused_with_the_way_to_merge_it() -> None:
    with pytest.raises(UnsupportedModelError, match=r"the model is a PeftModel of PEFT; merge .*merge_and_unload\(\)"):
        loaded(adapted(tiny_model("llama")))


def test_a_model_whose_layers_an_adapter_replaced_is_refused() -> None:
    model = tiny_model("llama")
    adapted(model)  # in place
    with pytest.raises(
        UnsupportedModelError, match=r"model\.layers\.0\.mlp\.down_proj is a Linear of PEFT, .*merge_and"
    ):
        loaded(model)


def test_a_merged_adapter_is_part_of_the_weights_and_can_be_edited() -> None:
    model = adapted(tiny_model("llama"))
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7]])).logits
    lm = loaded(model.merge_and_unload())
    assert torch.allclose(lm.model(torch.tensor([[5, 6, 7]])).logits, expected, atol=1e-5)
    assert run(lm, FACTS[:1], covariance=covariance_of(lm)).facts == FACTS[:1]


def test_a_folder_with_an_adapter_is_refused(tmp_path: Path, folder: Path) -> None:
    adapted(AutoModelForCausalLM.from_pretrained(folder)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedModelError, match=r"adapter holds a PEFT adapter; .* merge_and_unload\(\)"):
        LanguageModel.load(tmp_path / "adapter")


@pytest.mark.parametrize("export", [le.export_model, le.export_lora])
def test_an_adapter_that_came_after_the_edit_is_no_part_of_an_export(tmp_path: Path, export) -> None:
    lm = loaded(tiny_model("llama"))
    d_out, d_in = lm.weight(Place(1)).shape
    lm.weights.add(("edit", 0), Place(1), LowRankUpdate(torch.ones(d_out, 1), torch.ones(d_in, 1)))
    adapted(lm.model)
    with pytest.raises(UnsupportedModelError, match="is a Linear of PEFT"):
        export(lm, tmp_path / "export")
    with pytest.raises(UnsupportedModelError, match="is a Linear of PEFT"):
        lm.weight(Place(2))
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("module", ["down_proj", "q_proj"])
def test_an_adapter_that_came_after_loading_is_refused_by_all_that_reads_or_writes_the_model(module: str) -> None:
    lm = loaded(tiny_model("llama"))
    covariance, method = covariance_of(lm), MEMIT
    edit = run(lm, FACTS[:1], covariance=covariance)
    edit.revert(lm)
    adapted(lm.model, target_modules=[module])
    facts = [replace(FACTS[0], neighborhood_prompts=("The old tower",))]
    calls = {
        "edit": lambda: run(lm, facts, covariance=covariance),
        "apply": lambda: edit.apply(lm),
        "evaluate": lambda: scored(lm, facts),
        "evaluate_single": lambda: le.evaluate_single(lm, facts, method, covariance=covariance),
        "estimate_covariance": lambda: le.estimate_covariance(lm, method, progress_bar=False),
        "tune": lambda: le.tune(lm, facts),
    }
    for name, call in calls.items():
        with pytest.raises(UnsupportedModelError, match=rf"{module} is a Linear of PEFT, .*merge_and_unload"):
            call()
            pytest.fail(name)
    assert not lm.weights.owners


def test_a_weight_that_is_computed_from_others_is_refused() -> None:
    model = tiny_model("llama")
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.down_proj)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.down_proj computes its weight from other"):
        loaded(model)


# Devices


@pytest.mark.parametrize(
    ("module", "what"),
    [("lm_head", "LM head, lm_head,"), ("model.embed_tokens", r"token embedding, model\.embed_tokens,")],
)
def test_an_offloaded_end_of_the_model_is_refused_as_it_is_loaded(folder: Path, module: str, what: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"the {what} is offloaded, and every text needs it; give '{module}'"
    ):
        LanguageModel.load(folder, device_map=DEVICES | {module: "disk"})


@pytest.mark.parametrize("module", ["model.layers.0", "model.layers.3", "model.norm"])
def test_offloaded_parts_that_are_not_edited_change_nothing(folder: Path, module: str) -> None:
    scores = []
    for place in ("cpu", "disk"):
        lm = LanguageModel.load(folder, device_map=DEVICES | {module: place}, dtype="float32")
        assert (lm.dtype, lm.d_model) == (torch.float32, 32)
        run(lm, FACTS[:1], covariance=covariance_of(lm))
        scores.append(scored(lm, FACTS[:1]).scores)
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_an_offloaded_matrix_that_is_edited_is_refused_with_its_name(folder: Path) -> None:
    lm = LanguageModel.load(folder, device_map=DEVICES | {"model.layers.2": "disk"}, dtype="float32")
    message = r"the matrix of layer 2 is offloaded; give 'model\.layers\.2\.mlp\.down_proj' a device, such as"
    with pytest.raises(UnsupportedModelError, match=message):
        run(lm, FACTS[:1])


# Dtypes


@pytest.mark.parametrize("part", ["model.layers.1.mlp.down_proj", "model.layers.3.self_attn.q_proj"])
def test_eight_bit_floats_are_refused_with_the_dtype_and_the_way_out(part: str) -> None:
    model = tiny_model("llama")
    module = model.get_submodule(part)
    module.weight = nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=rf'{part}\.weight is stored as float8_e4m3fn.*dtype="bfloat16"'):
        loaded(model)


@pytest.mark.parametrize("dtype", ["float8_e5m2", torch.float8_e4m3fn, torch.int8, "int8"])
def test_a_dtype_in_which_nothing_can_be_edited_is_refused(folder: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(ArgumentError, match=r"dtype '\w+8\w*' is not known; use float32, bfloat16"):
        LanguageModel.load(folder, dtype=dtype, device="cpu")


def test_a_module_without_a_weight_is_named_with_its_kind() -> None:
    lm = loaded(tiny_model("llama"))
    lm.blocks[1].mlp.down_proj = nn.Sequential()
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj is a Sequential; load the model without"
    ):
        lm.weight(Place(1))


def test_what_was_made_in_float32_says_so_where_the_model_is_float16(folder: Path) -> None:
    lm = LanguageModel.load(folder, device="cpu")
    covariance = covariance_of(lm)
    edit = run(lm, FACTS[:1], covariance=covariance)
    half = LanguageModel.load(folder, dtype="float16", device="cpu")
    assert half.fingerprint != lm.fingerprint
    said = r"\. It was float32 and is float16: float16 rounds weights, so load it in float32$"
    with pytest.raises(le.EditError, match=rf"load the model it was made for{said}"):
        edit.apply(half)
    with pytest.raises(le.CovarianceError, match=rf"estimate it on the model to edit{said}"):
        covariance.check(half, [Place(1)])
    with pytest.raises(le.EditError, match=r"load the model it was made for$"):
        edit.apply(loaded(tiny_model("qwen2")))
