"""MEND and KE against the literal published loops, on tiny models: forward, update, and MEND's training step."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lightedit as le
from benchmarks.hypernetworks import matrices_of
from benchmarks.published.hypernetworks import (
    KEMatrix,
    Normaliser,
    Row,
    ke_condition,
    mend_factors,
    mend_step,
    published_ke,
    published_mend,
)
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods.hypernetworks.examples import EditorDataModule, examples_of
from lightedit.methods.hypernetworks.factors import token_factors
from lightedit.methods.hypernetworks.module import HyperNetworkModule
from tests.methods.hypernetworks.trained import rows_of, saved
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS

QUIET = le.RunSettings(progress_bar=False, outcomes=False)
BOTH = pytest.mark.parametrize("architecture", ["gpt2", "llama"])
MEND = le.MEND(layers=(2, 3), rank=8, rate=1e-2, published=True)


def model(architecture: str) -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, dtype=torch.float64), tiny_tokenizer("bytelevel"))


def moved(network: torch.nn.Module) -> None:
    """Give each parameter another value, as training would; U and the biases begin at 0."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


def literal_rows(lm: le.LanguageModel, facts: list[le.Fact]) -> list[Row]:
    rows = []
    for fact in facts:
        ids = lm.tokenizer(f"{fact.text} {fact.target_new}")["input_ids"]
        rows.append(Row(ids[:-1], ids[len(lm.tokenizer(fact.text)["input_ids"]) :]))
    return rows


def trained(lm: le.LanguageModel, method: le.MEND | le.KE, folder: Path) -> tuple[le.Method, torch.nn.Module]:
    """A saved network none of whose parameters is at its first value."""
    made = saved(lm, method, folder, moved)
    return made, made.network(lm)


def written(lm: le.LanguageModel, edit: le.Edit, name: str) -> torch.Tensor:
    """ΔW of one parameter, as the model stores it."""
    ((place, change),) = [item for item in edit.rounds[0].items() if f"{lm.module_name(item[0])}.weight" == name]
    delta = change.dense() if isinstance(change, LowRankUpdate) else change.weight
    return delta if delta.shape == lm.model.get_parameter(name).shape and not is_conv(lm, place) else delta.T


def is_conv(lm: le.LanguageModel, place: le.lm.Place) -> bool:
    return not isinstance(lm.module(place), torch.nn.Linear)


@BOTH
@pytest.mark.parametrize("norm", [True, False])
def test_a_round_of_mend_is_the_published_one(tmp_path: Path, architecture: str, norm: bool) -> None:
    lm = model(architecture)
    method, network = trained(lm, replace(MEND, norm=norm), tmp_path / "mend")
    facts = [FACTS[0], replace(FACTS[1], target_new="Spain and Portugal"), FACTS[2]]
    expected = published_mend(copy.deepcopy(lm.model), literal_rows(lm, facts), matrices_of(lm, network))
    edit = le.edit(lm, facts, method, settings=QUIET)
    assert len(expected) == len(method.places)
    for name, change in expected.items():
        torch.testing.assert_close(written(lm, edit, name), change, atol=1e-8, rtol=1e-5)


@BOTH
def test_an_edit_of_ke_is_the_published_one(tmp_path: Path, architecture: str) -> None:
    lm = model(architecture)
    method, network = trained(lm, le.KE(layers=(2, 3), hidden=8, width=16, middle=8, published=True), tmp_path / "ke")
    row, fact = literal_rows(lm, FACTS[:1])[0], FACTS[0]
    said = lm.decode(lm.generate([lm.tokenizer(fact.text)["input_ids"]], len(row.targets))[0]).strip()
    text = lm.tokenizer(f"{said} >> {fact.target_new} || {fact.text}")["input_ids"]
    condition = ke_condition(text, network.embedding.weight, network.lstm, network.linear)
    matrices = [KEMatrix(lm.module_name(one.place), network.conditioners[one.place.key]) for one in network.matrices]
    expected = published_ke(copy.deepcopy(lm.model), row, condition, matrices)
    edit = le.edit(lm, [fact], method, settings=QUIET)
    for name, change in expected.items():
        torch.testing.assert_close(written(lm, edit, name), change, atol=1e-8, rtol=1e-5)


@BOTH
def test_the_statistics_are_those_of_the_published_running_sums(architecture: str) -> None:
    lm = model(architecture)
    network = MEND.new_network(lm)
    network.observe(token_factors(lm, rows_of(lm, FACTS), MEND.places, torch.float64))
    places = {f"{lm.module_name(one.place)}": f"{one.d_out}x{one.d_in}" for one in network.matrices}
    norms: dict[str, Normaliser] = {}
    for row in literal_rows(lm, FACTS):
        for name, z in mend_factors(copy.deepcopy(lm.model), [row], list(places)).items():
            norms.setdefault(places[name], Normaliser()).observe(z)
    for shape, norm in norms.items():
        shared = network.networks[shape]
        assert norm.count == int(shared.count)
        torch.testing.assert_close(norm.mean, shared.mean, atol=1e-8, rtol=1e-5)
        torch.testing.assert_close(norm.squares, shared.squares, atol=1e-8, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("published", [True, False])
def test_a_training_step_of_mend_has_the_loss_and_gradients_of_the_published_loop(
    architecture: str, published: bool
) -> None:
    lm = model(architecture)
    facts = [replace(fact, paraphrase_prompts=(f"It is said: {fact.text}",)) for fact in FACTS[:3]]
    data = EditorDataModule(examples_of(lm, facts), le.EditorTrainingSettings(batch_size=2, validation=1))
    module = HyperNetworkModule(lm, replace(MEND, published=published, edit_weight=0.1), 1)
    network = module.network
    network.observe(module.factors([example.own for example in data.training]))
    moved(network)
    network.eval()  # statistics stay
    batch = data.draws.step(0)
    loss, _ = module.losses(batch)
    ours = torch.autograd.grad(loss, list(network.parameters()))
    total, sign = 0.0, 1 if published else -1
    plain, matrices = copy.deepcopy(lm.model), matrices_of(lm, network)
    for drawn in batch:
        own, rephrasing = Row(*drawn.example.own), Row(*drawn.rephrasing)
        total = total + mend_step(plain, own, rephrasing, drawn.locality[0], matrices, 0.1, sign) / len(batch)
    torch.testing.assert_close(loss, total, atol=1e-8, rtol=1e-6)
    for one, other in zip(ours, torch.autograd.grad(total, list(network.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)
