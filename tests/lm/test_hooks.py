"""Partial forward passes (batches, hooks, prefix cache) against plain full ones, and that none leaves a trace."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import Batch, by_length, pad
from lightedit.lm.hooks import capture, hidden_of, skip_blocks, stop_after
from lightedit.lm.prefix import prefix_cache
from tests.models import ARCHITECTURES, VOCABULARY, tiny_model, tiny_tokenizer

# Text and padding longer than the tiny models' sliding windows of 8 tokens, and one row without any prefix
PREFIXES = [3, 0, 1, 12, 3]
SUFFIXES = [4, 14, 1, 2, 3]


def language_model(architecture: str, **kwargs) -> LanguageModel:
    return LanguageModel(tiny_model(architecture, **kwargs), tiny_tokenizer("bytelevel"))


def random_rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def prefixes_and_suffixes() -> tuple[list[list[int]], list[list[int]]]:
    """Rows of `PREFIXES` and `SUFFIXES`; the last row has the first one's prefix."""
    prefixes = random_rows(PREFIXES)
    return [*prefixes[:-1], prefixes[0]], random_rows(SUFFIXES, seed=1)


@torch.no_grad()
def plain_logits(lm: LanguageModel, row: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] of one row alone, straight from the stock model."""
    return lm.model(input_ids=torch.tensor([row]), use_cache=False).logits[0]


def suffix_batch(lm: LanguageModel, prefixes: list[list[int]], suffixes: list[list[int]], prefix_mask: Tensor) -> Batch:
    suffix = pad(suffixes, lm.pad_id)
    lengths = torch.tensor([len(prefix) for prefix in prefixes])
    return Batch(suffix.ids, torch.cat([prefix_mask, suffix.mask], dim=1), suffix.positions + lengths[:, None])


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# Batches


def test_padding_goes_right_or_left_and_positions_count_real_tokens() -> None:
    right = pad([[7, 8, 9], [], [5]], pad_id=1)
    assert right.ids.tolist() == [[7, 8, 9], [1, 1, 1], [5, 1, 1]]
    assert right.mask.sum(1).tolist() == [3, 0, 1]
    assert right.positions[0].tolist() == [0, 1, 2]
    left = pad([[7, 8, 9], [], [5]], pad_id=1, left=True)
    assert left.ids.tolist() == [[7, 8, 9], [1, 1, 1], [1, 1, 5]]
    assert left.mask[2].tolist() == [False, False, True]
    assert left.positions[2, -1] == 0


def test_by_length_puts_every_row_into_one_small_group_longest_first() -> None:
    lengths = [3, 9, 1, 3, 40, 0, 9]
    groups = list(by_length(lengths, max_tokens=18))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert groups[0] == [4]  # a row longer than the limit still runs, alone
    assert all(len(group) * max(lengths[i] for i in group) <= 18 for group in groups[1:])
    longest = [max(lengths[i] for i in group) for group in groups]
    assert longest == sorted(longest, reverse=True)
    assert list(by_length([], 10)) == []


# Prefix cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_suffixes_after_a_prefix_cache_equal_full_passes(architecture: str, dtype: torch.dtype) -> None:
    if architecture == "gemma3" and dtype == torch.float32:
        dtype = torch.float64  # gains of up to 300 enlarge float32's rounding to 2e-4
    lm = language_model(architecture, dtype=dtype)
    prefixes, suffixes = prefixes_and_suffixes()
    cache, prefix_mask = prefix_cache(lm, prefixes)
    assert prefix_mask.sum(1).tolist() == PREFIXES
    with torch.no_grad():
        logits = lm.forward(suffix_batch(lm, prefixes, suffixes, prefix_mask), cache)
    assert torch.isfinite(logits).all()  # padding included: NaN times a weight of zero is NaN
    if dtype == torch.bfloat16:
        return  # other shapes round otherwise
    for row, prefix, suffix in zip(logits, prefixes, suffixes, strict=True):
        assert_equal(row[: len(suffix)], plain_logits(lm, prefix + suffix)[len(prefix) :])


def test_without_any_prefix_there_is_no_cache() -> None:
    cache, mask = prefix_cache(language_model("llama"), [[], []])
    assert cache is None
    assert mask.shape == (2, 0)


def test_a_prefix_cache_is_not_changed_by_use() -> None:
    lm = language_model("gpt2")
    prefixes, suffixes = prefixes_and_suffixes()
    cache, prefix_mask = prefix_cache(lm, prefixes)
    batch = suffix_batch(lm, prefixes, suffixes, prefix_mask)
    with torch.no_grad():
        assert torch.equal(lm.forward(batch, cache), lm.forward(batch, cache))
    assert cache.get_seq_length() == max(PREFIXES)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "bloom"])
def test_rows_of_a_prefix_cache_equal_full_passes(architecture: str) -> None:
    lm = language_model(architecture)
    prefixes, suffixes = prefixes_and_suffixes()
    cache, prefix_mask = prefix_cache(lm, prefixes)
    kept = torch.tensor([3, 0])
    batch = suffix_batch(lm, prefixes, suffixes, prefix_mask)
    batch = Batch(batch.ids[kept], batch.mask[kept], batch.positions[kept])
    with torch.no_grad():
        logits = lm.forward(batch, cache.rows(kept))
    for row, i in zip(logits, kept.tolist(), strict=True):
        assert_equal(row[: SUFFIXES[i]], plain_logits(lm, prefixes[i] + suffixes[i])[PREFIXES[i] :])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_suffixes_from_a_later_block_on_equal_full_passes(architecture: str) -> None:
    """What the value optimisation runs: no prefix tokens, and no blocks below the edited one."""
    dtype = torch.float64 if architecture == "gemma3" else torch.float32  # its gains enlarge float32's rounding
    lm = language_model(architecture, dtype=dtype)
    prefixes, suffixes = prefixes_and_suffixes()
    cache, prefix_mask = prefix_cache(lm, prefixes)
    batch = suffix_batch(lm, prefixes, suffixes, prefix_mask)
    with torch.no_grad():
        with capture({0: lm.blocks[1]}, len(prefixes)) as states:
            lm.forward(batch, cache)
        with lm.starting_at(2, states[0]):
            logits = lm.forward(batch, cache.without(range(2)))
    for row, prefix, suffix in zip(logits, prefixes, suffixes, strict=True):
        assert_equal(row[: len(suffix)], plain_logits(lm, prefix + suffix)[len(prefix) :])


def test_reaching_a_layer_that_was_dropped_from_the_cache_is_an_error() -> None:
    lm = language_model("llama")
    cache, prefix_mask = prefix_cache(lm, [[5, 6, 7]])
    with pytest.raises(RuntimeError, match="no states for layer 0"):
        lm.forward(suffix_batch(lm, [[5, 6, 7]], [[8]], prefix_mask), cache.without(range(1)))


# Hooks


@pytest.mark.parametrize("layer", [0, 1, 3, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_starting_at_a_block_equals_the_full_pass(architecture: str, layer: int) -> None:
    lm = language_model(architecture)
    rows = random_rows([12, 5])
    batch = pad(rows, lm.pad_id)
    other = batch if layer == 0 else pad(random_rows([12, 5], seed=1), lm.pad_id)  # the skipped blocks' input
    with torch.no_grad():
        with capture({0: lm.blocks[max(0, layer - 1)]}, 2) as states:
            lm.forward(batch)
        with lm.starting_at(layer, states[0]):
            logits = lm.forward(other)
    for row, ids in zip(logits, rows, strict=True):
        assert_equal(row[: len(ids)], plain_logits(lm, ids))


def test_gradients_flow_into_the_state_that_replaces_the_first_blocks() -> None:
    lm = language_model("gptj")
    hidden = torch.randn(1, 3, lm.d_model, requires_grad=True)
    with lm.starting_at(2, hidden):
        lm.forward(pad([[5, 6, 7]], lm.pad_id))[0, 2, 9].backward()
    assert (hidden.grad.norm(dim=-1) > 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_at_chosen_positions_equals_choosing_from_all_logits(architecture: str) -> None:
    lm = language_model(architecture)
    batch = pad(random_rows([6, 3]), lm.pad_id)
    at = (torch.tensor([1, 0, 0]), torch.tensor([2, 5, 0]))
    with torch.no_grad():
        full = lm.forward(batch)
        with lm.before_head(2, at) as states:
            lm.forward(batch)
    chosen = lm.head.logits(states[0])
    assert chosen.shape == (3, VOCABULARY)
    assert_equal(chosen, full[at])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_capture_reads_inputs_and_outputs_of_every_row(architecture: str) -> None:
    """The MLP output matrix's input and output, and the next block's input, in blocks of every kind."""
    lm = language_model(architecture)
    batch = pad(random_rows([6, 3]), lm.pad_id)
    at = (torch.tensor([0, 1]), torch.tensor([5, 2]))
    mlp = lm.module(Place(1))
    with (
        torch.no_grad(),
        capture({1: mlp}, 2, at, inputs=True) as keys,
        capture({1: mlp}, 2) as values,
        capture({1: lm.blocks[1], 2: lm.blocks[2]}, 2) as outputs,
        capture({2: lm.blocks[2]}, 2, inputs=True) as inputs,
    ):
        lm.forward(batch)
    assert values[1].shape == outputs[1].shape == (2, 6, lm.d_model)
    assert_equal(mlp(keys[1]), values[1][at])
    assert torch.equal(inputs[2], outputs[1])
    assert not torch.equal(outputs[2], outputs[1])


def test_captured_states_are_copies() -> None:
    module = nn.Identity()
    state = torch.zeros(1, 2, 3)
    with capture({0: module}, 1) as states:
        module(state)
    state += 1
    assert torch.equal(states[0], torch.zeros(1, 2, 3))


def test_stop_after_runs_nothing_further_and_lets_other_exceptions_through() -> None:
    lm = language_model("llama")
    batch = pad([[5, 6]], lm.pad_id)
    with torch.no_grad(), capture(dict(enumerate(lm.blocks)), 1) as states, stop_after(lm.blocks[1]):
        lm.forward(batch)
    assert sorted(states) == [0, 1]
    with pytest.raises(ZeroDivisionError), stop_after(lm.blocks[1]):
        _ = 1 // 0


def test_hidden_of_takes_the_first_of_a_tuple() -> None:
    hidden = torch.zeros(2, 3, 4)
    assert hidden_of(hidden) is hidden
    assert hidden_of((hidden, None)) is hidden


# Traces


def traces(model: nn.Module) -> list[str]:
    """Modules on which a hook or an exchanged forward was left."""
    return [
        name
        for name, module in model.named_modules()
        if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
    ]


def contexts(lm: LanguageModel) -> Iterator[AbstractContextManager[object]]:
    hidden = torch.zeros(1, 2, lm.d_model)
    yield capture(dict(enumerate(lm.blocks)), 1)
    yield capture({0: lm.module(Place(0))}, 1, inputs=True)
    yield stop_after(lm.blocks[2])
    yield skip_blocks(lm.blocks[:2], hidden, lm.returns_tuple)
    yield lm.starting_at(3, hidden)
    yield lm.before_head(1, (torch.tensor([0]), torch.tensor([0])))


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_hooks_leave_no_trace(architecture: str) -> None:
    lm = language_model(architecture)
    for context in contexts(lm):
        with context:
            assert traces(lm.model)
            lm.forward(pad([[5, 6]], lm.pad_id))
        assert not traces(lm.model)
    prefix_cache(lm, [[5, 6], [7]])
    assert not traces(lm.model)


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_hooks_leave_no_trace_after_an_exception(architecture: str) -> None:
    lm = language_model(architecture)
    beyond = pad([[5, VOCABULARY]], lm.pad_id)  # no such row in the embeddings
    for context in contexts(lm):
        with pytest.raises(IndexError), context:
            lm.forward(beyond)
        assert not traces(lm.model)
    with pytest.raises(IndexError):
        prefix_cache(lm, [[5, VOCABULARY]])
    assert not traces(lm.model)


def test_a_forward_that_lives_on_the_instance_comes_back() -> None:
    """So do accelerate's hooks live; a block without one gets its class's forward back."""
    lm = language_model("llama")
    batch = pad([[5, 6]], lm.pad_id)
    block = lm.blocks[0]
    calls = []
    original = block.forward

    def hooked(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = hooked
    with torch.no_grad():
        with lm.starting_at(2, torch.zeros(1, 2, lm.d_model)):
            lm.forward(batch)
        assert not calls
        assert block.__dict__["forward"] is hooked
        assert "forward" not in lm.blocks[1].__dict__
        lm.forward(batch)
    assert calls
