"""Every place of every architecture: what is read there, what its matrix says of it, and what changes there do."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightedit.errors import UnsupportedModelError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import Batch, pad
from lightedit.lm.hooks import stop_after
from lightedit.lm.packed import Span
from lightedit.lm.prefix import prefix_cache
from tests.lm.places import FALCONS, LAYER, MODELS, ROWS, language_model, matrices, places, rows_of, whole_weight
from tests.models import ARCHITECTURES, VOCABULARY

AT = (torch.tensor([0, 2, 2]), torch.tensor([3, 0, 5]))
GATED = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2"]


@pytest.mark.parametrize("architecture", MODELS)
@torch.no_grad()
def test_what_leaves_a_matrix_is_its_rows_times_what_enters(architecture: str) -> None:
    lm = language_model(architecture)
    where = matrices(lm)
    assert ("mlp_gate" in lm.architecture.names) == (architecture in GATED)
    with lm.capture(where, 3) as outputs, lm.capture(where, 3, inputs=True) as inputs:
        lm.forward(pad(ROWS, lm.pad_id))
    for place in where:
        rows = rows_of(lm, place)
        bias = getattr(lm.module(place), "bias", None)
        expected = inputs[place] @ whole_weight(lm.module(place))[rows].T + (0 if bias is None else bias[rows])
        torch.testing.assert_close(outputs[place], expected, atol=1e-4, rtol=1e-4)
        assert lm.anatomy.shape(place) == (outputs[place].shape[-1], inputs[place].shape[-1])


def attention_states(lm: LanguageModel, layer: int) -> tuple[list[Tensor], list[Tensor]]:
    """q and k before rotation and v, as the model itself splits them, each [rows, tokens, heads, head_dim]."""
    attention = lm.model.get_submodule(lm.module_name(Place(layer, "q")).rsplit(".", 1)[0])
    name = next(n for n in ("_split_heads", "_reshape") if hasattr(attention, n))
    seen: list[Any] = []
    original = getattr(attention, name)
    setattr(attention, name, lambda fused: seen.append(original(fused)) or seen[-1])
    lm.forward(pad(ROWS, lm.pad_id))
    return seen[0]


@pytest.mark.parametrize("architecture", [*FALCONS, "bloom"])
@torch.no_grad()
def test_slices_of_a_grouped_matrix_are_what_the_model_takes_for_q_k_and_v(architecture: str) -> None:
    lm = language_model(architecture)
    where = {name: Place(LAYER, name) for name in ("q", "k", "v")}
    with lm.capture(where.values(), 3) as states:
        split = attention_states(lm, LAYER)
    for (name, place), model in zip(where.items(), split, strict=True):
        if architecture == "bloom":  # [rows, heads, tokens, head_dim]
            model = model.transpose(1, 2)
        own = states[place].unflatten(2, (-1, model.shape[-1]))
        copies = model.shape[2] // own.shape[2]  # Falcon hands every head its group's k and v
        assert torch.equal(own.repeat_interleave(copies, dim=2), model), name


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "phi3", "llama", "opt"])
@torch.no_grad()
def test_values_reach_the_output_and_queries_only_its_pattern(architecture: str) -> None:
    """At a row's first token, which sees itself alone: heads' outputs are its v, whatever q and k are."""
    lm = language_model(architecture)
    q, k, v, out = (Place(LAYER, name) for name in ("q", "k", "v", "attention_out"))
    first = (torch.arange(3), torch.zeros(3, dtype=torch.long))
    with lm.capture([v], 3, first) as values, lm.capture([out], 3, first, inputs=True) as heads:
        lm.forward(pad(ROWS, lm.pad_id))
    width, groups = heads[out].shape[1], heads[out].shape[1] // values[v].shape[1]
    head_dim = width // lm.model.config.num_attention_heads
    expected = values[v].unflatten(1, (-1, head_dim)).repeat_interleave(groups, 1).flatten(1)
    torch.testing.assert_close(heads[out], expected, atol=1e-5, rtol=1e-5)
    for place in (q, k):
        shift = torch.randn(3, lm.anatomy.shape(place)[0])
        with lm.add_at(place, shift, first), lm.capture([out], 3, first, inputs=True) as again:
            lm.forward(pad(ROWS, lm.pad_id))
        torch.testing.assert_close(again[out], heads[out], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", GATED)
@torch.no_grad()
def test_the_gate_is_the_one_that_goes_through_the_activation(architecture: str) -> None:
    lm = language_model(architecture)
    gate, first, second = (Place(LAYER, name) for name in ("mlp_gate", "mlp_in", "mlp"))
    mlp = lm.model.get_submodule(lm.module_name(second).rsplit(".", 1)[0])
    activation = getattr(mlp, "act_fn", None) or mlp.activation_fn
    with lm.capture([gate, first], 3) as states, lm.capture([second], 3, inputs=True) as keys:
        lm.forward(pad(ROWS, lm.pad_id))
    # SiLU of a slice of a fused matrix rounds otherwise than that of a whole tensor on some CPUs
    torch.testing.assert_close(keys[second], activation(states[gate]) * states[first], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("architecture", MODELS)
@torch.no_grad()
def test_attention_enters_where_q_does_and_leaves_where_its_output_matrix_does(architecture: str) -> None:
    lm = language_model(architecture)
    attention, block = Place(LAYER, "attention"), Place(LAYER, "block")
    where = [attention, Place(LAYER, "q"), Place(LAYER, "v"), Place(LAYER, "attention_out"), block]
    with lm.capture(where, 3) as outputs, lm.capture(where, 3, inputs=True) as inputs:
        lm.forward(pad(ROWS, lm.pad_id))
    assert torch.equal(inputs[attention], inputs[where[1]]) and torch.equal(inputs[attention], inputs[where[2]])
    assert torch.equal(outputs[attention], outputs[where[3]])
    assert lm.anatomy.shape(attention) == (lm.d_model, lm.d_model) == lm.anatomy.shape(block)
    with lm.capture([Place(0, "block")], 3) as previous, lm.capture([Place(0, "embedding")], 3) as embedded:
        lm.forward(pad(ROWS, lm.pad_id))
    assert embedded[Place(0, "embedding")].shape == (3, 7, lm.d_model)
    assert torch.equal(lm.module(Place(0, "embedding"))(pad(ROWS, lm.pad_id).ids), embedded[Place(0, "embedding")])
    assert previous[Place(0, "block")].shape == inputs[block].shape


@pytest.mark.parametrize("architecture", MODELS)
@torch.no_grad()
def test_chosen_tokens_are_read_of_every_place(architecture: str) -> None:
    lm = language_model(architecture)
    batch = pad(ROWS, lm.pad_id)
    with lm.capture(places(lm), 3) as every, lm.capture(places(lm), 3, AT) as chosen:
        lm.forward(batch)
    assert list(every) and set(every) == set(chosen) == set(places(lm))
    assert all(torch.equal(every[place][AT], chosen[place]) for place in every)


@pytest.mark.parametrize("architecture", MODELS)
@torch.no_grad()
def test_a_shift_is_added_at_its_tokens_and_changes_no_other_state_of_the_place(architecture: str) -> None:
    lm = language_model(architecture)
    batch = pad(ROWS, lm.pad_id)
    for place in places(lm):
        with lm.capture([place], 3) as before:
            plain = lm.forward(batch)
        shift = torch.randn(3, before[place].shape[-1])
        with lm.add_at(place, shift, AT), lm.capture([place], 3) as after:
            changed = lm.forward(batch)
        expected = before[place].clone()
        expected[AT] += shift
        assert torch.equal(after[place], expected), place
        assert not torch.equal(plain[2, 5:], changed[2, 5:]), place  # and what follows is run with it
        assert torch.equal(plain[1, :1], changed[1, :1]), place


@pytest.mark.parametrize("architecture", MODELS)
@torch.no_grad()
def test_states_put_back_where_they_were_read_give_the_same_bits(architecture: str) -> None:
    lm = language_model(architecture)
    batch = pad(ROWS, lm.pad_id)
    for place in places(lm):
        with lm.capture([place], 3, AT) as states:
            plain = lm.forward(batch)
        with lm.replace_at(place, torch.zeros_like(states[place]), AT), lm.replace_at(place, states[place], AT):
            assert torch.equal(lm.forward(batch), plain), place
        with lm.replace_at(place, torch.zeros_like(states[place]), AT), lm.capture([place], 3, AT) as zeros:
            assert not torch.equal(lm.forward(batch), plain), place
        assert not zeros[place].any()


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])  # others compute norms in float32
def test_gradients_flow_into_shifts_and_states_at_several_places_of_one_pass(architecture: str) -> None:
    lm = language_model(architecture, torch.float64)
    batch = pad(ROWS, lm.pad_id)
    one, other, last = Place(0, "v"), Place(1), Place(2, "block")
    given = [torch.randn(3, lm.anatomy.shape(place)[0], dtype=torch.float64) for place in (one, other, last)]

    def loss(shift: Tensor, states: Tensor, late: Tensor) -> Tensor:
        late_at = (torch.tensor([0, 1, 2]), torch.tensor([1, 0, 3]))
        with lm.add_at(one, shift, AT), lm.replace_at(other, states, AT), lm.add_at(last, late, late_at):
            return lm.forward(batch).log_softmax(-1)[:, :, 7].sum()

    assert torch.autograd.gradcheck(loss, [each.requires_grad_() for each in given], nondet_tol=1e-9, fast_mode=True)


@torch.no_grad()
def test_a_token_named_twice_gets_both_shifts_and_a_half_precision_sum_is_rounded_once() -> None:
    lm = language_model("llama", torch.bfloat16)
    place = Place(1)
    at = (torch.tensor([0, 0]), torch.tensor([2, 2]))
    with lm.capture([place], 3) as before:
        lm.forward(pad(ROWS, lm.pad_id))
    shift = torch.tensor([[2.0**-8], [-(2.0**-8)]]).expand(2, 32)
    with lm.add_at(place, shift, at), lm.capture([place], 3) as after:
        lm.forward(pad(ROWS, lm.pad_id))
    assert torch.equal(before[place], after[place]) and after[place].dtype == torch.bfloat16


@torch.no_grad()
def test_a_token_beyond_the_batch_is_an_error_and_leaves_no_trace() -> None:
    lm = language_model("opt")
    beyond = (torch.tensor([0]), torch.tensor([7]))
    with pytest.raises(IndexError), lm.add_at(Place(1), torch.ones(1, 32), beyond):
        lm.forward(pad(ROWS, lm.pad_id))
    for module in lm.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("architecture", MODELS)
def test_matrices_and_biases_are_views_that_can_be_written_or_are_refused_in_words(architecture: str) -> None:
    lm = language_model(architecture)
    refused = []
    for place in places(lm, "embedding"):
        if place.name in ("attention", "block"):
            with pytest.raises(UnsupportedModelError, match=f"layer 1 {place.name} has no matrix"):
                lm.weight(place)
            assert lm.bias(place) is None
            continue
        if isinstance(lm.anatomy.features(place), Tensor):
            refused.append(place.name)
            with pytest.raises(UnsupportedModelError, match="lie head by head among those of q, k and v"):
                lm.weight(place)
            continue
        module, rows = lm.module(place), rows_of(lm, place)
        assert tuple(lm.weight(place).shape) == lm.anatomy.shape(place)
        before = lm.weight(place).clone()
        lm.weight(place).fill_(7)
        others = torch.ones(len(whole_weight(module)), dtype=torch.bool)
        others[rows] = False
        assert (whole_weight(module)[rows] == 7).all() and (whole_weight(module)[others] != 7).all()
        lm.weight(place).copy_(before)
        assert (lm.bias(place) is None) == (getattr(module, "bias", None) is None)
        if (bias := lm.bias(place)) is not None:
            before = bias.clone()
            bias.fill_(3)
            assert (module.bias[rows] == 3).all() and (module.bias[others] != 3).all()
            bias.copy_(before)
    interleaved = ["bloom", "gpt_neox", "falcon-plain", "falcon-grouped"]
    assert refused == (["q", "k", "v"] if architecture in interleaved else [])


def test_the_embeddings_matrix_has_a_column_for_every_token() -> None:
    lm = language_model("llama")
    assert lm.weight(Place(0, "embedding")).shape == (32, VOCABULARY) == lm.anatomy.shape(Place(0, "embedding"))
    with (
        pytest.raises(UnsupportedModelError, match="token ids enter the embedding"),
        lm.capture([Place(0, "embedding")], 1, inputs=True),
    ):
        pass


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            Place(1, "mlp_gate"),
            "gpt2 has no mlp_gate; the places of its blocks are embedding, q, k, v, .*, mlp",
        ),
        (Place(9), "no layer 9: layers of mlp are 0 to 3"),
        (Place(1, "embedding"), "no layer 1 embedding: layers of embedding are 0 to 0"),
    ],
)
def test_places_that_a_model_lacks_are_refused_with_those_it_has(place: Place, message: str) -> None:
    lm = language_model("gpt2")
    for use in (lm.module, lm.weight, lm.bias, lm.anatomy.port):
        with pytest.raises(UnsupportedModelError, match=message):
            use(place)


# Together with a prefix cache and a start at a later block, and in packed passes


@pytest.mark.parametrize("architecture", MODELS)
@torch.no_grad()
def test_a_pass_from_a_later_block_with_cached_prefixes_is_changed_as_a_whole_one(architecture: str) -> None:
    lm = language_model(architecture)
    prefix, suffixes = [5, 9, 31, 40, 8, 7], [[12, 13, 14], [15, 16, 17]]
    whole = pad([prefix + suffix for suffix in suffixes], lm.pad_id)
    start, late = Place(0, "block"), Place(2, "mlp")
    shifts = {start: torch.randn(2, 32), late: torch.randn(2, 32)}
    rows = torch.arange(2)
    with lm.capture([start], 2) as states:
        lm.forward(whole)
    at = (rows, torch.tensor([6, 7]))
    with lm.add_at(start, shifts[start], at), lm.add_at(late, shifts[late], at), lm.capture([late], 2) as expected:
        logits = lm.forward(whole)[:, 6:]

    cache, mask = prefix_cache(lm, [prefix, prefix])
    suffix = pad(suffixes, lm.pad_id)
    batch = Batch(suffix.ids, torch.cat([mask, suffix.mask], dim=1), suffix.positions + len(prefix))
    hidden = states[start][:, 6:].clone()
    hidden[rows, at[1] - 6] += shifts[start]
    with (
        lm.starting_at(1, hidden),
        lm.add_at(late, shifts[late], (rows, at[1] - 6)),
        lm.capture([late], 2) as found,
    ):
        again = lm.forward(batch, cache.without(range(1)))
    torch.testing.assert_close(found[late], expected[late][:, 6:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if language_model(name).architecture.supports_packing]
)
@torch.no_grad()
def test_packed_rows_are_changed_by_their_tokens_place_in_the_whole(architecture: str) -> None:
    lm = language_model(architecture)
    texts = [[5, 60, 70, 8], [30, 31, 32, 33]]
    ids = torch.tensor(texts)
    place = Place(1)
    shift = torch.randn(2, 32)
    at = (torch.tensor([0, 1]), torch.tensor([2, 3]))
    block = lm.blocks[2]
    with lm.add_at(place, shift, at), lm.capture([Place(2, "block")], 2) as expected, stop_after(block):
        lm.forward(pad(texts, lm.pad_id))
    flat = (torch.zeros(2, dtype=torch.long), 4 * at[0] + at[1])
    with lm.add_at(place, shift, flat), lm.capture([Place(2, "block")], 1) as found, stop_after(block):
        spans = [Span.of(torch.ones_like(ids, dtype=torch.bool), 4, None, lm.dtype)]
        lm.forward_packed(ids.flatten(), torch.arange(4).repeat(2), spans)
    actual, wanted = found[Place(2, "block")], expected[Place(2, "block")]
    torch.testing.assert_close(actual.view_as(wanted), wanted, atol=1e-5, rtol=1e-4)
