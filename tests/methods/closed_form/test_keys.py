"""Keys and present values, read while walking, against the published reading of one text at a time."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.published import Request, published_keys
from lightedit.data.facts import Fact
from lightedit.data.prompts import Contexts, FactPrompts, tokenize_facts
from lightedit.lm import LanguageModel, Place
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods.closed_form.keys import KeyWalk
from tests.models import ARCHITECTURES, tiny_model, tiny_tokenizer

TEMPLATES = ("{}", "The river rises in the hills. {}", "I think so. {}")
WEIGHTS = {"type": (0.5, 0.25, 0.25), "plain": (1 / 3, 1 / 3, 1 / 3)}
FACTS = [
    Fact("The capital of {} is", "France", "Rome"),
    Fact("{} is owned by", "Paris", "Berlin"),  # without BOS the bare subject starts at the first token
    Fact("It is said that the mother tongue of {} is", "Zoë Müller", "Spanish"),
    Fact("{}", "The old tower in the centre of the square", "Spain and Italy"),
]
REQUESTS = [Request(fact.prompt, fact.subject, fact.target_new) for fact in FACTS]


def language_model(architecture: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return LanguageModel(tiny_model(architecture, dtype=dtype), tiny_tokenizer("bytelevel"))


def prompts_of(lm: LanguageModel, templates: tuple[str, ...] = TEMPLATES) -> list[FactPrompts]:
    weights = (1 / len(templates),) * len(templates)
    return tokenize_facts(lm.tokenizer, FACTS, Contexts(templates, weights))


def walk(lm: LanguageModel, layer: int, average: str = "type", **kwargs) -> KeyWalk:
    prompts = [replace(prompt, key_weights=WEIGHTS[average]) for prompt in prompts_of(lm)]
    return KeyWalk(lm, prompts, Place(layer), **kwargs)


def random_update(lm: LanguageModel, layer: int) -> LowRankUpdate:
    d_out, d_in = lm.weight(Place(layer)).shape
    return LowRankUpdate(torch.randn(d_out, 2), torch.randn(d_in, 2) / d_in)


@torch.no_grad()
def plain_outputs(lm: LanguageModel, module: torch.nn.Module) -> Tensor:
    """The module's output at each bare prompt's subject, [d, B] float64, from one unpadded text at a time."""
    seen = []
    for prompt in prompts_of(lm):
        row = prompt.rows[0]

        def keep(_, __, output, lookup=row.lookup) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            seen.append(hidden.reshape(-1, hidden.shape[-1])[lookup].double().clone())  # Falcon adds to it in place

        handle = module.register_forward_hook(keep)
        lm.model(input_ids=torch.tensor([row.ids]), use_cache=False)
        handle.remove()
    return torch.stack(seen, dim=1)


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.dtype == torch.float64
    assert actual.shape == expected.shape
    for one, other in zip(actual.T, expected.T, strict=True):
        assert (one - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("average", ["type", "plain"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_equal_the_published_ones(architecture: str, average: str) -> None:
    lm = language_model(architecture)
    for layer in (0, 2):
        expected = published_keys(lm.model, lm.tokenizer, REQUESTS, TEMPLATES, layer, average)
        assert_relative(walk(lm, layer, average).keys(), expected)


@pytest.mark.parametrize("max_tokens", [1, 30])
def test_keys_do_not_depend_on_how_rows_are_grouped(max_tokens: int) -> None:
    lm = language_model("mistral")
    whole, split = walk(lm, 1), walk(lm, 1, max_tokens=max_tokens)
    assert_relative(split.keys(), whole.keys())
    assert_relative(split.outputs(Place(3, "block")), whole.outputs(Place(3, "block")))


def test_the_bare_prompt_alone_is_a_context_too() -> None:
    lm = language_model("llama")
    keys = KeyWalk(lm, prompts_of(lm, ("{}",)), Place(1)).keys()
    assert_relative(keys, published_keys(lm.model, lm.tokenizer, REQUESTS, ["{}"], 1, "plain"))


@pytest.mark.parametrize("site", ["block", "mlp"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_present_values_equal_those_of_a_plain_pass(architecture: str, site: str) -> None:
    # Gemma 2 has gains of 300 behind the MLP, and its attention takes the softmax in float32 whatever the model's dtype
    rounds = architecture == "gemma2"
    lm = language_model(architecture, torch.float32 if rounds else torch.float64)
    started = walk(lm, 1)
    for layer in (1, 3):
        module = lm.blocks[layer] if site == "block" else lm.module(Place(layer))
        assert_relative(started.outputs(Place(layer, site)), plain_outputs(lm, module), 3e-4 if rounds else 1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_advancing_after_a_write_equals_a_fresh_walk_under_the_new_weights(architecture: str) -> None:
    lm = language_model(architecture)
    going = walk(lm, 0)
    for written, layer in ((0, 1), (1, 3)):  # to the next layer, and past one that is not edited
        stale = walk(lm, layer).keys()
        lm.weights.add("edit", Place(written), random_update(lm, written))
        going.advance(Place(layer))
        fresh = walk(lm, layer)
        assert_relative(going.keys(), fresh.keys())
        assert_relative(going.outputs(Place(3, "block")), fresh.outputs(Place(3, "block")))
        assert (stale - fresh.keys()).norm() > 1e-2 * stale.norm()  # else the write would not have been felt


def test_present_values_follow_a_write_at_once() -> None:
    lm = language_model("gpt2")
    started = walk(lm, 1)
    before = started.outputs(Place(2, "block"))
    lm.weights.add("edit", Place(1), random_update(lm, 1))
    assert_relative(started.outputs(Place(2, "block")), plain_outputs(lm, lm.blocks[2]))
    assert (started.outputs(Place(2, "block")) - before).norm() > 1e-2 * before.norm()


def test_keys_ignore_what_follows_the_subject() -> None:
    lm = language_model("bloom")
    others = [Fact(fact.prompt + " said to be in", fact.subject, "Tokyo") for fact in FACTS]
    prompts = tokenize_facts(lm.tokenizer, others, Contexts(TEMPLATES, WEIGHTS["type"]))
    assert_relative(KeyWalk(lm, prompts, Place(2)).keys(), walk(lm, 2).keys())


def test_walking_leaves_the_model_as_it_was() -> None:
    lm = language_model("gptj")
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    started = walk(lm, 0)
    started.keys()
    started.advance(Place(2))
    started.outputs(Place(3, "block"))
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in lm.model.modules())
