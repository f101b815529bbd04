"""Keys of a fact's contexts, each written by itself."""

from dataclasses import replace

import pytest
import torch

import lightedit as le
from lightedit.data.prompts import ContextSettings
from lightedit.errors import ArgumentError
from lightedit.lm import Place
from lightedit.lm.hooks import stop_after
from lightedit.methods.closed_form.editor import ClosedFormEditor
from lightedit.methods.closed_form.keys import KeyWalk
from lightedit.methods.protocol import search
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import CONTEXTS, FACTS, VALUES, covariance_of

APART = replace(CONTEXTS, separate=True)
ONE = le.MEMIT(layers=(1,), values=VALUES, contexts=APART, lambda_=0.3)


def model(architecture: str = "llama") -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, dtype=torch.float64), tiny_tokenizer("bytelevel"))


def editor_of(lm: le.LanguageModel, method: le.Method, rule: le.RunSettings | None = None) -> ClosedFormEditor:
    editor = method.editor(lm, covariance=covariance_of(lm, method.covariance_places), settings=rule)
    assert isinstance(editor, ClosedFormEditor)
    editor.prepare(FACTS, [list(range(len(FACTS)))])
    return editor


def input_of_matrix(lm: le.LanguageModel, ids: list[int], layer: int) -> torch.Tensor:
    """The input of the MLP's matrix at the last token of a text, by a hook of its own."""
    seen = []
    module = lm.module(Place(layer))
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, -1].detach()))
    with stop_after(module):
        lm.model(torch.tensor([ids]))
    handle.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gptj", "olmo2"])
@pytest.mark.parametrize("bare_weight", [0.5, None])
def test_the_update_minimises_the_weighted_error_at_the_key_of_every_context(
    architecture: str, bare_weight: float | None
) -> None:
    lm = model(architecture)
    method = replace(ONE, contexts=replace(APART, bare_weight=bare_weight))
    editor = editor_of(lm, method)
    with torch.enable_grad():
        search(editor, range(len(FACTS)), editor.make_optimizer())
    targets = torch.stack([editor.results[index] for index in range(len(FACTS))]).T
    walk = KeyWalk(lm, editor.prompts, Place(1))
    residuals = method.residuals(walk, walk.keys(), targets)
    term = method.lambda_ * editor.covariance[Place(1)].double()
    mean = torch.zeros(len(term), len(FACTS), dtype=torch.float64)
    for index, prompts in enumerate(editor.prompts):
        assert len(prompts.rows) == 3
        for row, weight in zip(prompts.rows, prompts.key_weights, strict=True):
            key = input_of_matrix(lm, row.ids[: row.lookup + 1], 1)
            term += weight * key[:, None] * key
            mean[:, index] += weight * key
    expected = residuals @ torch.linalg.solve(term, mean).T
    change = editor.write(range(len(FACTS)), ("x", 0))[Place(1)].dense()
    assert change.norm() > 1e-3
    torch.testing.assert_close(change, expected.to(change), rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("method", [ONE, replace(ONE, share=0.6), replace(ONE, layers=(0, 1, 2))])
def test_one_context_alone_is_written_as_its_mean_would_be(method: le.MEMIT) -> None:
    changes = []
    for separate in (False, True):
        lm = model()
        editor = editor_of(lm, replace(method, contexts=ContextSettings(prefixes=(), separate=separate)))
        search(editor, range(len(FACTS)), editor.make_optimizer())
        changes.append(editor.write(range(len(FACTS)), ("x", 0)))
    for place, change in changes[0].items():
        torch.testing.assert_close(changes[1][place].dense(), change.dense(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", [replace(ONE, layers=(0, 1, 2)), replace(ONE, share=0.75)])
def test_facts_edited_apart_are_written_as_each_would_be_alone(method: le.MEMIT) -> None:
    lm = model()
    together = method.editor(lm, covariance=covariance_of(lm, method.covariance_places))
    together.prepare(FACTS, None)
    search(together, range(len(FACTS)), together.make_optimizer())
    found = dict(together.results)
    edits = together.separate(range(len(FACTS)))
    assert edits is not None
    for index, fact in enumerate(FACTS):
        alone = method.editor(lm, covariance=covariance_of(lm, method.covariance_places))
        alone.prepare([fact], [[0]])
        alone.results[0] = found[index]
        for place, change in alone.write([0], ("x", 0)).items():
            of_all = edits.updates[place]
            torch.testing.assert_close(of_all.left[index] @ of_all.right[index].T, change.dense(), rtol=1e-6, atol=1e-9)
        lm.weights.remove([("x", 0)])


def test_merged_facts_are_written_at_the_keys_of_all_their_rows() -> None:
    lm = model()
    twin = le.Fact("The capital of {} is near", "France", "Madrid")
    editor = ONE.editor(
        lm, covariance=covariance_of(lm, ONE.covariance_places), settings=le.RunSettings(on_collision="merge")
    )
    assert isinstance(editor, ClosedFormEditor)
    editor.prepare([*FACTS[:2], twin], [[0, 1, 2]])
    prompts = [prompt for prompt in editor.prompts if prompt is not None]
    keys, members = KeyWalk(lm, prompts, Place(1)).separate_keys()
    assert len(prompts) == 2 and keys.shape[1] == members.shape[1] == 9
    torch.testing.assert_close(members.square().sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(keys @ members.T, KeyWalk(lm, prompts, Place(1)).keys())


def test_keys_of_contexts_do_not_depend_on_how_rows_are_grouped() -> None:
    lm = model()
    prompts = editor_of(lm, ONE).prompts
    keys, members = KeyWalk(lm, prompts, Place(1)).separate_keys()
    for most in (8, 40):
        other, same = KeyWalk(lm, prompts, Place(1), max_tokens=most).separate_keys()
        torch.testing.assert_close(other, keys)
        assert torch.equal(same, members)


def test_rome_writes_one_key_and_says_so() -> None:
    with pytest.raises(ArgumentError, match="ROME writes one"):
        le.ROME(layers=(1,), contexts=APART)


def test_dependent_keys_of_contexts_cannot_be_written_exactly() -> None:
    lm = model()
    exact = le.EMMET(layers=(1,), values=VALUES, contexts=APART)
    twin = replace(FACTS[0], prompt="The capital of {} is near", target_new="Madrid")
    editor = exact.editor(lm, covariance=covariance_of(lm, (1,)))
    with pytest.raises(le.FactError, match="round 1 of 1"):
        editor.prepare([*FACTS, twin], [list(range(len(FACTS) + 1))])
