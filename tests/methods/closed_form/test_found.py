"""One lean parity suite for every type whose places are found: values, updates, states under δ, saved edits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lightedit as le
from benchmarks.published import Request, published_memit, published_rome
from benchmarks.values import published_value
from lightedit.data.prompts import Contexts, tokenize_facts
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import Batch, pad
from lightedit.lm.prefix import prefix_cache
from lightedit.methods.closed_form.keys import KeyWalk
from lightedit.methods.closed_form.values import optimize_values
from lightedit.methods.closed_form.writing import write_facts
from lightedit.statistics.covariance import Provenance
from tests.models import ARCHITECTURES, FOUND, tiny_model, tiny_tokenizer

TEMPLATES = ("{}", "The river is long. {}")
CONTEXTS = Contexts(TEMPLATES, (0.5, 0.5))
FACTS = [
    le.Fact("The capital of {}", "France", "Rome"),
    le.Fact("{} is a city in the north of", "Old London Town", "Spain"),
]
REQUESTS = [Request(fact.prompt, fact.subject, fact.target_new) for fact in FACTS]
LAYER = 1


@pytest.fixture(scope="module", params=FOUND)
def lm(request: pytest.FixtureRequest) -> Iterator[LanguageModel]:
    yield LanguageModel(tiny_model(request.param), tiny_tokenizer("bytelevel"), name=request.param)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def second_moment(lm: LanguageModel) -> Tensor:
    width = lm.weight(Place(LAYER)).shape[1]
    keys = torch.randn(width, 3 * width, dtype=torch.float64)
    return keys @ keys.T / (3 * width)


def test_at_least_fifty_dense_types_are_tested() -> None:
    assert len({*ARCHITECTURES, *FOUND}) >= 50


@pytest.mark.parametrize("site", ["block", "mlp"])
def test_targets_equal_the_published_loop(lm: LanguageModel, site: str) -> None:
    settings = le.ValueSettings(lr=0.3, steps=4, clamp_norm_factor=2.0)
    values = optimize_values(lm, tokenize_facts(lm.tokenizer, FACTS, CONTEXTS), LAYER, site, settings)
    for fact, target, initial in zip(FACTS, values.targets, values.initial, strict=True):
        expected = published_value(lm, fact, CONTEXTS, LAYER, site, settings)
        if site == "block" and lm.mlp_norm(LAYER) is not None:  # the block's output, then the MLP's
            of_block, target = target.chunk(2)
            assert relative(of_block, expected.target) < 3e-5  # gains of up to 300 enlarge float32's rounding
        else:
            assert relative(target, expected.target) < 1e-5
        assert relative(target - initial, expected.delta) < 1e-3  # h0 may be hundreds of times longer


def test_updates_equal_the_published_ones(lm: LanguageModel) -> None:
    moment, base = second_moment(lm), lm.weight(Place(LAYER)).clone()
    prompts = tokenize_facts(lm.tokenizer, FACTS, CONTEXTS)
    reference = (lm.model, lm.tokenizer)
    plain = lm.mlp_norm(LAYER) is None and lm.anatomy.mlp_scale(LAYER) == 1
    targets = torch.randn(lm.d_model, len(FACTS), dtype=torch.float64)
    for method in [le.ROME(layers=(LAYER,))] + [le.MEMIT(layers=(LAYER,), lambda_=3.0)] * plain:
        count = 1 if isinstance(method, le.ROME) else len(FACTS)
        if isinstance(method, le.ROME):
            expected = published_rome(*reference, REQUESTS[0], TEMPLATES, targets[:, 0], LAYER, moment)
        else:
            memit = published_memit(*reference, REQUESTS, TEMPLATES, list(targets.T), [LAYER], {LAYER: moment}, 3.0)
            expected = memit[LAYER]
        preservation = {Place(LAYER): method.preservation({Place(LAYER): moment}, Place(LAYER))}
        list(write_facts(lm, method, preservation, prompts[:count], targets[:, :count], "round"))
        assert relative(lm.weight(Place(LAYER)) - base, expected) < 1e-4
        lm.weights.remove(["round"])
        assert torch.equal(lm.weight(Place(LAYER)), base)


def test_a_constant_after_the_mlp_is_taken_into_account(lm: LanguageModel) -> None:
    """MEMIT with hardly any preservation reaches the block's wanted output, whatever scales the MLP's."""
    if lm.mlp_norm(LAYER) is not None:
        return
    bare = tokenize_facts(lm.tokenizer, FACTS, Contexts())
    before = KeyWalk(lm, bare, Place(LAYER)).outputs(Place(LAYER, "block"))
    targets = before + 0.3 * before.norm(dim=0) / lm.d_model**0.5 * torch.randn_like(before)
    method = le.MEMIT(layers=(LAYER,), lambda_=1e-6)
    preservation = {Place(LAYER): method.preservation({Place(LAYER): second_moment(lm)}, Place(LAYER))}
    list(write_facts(lm, method, preservation, bare, targets, "round"))
    after = KeyWalk(lm, bare, Place(LAYER)).outputs(Place(LAYER, "block"))
    lm.weights.remove(["round"])
    assert relative(after, targets) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_measures_the_same_of_a_model(lm: LanguageModel, dtype: torch.dtype) -> None:
    half = LanguageModel(tiny_model(lm.name, dtype=dtype), lm.tokenizer)
    assert half.architecture == lm.architecture
    assert half.anatomy.proof.mlp_scales == pytest.approx(lm.anatomy.proof.mlp_scales, rel=5e-3)
    assert half.head.scale == lm.head.scale


@torch.no_grad()
def test_logits_under_a_change_are_those_of_a_whole_padded_pass(lm: LanguageModel) -> None:
    """δ in the MLP of a later block, and a pass that starts there with cached prefixes of different lengths."""
    prefixes, suffixes = [[5, 9, 31, 40, 8, 7], [50, 51, 52]], [[12, 13, 14], [15, 16]]
    late = Place(LAYER + 1)
    shift = torch.randn(2, lm.d_model)
    rows = torch.arange(2)
    whole = pad([prefix + suffix for prefix, suffix in zip(prefixes, suffixes, strict=True)], lm.pad_id)
    lengths = torch.tensor([len(prefix) for prefix in prefixes])
    with lm.capture([Place(LAYER, "block")], 2) as states, lm.add_at(late, shift, (rows, lengths)):
        logits = lm.forward(whole)
    cache, mask = prefix_cache(lm, prefixes)
    suffix = pad(suffixes, lm.pad_id)
    batch = Batch(suffix.ids, torch.cat([mask, suffix.mask], dim=1), suffix.positions + lengths[:, None])
    hidden = torch.stack([states[Place(LAYER, "block")][row, n : n + 3] for row, n in enumerate(lengths.clamp(max=6))])
    with lm.starting_at(LAYER + 1, hidden), lm.add_at(late, shift, (rows, torch.zeros_like(rows))):
        found = lm.forward(batch, cache.without(range(LAYER + 1)))
    for row, (n, ids) in enumerate(zip(lengths.tolist(), suffixes, strict=True)):
        assert relative(found[row, : len(ids)], logits[row, n : n + len(ids)]) < 1e-6
    alone = lm.head.logits(_head_inputs(lm, whole))
    assert relative(alone, lm.forward(whole)[:, 0]) < 1e-6


def _head_inputs(lm: LanguageModel, batch: Batch) -> Tensor:
    first = (torch.arange(len(batch.ids)), torch.zeros(len(batch.ids), dtype=torch.long))
    with lm.before_head(len(batch.ids), first) as states:
        lm.forward(batch)
    return states[0]


def test_an_edit_is_saved_reverted_and_loaded_bit_for_bit(lm: LanguageModel, tmp_path: Path) -> None:
    before = {name: parameter.clone() for name, parameter in lm.model.named_parameters()}
    provenance = Provenance(lm.name, lm.fingerprint, "noise", 400, 8, "float64")
    covariance = le.Covariance({Place(LAYER): second_moment(lm)}, provenance)
    method = le.MEMIT(layers=(LAYER,), lambda_=1.0, values=le.ValueSettings(steps=2))
    edit = le.edit(lm, FACTS, method, covariance=covariance, settings=le.RunSettings(facts_per_round=1))
    edited = lm.weight(Place(LAYER)).clone()
    assert not torch.equal(edited, before[lm.module_name(Place(LAYER)) + ".weight"].reshape(edited.shape))
    edit.save(tmp_path / "edit")
    edit.revert(lm)
    assert all(torch.equal(parameter, before[name]) for name, parameter in lm.model.named_parameters())
    loaded = le.Edit.load(tmp_path / "edit")
    loaded.apply(lm)
    assert torch.equal(lm.weight(Place(LAYER)), edited)
    loaded.revert(lm)


def test_padding_on_the_left_does_not_change_a_continuation(lm: LanguageModel) -> None:
    prompts = [[5, 9, 31, 40, 8, 7, 60], [50, 51, 52]]
    together = lm.generate(prompts, 4, stop_at_end=False)
    assert together == [lm.generate([prompt], 4, stop_at_end=False)[0] for prompt in prompts]
