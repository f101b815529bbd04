"""Edits by hyper-networks: identities that must hold, whatever a network has learned."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lightedit as le
from lightedit.data.served import encode_targets
from lightedit.lm import Place
from lightedit.lm.batch import pad
from lightedit.lm.changes import Change, LowRankUpdate
from lightedit.methods.hypernetworks.factors import TokenFactors, token_factors
from lightedit.methods.hypernetworks.ke_network import KENetwork
from lightedit.methods.hypernetworks.mend_network import MENDNetwork
from lightedit.methods.hypernetworks.network import Matrix, joined
from lightedit.methods.hypernetworks.objectives import KEObjective, sizes
from tests.methods.hypernetworks.trained import rows_of, saved
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS, assert_unedited, state

QUIET = le.RunSettings(progress_bar=False, outcomes=False)
PLAIN = le.MEND(layers=(2, 3), rank=8, norm=False, rate=0.05)
PARTS = ("mlp_gate", "mlp_in", "mlp")


def model(architecture: str = "llama", dtype: torch.dtype = torch.float64) -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, dtype=dtype), tiny_tokenizer("bytelevel"))


def loss_of(lm: le.LanguageModel, fact: le.Fact) -> Tensor:
    """The mean NLL of the target's tokens, by the whole model."""
    ((ids, count),) = encode_targets(lm.tokenizer, [fact.text], [fact.target_new])
    logits = lm.forward(pad([ids[:-1]], lm.pad_id))[0, -count:]
    return -logits.log_softmax(-1)[range(count), ids[-count:]].mean()


def gradients(lm: le.LanguageModel, fact: le.Fact, places: tuple[Place, ...]) -> dict[Place, Tensor]:
    """Autograd's own gradient of each whole weight, [d_out, d_in]."""
    found = {}
    for place in places:
        weight = lm.module(place).weight
        weight.requires_grad_(True)
        (grad,) = torch.autograd.grad(loss_of(lm, fact), weight)
        weight.requires_grad_(False)
        found[place] = grad.T if grad.shape != lm.weight(place).shape else grad
    return found


@pytest.mark.parametrize(("architecture", "parts"), [("llama", PARTS), ("gpt2", ("mlp_in", "mlp")), ("phi3", PARTS)])
def test_the_untrained_network_of_mend_takes_one_gradient_step_downhill(
    tmp_path: Path, architecture: str, parts: tuple[str, ...]
) -> None:
    lm = model(architecture)
    method = saved(lm, replace(PLAIN, parts=parts), tmp_path / "mend")
    before, expected = loss_of(lm, FACTS[0]), {}
    if architecture != "phi3":  # which stores the gate and the other matrix as one
        expected = gradients(lm, FACTS[0], method.places)
    edit = le.edit(lm, FACTS[:1], method, settings=QUIET)
    assert loss_of(lm, FACTS[0]) < before
    for place, gradient in expected.items():
        (written,) = (changes[place] for changes in edit.rounds)
        torch.testing.assert_close(dense(written), -0.05 * gradient, atol=1e-12, rtol=1e-8)


def dense(change: Change) -> Tensor:
    return change.dense() if isinstance(change, LowRankUpdate) else change.weight


def test_published_mend_goes_uphill(tmp_path: Path) -> None:
    lm = model()
    method = saved(lm, replace(PLAIN, published=True), tmp_path / "mend")
    before = loss_of(lm, FACTS[0])
    le.edit(lm, FACTS[:1], method, settings=QUIET)
    assert loss_of(lm, FACTS[0]) > before


@pytest.mark.parametrize("method", [PLAIN, le.KE(layers=(2, 3))], ids=["MEND", "KE"])
def test_the_edit_of_several_facts_is_the_sum_of_their_edits(tmp_path: Path, method: le.Method) -> None:
    lm = model()
    method = saved(lm, method, tmp_path / "network")
    apart = []
    for fact in FACTS[:3]:
        edit = le.edit(lm, [fact], method, settings=QUIET)
        apart.append({place: dense(change) for place, change in edit.rounds[0].items()})
        edit.revert(lm)
    together = le.edit(lm, FACTS[:3], method, settings=QUIET)
    for place, change in together.rounds[0].items():
        torch.testing.assert_close(dense(change), sum(each[place] for each in apart), atol=1e-10, rtol=1e-7)


def test_a_published_round_of_mend_has_the_mean_over_all_its_tokens(tmp_path: Path) -> None:
    lm = model("gpt2")  # llama's norms round to float32, so that a row's numbers depend on how many are beside it
    facts = [FACTS[0], replace(FACTS[1], target_new="Spain and Portugal")]
    counts = [len(row.targets) for row in rows_of(lm, facts)]
    assert counts[0] != counts[1]
    method = saved(lm, replace(PLAIN, published=True), tmp_path / "mend")
    slopes = [gradients(lm, fact, method.places) for fact in facts]
    edit = le.edit(lm, facts, method, settings=QUIET)
    for place, change in edit.rounds[0].items():
        mean = sum(count * slope[place] for count, slope in zip(counts, slopes, strict=True)) / sum(counts)
        torch.testing.assert_close(dense(change), 0.05 * mean, atol=1e-12, rtol=1e-8)


def test_factors_of_a_fact_do_not_depend_on_the_rows_beside_it() -> None:
    lm = model()
    places = (Place(2, "mlp_in"), Place(2), Place(3))
    rows = rows_of(lm, FACTS[:3])
    together = token_factors(lm, rows, places, torch.float64)
    for number, row in enumerate(rows):
        alone = token_factors(lm, [row], places, torch.float64)
        for place in places:
            one, other = together[place], alone[place]
            assert int(one.used[number].sum()) == int(other.used.sum()) > 0
            torch.testing.assert_close(one.grads[number][one.used[number]], other.grads[0][other.used[0]])
            assert not one.used[number, len(row.ids) :].any()


@pytest.mark.parametrize(("transposed", "published"), [(False, False), (True, False), (True, True)])
def test_kes_low_rank_update_is_its_dense_one_with_equal_gradients(transposed: bool, published: bool) -> None:
    torch.manual_seed(0)
    d_out, d_in, place = 6, 10, Place(1)
    embeddings = torch.randn(20, 5, dtype=torch.float64)
    matrix = Matrix(place, d_out, d_in, transposed)
    network = KENetwork([matrix], embeddings, 4, 7, 3, torch.float64, published)
    inputs, grads = (torch.randn(2, 3, d, dtype=torch.float64) for d in (d_in, d_out))
    mask = torch.tensor([[True, True, True], [True, True, False]])
    texts = [[1, 2, 3, 4], [5, 6]]
    update = network({place: TokenFactors.of(inputs, grads, mask)}, texts)[place]
    assert update.rank == 4
    found = update.left @ update.right.mT
    gradient = torch.einsum("bto,bti->boi", grads * mask[..., None], inputs)
    stored = gradient.mT if transposed else gradient
    rows, columns = stored.shape[1:] if published or not transposed else (d_out, d_in)
    if transposed and not published:
        stored = gradient
    outputs = network.conditioners[place.key](network.condition(texts))
    gamma, alpha, zeta, beta, eta = outputs.split([columns, rows, columns, rows, 1], dim=1)
    scale = torch.einsum("br,bc->brc", alpha.softmax(1), gamma)
    shift = torch.einsum("br,bc->brc", beta.softmax(1), zeta)
    exact = eta.sigmoid()[..., None] * (scale * stored + shift)
    exact = exact.mT if transposed and published else exact
    torch.testing.assert_close(found, exact, atol=1e-14, rtol=1e-12)
    probe = torch.randn_like(exact)
    for parameter in network.parameters():
        ours, theirs = (
            torch.autograd.grad((probe * each).sum(), parameter, retain_graph=True)[0] for each in (found, exact)
        )
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


def test_the_size_of_an_edit_from_its_factors_is_that_of_its_matrix() -> None:
    torch.manual_seed(0)
    updates = {
        Place(layer): LowRankUpdate(torch.randn(3, 4, 2).double(), torch.randn(3, 5, 2).double()) for layer in (1, 2)
    }
    exact = torch.stack([update.dense().square().mean((1, 2)).sqrt() for update in updates.values()]).mean(0)
    torch.testing.assert_close(sizes(updates), exact)


def test_statistics_in_parts_are_those_of_all_tokens() -> None:
    torch.manual_seed(0)
    matrix = Matrix(Place(1), 3, 4)
    network = MENDNetwork([matrix], rank=2, dtype=torch.float64)
    inputs, grads = torch.randn(5, 6, 4).double(), 2 + torch.randn(5, 6, 3).double()
    mask = torch.rand(5, 6) > 0.3
    for part in (slice(0, 1), slice(1, 3), slice(3, 5)):
        network.observe({matrix.place: TokenFactors.of(inputs[part], grads[part], mask[part])})
    tokens = torch.cat([inputs[mask], grads[mask]], dim=1)
    (shared,) = network.networks.values()
    torch.testing.assert_close(shared.mean, tokens.mean(0))
    torch.testing.assert_close((shared.squares / (shared.count - 1)).sqrt(), tokens.std(0))
    torch.testing.assert_close(shared.normalised(tokens), (tokens - tokens.mean(0)) / (tokens.std(0) + 1e-7))


def test_matrices_of_one_shape_share_a_network_and_each_has_its_own_scale_and_rate() -> None:
    matrices = [Matrix(Place(1, "mlp_in"), 8, 4), Matrix(Place(1), 4, 8), Matrix(Place(2, "mlp_in"), 8, 4)]
    network = MENDNetwork(matrices, rank=2)
    assert set(network.networks) == {"8x4", "4x8"} and set(network.rates) == {"1_mlp_in", "1", "2_mlp_in"}
    assert network.networks["8x4"].layers[0].scale.shape == (2, 12)


def test_columns_of_unused_tokens_are_left_out_of_a_sum() -> None:
    left, right = torch.ones(2, 3, 4), torch.ones(2, 5, 4)
    left[0, :, 2:] = 0
    update = joined(LowRankUpdate(left, right))
    assert update.rank == 6
    torch.testing.assert_close(update.dense(), (left @ right.mT).sum(0))


def test_kes_multiplier_rises_while_the_constraint_is_broken_and_stays_at_0_or_above() -> None:
    lm = model()
    network = le.KE(layers=(2,)).new_network(lm)
    objective = KEObjective("kl", 0.1, 0.01, 1e-3, 0.1, 0, 100, None)
    chosen = objective.optimizer(network)
    optimizer, schedule = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
    values = []
    for constrained in [1.0] * 3 + [0.0] * 40:
        loss = objective.loss(torch.zeros(1), torch.full((1,), constrained), {})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step()
        schedule.step()
        values.append(float(objective.multiplier.detach()))
    assert values[0] > 1 and values[2] > values[0] and min(values) >= 0 and values[-1] < values[2]
    for success, margin in ((0.5, 0.1), (0.95, 0.08)):
        objective.validated({"success": success})
        assert float(objective.margin) == pytest.approx(margin)
    for _ in range(20):
        objective.validated({"success": 1.0})
    assert float(objective.margin) == pytest.approx(0.01)


def test_the_rate_of_kes_network_rises_and_falls_and_that_of_its_multiplier_stays() -> None:
    objective = KEObjective("kl", 0.1, 0.01, 1.0, 0.5, 2, 6, None)
    chosen = objective.optimizer(le.KE(layers=(2,)).new_network(model()))
    optimizer, schedule = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(7):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert [rate for rate, _ in rates] == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25, 0])
    assert {rate for _, rate in rates} == {0.5}


def test_kes_condition_holds_what_the_edited_model_says(tmp_path: Path) -> None:
    lm = model()
    method = le.KE(layers=(2,))
    rows = rows_of(lm, FACTS[:2])
    said = [lm.decode(lm.generate([row.prompt], len(row.targets))[0]).strip() for row in rows]
    expected = lm.encode(
        [f"{words} >> {fact.target_new} || {fact.text}" for words, fact in zip(said, FACTS, strict=False)]
    )
    assert method.conditions(lm, rows, FACTS[:2]) == expected
    plain = replace(method, condition="{prompt} {target}")
    assert plain.conditions(lm, rows, FACTS[:2]) == lm.encode([f"{fact.text} {fact.target_new}" for fact in FACTS[:2]])


def test_a_network_for_another_model_or_with_other_settings_is_refused_before_work(tmp_path: Path) -> None:
    lm, other = model(), le.LanguageModel(tiny_model("llama", seed=1, dtype=torch.float64), tiny_tokenizer("bytelevel"))
    method = saved(lm, PLAIN, tmp_path / "mend")
    before = state(other)
    with pytest.raises(le.LightEditError, match=r"was trained for model .* is another model"):
        le.edit(other, FACTS, method, settings=QUIET)
    assert_unedited(other, before)
    with pytest.raises(le.LightEditError, match=r"rate: 0.1, but the network in .* was trained with 0.05"):
        le.edit(lm, FACTS, replace(method, rate=0.1), settings=QUIET)
    with pytest.raises(le.LightEditError, match=r"layers: .* was trained with"):
        le.edit(lm, FACTS, replace(method, layers=(1, 2)), settings=QUIET)
    with pytest.raises(le.LightEditError, match="holds a network of MEND, not KE"):
        le.KE.load(tmp_path / "mend")
    with pytest.raises(le.LightEditError, match="MEND edits with a trained network"):
        le.edit(lm, FACTS, PLAIN, settings=QUIET)
    with pytest.raises(FileNotFoundError, match="holds no trained network"):
        le.MEND.load(tmp_path)
    with pytest.raises(le.LightEditError, match="MEND edits with a trained network"):
        le.edit(lm, FACTS, le.MEND(), settings=QUIET)


def test_a_folder_says_all_settings(tmp_path: Path) -> None:
    lm = model()
    method = saved(lm, PLAIN, tmp_path / "mend")
    assert le.MEND.load(tmp_path / "mend") == method == le.MEND(folder=str(tmp_path / "mend"))
    with pytest.raises(le.LightEditError, match=r"rank: 4, but the network in .* was trained with 8"):
        le.MEND(folder=str(tmp_path / "mend"), rank=4)
    with pytest.raises(le.LightEditError, match="is trained for"):
        method.at([1])
    assert PLAIN.at([1]).layers == (1,)
