"""The language model: what it refuses, the matrices it gives access to, its fingerprint and its text generation."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.byt5 import ByT5Tokenizer

from lightedit.errors import UnsupportedModelError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import pad
from lightedit.lm.changes import LowRankUpdate
from lightedit.lm.hooks import capture
from lightedit.methods.closed_form.keys import values_of
from tests.models import ARCHITECTURES, EOS, tiny_model, tiny_tokenizer

ROWS = [[5, 60, 70, 8], [9], [30, 31, 32, 33, 34, 35, 36]]


def language_model(architecture: str, tokenizer: str = "bytelevel", **kwargs) -> LanguageModel:
    return LanguageModel(tiny_model(architecture, **kwargs), tiny_tokenizer(tokenizer))


def random_update(lm: LanguageModel, layer: int, rank: int = 2) -> LowRankUpdate:
    d_out, d_in = lm.weight(Place(layer)).shape
    return LowRankUpdate(torch.randn(d_out, rank), torch.randn(d_in, rank))


# What is refused


def test_an_opt_that_normalises_after_its_residual_sum_is_refused() -> None:
    config = tiny_model("opt").config
    config.do_layer_norm_before = False
    with pytest.raises(UnsupportedModelError, match=r"opt: model.decoder.layers.0: .*fc2.* after the residual sum"):
        LanguageModel(AutoModelForCausalLM.from_config(config), tiny_tokenizer("bytelevel"))


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"ByT5Tokenizer gives no character offsets.*fast tokenizer"):
        LanguageModel(tiny_model("gpt2"), ByT5Tokenizer())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "distinct and ascending"),
        ([2, 1], "distinct and ascending"),
        ([1, 1], "distinct and ascending"),
        ([-1, 2], "has layers 0 to 3"),
        ([2, 4], "has layers 0 to 3"),
    ],
)
def test_layers_must_ascend_and_exist(layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        language_model("llama").check_layers(layers)


def test_layers_that_ascend_and_exist_pass() -> None:
    language_model("llama").check_layers((0, 2, 3))


def test_a_weight_that_is_not_in_memory_is_refused() -> None:
    lm = language_model("llama")
    lm.module(Place(1)).to("meta")
    with pytest.raises(UnsupportedModelError, match="layer 1 is offloaded"):
        lm.weight(Place(1))


def test_a_quantised_weight_is_refused() -> None:
    lm = language_model("llama")
    lm.module(Place(1)).weight = torch.nn.Parameter(lm.weight(Place(1)).to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="layer 1 is stored as int8"):
        lm.weight(Place(1))


# The matrices


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_of_keys_equal_the_output_of_the_mlp(architecture: str) -> None:
    lm = language_model(architecture)
    at = (torch.tensor([0, 1, 2, 2]), torch.tensor([3, 0, 6, 1]))
    with (
        torch.no_grad(),
        capture({2: lm.module(Place(2))}, 3, at, inputs=True) as keys,
        capture({2: lm.module(Place(2))}, 3, at) as outputs,
    ):
        lm.forward(pad(ROWS, lm.pad_id))
    values = values_of(lm, Place(2), keys[2].T)
    assert lm.weight(Place(2)).shape == (lm.d_model, keys[2].shape[1])
    assert values.dtype == torch.float64
    torch.testing.assert_close(values.T.float(), outputs[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])  # a Conv1D, which is stored transposed, and a Linear
def test_writing_into_the_weight_changes_the_model(architecture: str) -> None:
    lm = language_model(architecture)
    key = torch.randn(1, lm.weight(Place(2)).shape[1])
    before = lm.module(Place(2))(key)
    direction = torch.randn(lm.d_model)
    lm.weight(Place(2)).add_(torch.outer(direction, key[0] / key.square().sum()))
    torch.testing.assert_close(lm.module(Place(2))(key), before + direction, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_edit_changes_one_matrix_and_no_other_parameter(architecture: str) -> None:
    """In particular not the embeddings, which many models share with the head."""
    lm = language_model(architecture)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    tied = lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight
    lm.weights.add("edit", Place(2), random_update(lm, 2))
    changed = [name for name, value in lm.model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == [f"{lm.module_name(Place(2))}.weight"]
    assert tied == (lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight)


def test_the_model_is_frozen_and_evaluates() -> None:
    model = tiny_model("llama").train().requires_grad_(True)
    lm = LanguageModel(model, tiny_tokenizer("bytelevel"))
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert not any(module.training for module in lm.model.modules())
    assert not lm.forward(pad(ROWS, lm.pad_id)).requires_grad


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "olmo2"])
def test_the_norm_after_the_mlp_is_the_one_its_output_enters(architecture: str) -> None:
    lm = language_model(architecture)
    with (
        capture({0: lm.module(Place(1))}, 3) as outputs,
        capture({0: lm.mlp_norm(1)}, 3, inputs=True) as inputs,
    ):
        lm.forward(pad(ROWS, lm.pad_id))
    assert torch.equal(inputs[0], outputs[0])


def test_most_architectures_have_no_norm_after_the_mlp() -> None:
    assert language_model("gpt2").mlp_norm(1) is None


# The fingerprint


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_fingerprint_is_the_same_in_float32_and_bfloat16(architecture: str) -> None:
    half = tiny_model(architecture, dtype=torch.bfloat16)
    full = tiny_model(architecture)
    full.load_state_dict(half.state_dict())
    rounded, exact = (LanguageModel(model, tiny_tokenizer("bytelevel")).fingerprint for model in (half, full))
    assert rounded == exact == language_model(architecture).fingerprint
    assert len(exact) == 16


def test_the_fingerprint_tells_models_apart() -> None:
    models = [language_model("llama"), language_model("llama", seed=1), language_model("llama", layers=3)]
    models += [language_model("mistral"), language_model("qwen3")]
    assert len({lm.fingerprint for lm in models}) == len(models)


def test_the_fingerprint_reads_evenly_spaced_elements() -> None:
    lm = language_model("llama")
    flat = lm.weight(Place(3)).view(-1)
    last = flat.numel() - 1
    assert last % 3 == 0 and last % 63 != 0  # thirds are exactly read, though the step between elements is a fraction
    for index, is_read in ((0, True), (last // 3, True), (2 * last // 3, True), (last, True), (1, False)):
        kept = flat[index].clone()
        flat[index] += 1
        assert (LanguageModel(lm.model, lm.tokenizer).fingerprint != lm.fingerprint) == is_read
        flat[index] = kept


def test_the_fingerprint_stays_that_of_the_base_while_edited() -> None:
    lm = language_model("llama")
    before = lm.fingerprint
    lm.weights.add("edit", Place(2), random_update(lm, 2))
    assert lm.fingerprint == before == language_model("llama").fingerprint


# Text


@torch.no_grad()
def greedy(lm: LanguageModel, row: list[int], count: int) -> list[int]:
    """Greedy continuation without cache, batch or padding."""
    ids = list(row)
    for _ in range(count):
        ids.append(int(lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(row) :]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral", "bloom"])
def test_greedy_generation_equals_a_loop_over_single_rows(architecture: str) -> None:
    lm = language_model(architecture)
    expected = [greedy(lm, row, 6) for row in ROWS]
    assert lm.generate(ROWS, 6, stop_at_end=False) == expected
    assert lm.generate(ROWS, 6, stop_at_end=False, batch_size=1) == expected


def test_generation_heeds_only_its_arguments_and_not_the_models_own_defaults() -> None:
    """Checkpoints come with a generation_config; a repetition penalty in it is common."""
    lm = language_model("olmo2")
    expected = [greedy(lm, row, 12) for row in ROWS]
    assert any(len(set(ids)) < len(ids) for ids in expected)  # else a penalty would change nothing
    lm.model.generation_config.repetition_penalty = 5.0
    lm.model.generation_config.eos_token_id = expected[0][2]
    assert lm.generate(ROWS, 12, stop_at_end=False) == expected


def test_generation_stops_before_the_end_of_text() -> None:
    lm = language_model("olmo2")
    full = lm.generate(ROWS, 8, stop_at_end=False)
    end = full[0][3]
    lm.tokenizer = tiny_tokenizer.__wrapped__("bytelevel")
    lm.tokenizer.eos_token = lm.tokenizer.convert_ids_to_tokens(end)
    cut = [ids[: ids.index(end)] if end in ids else ids for ids in full]
    assert lm.generate(ROWS, 8) == cut
    assert len(cut[0]) == full[0].index(end) < 8
    assert lm.generate(ROWS, 8, stop_at_end=False) == full


def test_sampling_follows_its_seed_and_leaves_the_global_one_alone() -> None:
    lm = language_model("gpt2")
    torch.manual_seed(7)
    first = lm.generate(ROWS, 8, top_k=5, seed=3, stop_at_end=False)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), drawn)
    assert lm.generate(ROWS, 8, top_k=5, seed=3, stop_at_end=False) == first
    assert lm.generate(ROWS, 8, top_k=5, seed=4, stop_at_end=False) != first
    assert lm.generate(ROWS, 8, top_k=1, stop_at_end=False) == lm.generate(ROWS, 8, stop_at_end=False)


def test_sampling_draws_from_the_k_most_probable_tokens() -> None:
    lm = language_model("gpt2")
    row = ROWS[0]
    with torch.no_grad():
        best = lm.forward(pad([row], lm.pad_id))[0, -1].topk(3).indices.tolist()
    drawn = {ids[0] for ids in lm.generate([row] * 60, 1, top_k=3, stop_at_end=False)}
    assert len(drawn) > 1
    assert drawn <= set(best)


def test_texts_are_encoded_with_special_tokens_and_decoded_without() -> None:
    lm = language_model("llama", "sentencepiece")
    (ids,) = lm.encode(["The river rises"])
    assert ids[0] == lm.tokenizer.bos_token_id
    assert lm.decode([*ids, EOS]) == "The river rises"
    assert lm.encode([]) == []
    assert lm.generate([], 5) == []
    assert lm.generate(["The river"], 4, stop_at_end=False) == [greedy(lm, lm.encode(["The river"])[0], 4)]


def test_padding_needs_no_padding_token() -> None:
    lm = language_model("llama")
    lm.tokenizer = tiny_tokenizer.__wrapped__("bytelevel")
    assert lm.pad_id == lm.tokenizer.pad_token_id
    lm.tokenizer.pad_token = None
    assert lm.pad_id == EOS
    lm.tokenizer.eos_token = None
    assert lm.pad_id == 0
