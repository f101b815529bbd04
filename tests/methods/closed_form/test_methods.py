"""What the methods' closed forms have in common, in float64, and how they behave in rounds."""

from dataclasses import asdict, replace

import pytest
import torch
from lightning import Trainer
from torch import Tensor

import lightedit as le
from lightedit.data.modules import FactsDataModule
from lightedit.data.prompts import Contexts, ContextSettings, tokenize_facts
from lightedit.lm import Place
from lightedit.methods import METHODS
from lightedit.methods.closed_form.method import ClosedForm
from lightedit.methods.closed_form.preservation import Preservation, low_rank_update
from lightedit.methods.closed_form.stopping import Evaluated
from lightedit.methods.closed_form.values import ValueOptimization
from lightedit.statistics.covariance import Covariance, CovarianceError, Provenance
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import run

D_IN, D_OUT, B = 48, 20, 7
BARE = ContextSettings(prefixes=())


def matrix(seed: int = 0, d: int = D_IN) -> Tensor:
    keys = torch.randn(d, 6 * d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return keys @ keys.T / (6 * d)


def problem(seed: int = 1, facts: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(D_IN, facts, dtype=torch.float64, generator=generator),
        torch.randn(D_OUT, facts, dtype=torch.float64, generator=generator),
    )


def covariance(moment: Tensor) -> Covariance:
    return Covariance({Place(0): moment}, Provenance("tiny", None, "test", 10**6, None, "float64"))


def change(method: le.Method, keys: Tensor, residuals: Tensor, past: Tensor | None = None) -> Tensor:
    preservation = method.preservation(covariance(matrix()), Place(0))
    if past is not None:
        preservation.remember(past)
    return low_rank_update(preservation, keys, residuals, method.gamma(keys.shape[1])).dense()


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("mu", "lambda_"), [(0.1, 1000.0), (3.0, 0.5), (1.0, 7.0)])
def test_emmet_equals_memit_of_the_product(mu: float, lambda_: float) -> None:
    keys, residuals = problem()
    assert_relative(
        change(le.EMMET(layers=0, lambda_=lambda_, mu=mu), keys, residuals),
        change(le.MEMIT(layers=0, lambda_=mu * lambda_), keys, residuals),
    )


@pytest.mark.parametrize("mu", [0.0, 0.1])
def test_rome_is_emmet_of_one_fact(mu: float) -> None:
    keys, residuals = problem(facts=1)
    rome = change(le.ROME(layers=0), keys, residuals)
    assert_relative(change(le.EMMET(layers=0, lambda_=3.0, mu=mu), keys, residuals), rome)
    assert_relative(rome @ keys, residuals)


def test_emmet_writes_every_residual_exactly() -> None:
    keys, residuals = problem()
    assert_relative(change(le.EMMET(layers=0), keys, residuals) @ keys, residuals)


@pytest.mark.parametrize("relative", [False, True])
def test_alphaedit_equals_the_published_system(relative: bool) -> None:
    keys, residuals = problem()
    past, _ = problem(seed=2, facts=5)
    values, vectors = torch.linalg.eigh(matrix())
    threshold = float(values[D_IN // 2 - 1 : D_IN // 2 + 1].mean())  # no eigenvalue, which rounding could move past it
    share = threshold / float(values[-1])
    method = le.AlphaEdit(layers=0, threshold=share if relative else threshold, relative=relative, ridge=2.5)
    null = vectors[:, values < threshold]
    p = null @ null.T
    system = p @ (keys @ keys.T + past @ past.T) + 2.5 * torch.eye(D_IN, dtype=torch.float64)
    published = torch.linalg.solve(system, p @ keys @ residuals.T).T
    found = change(method, keys, residuals, past)
    assert_relative(found, published)
    assert (found @ vectors[:, values >= threshold]).norm() < 1e-12 * found.norm()  # preserved keys see nothing


def test_alphaedit_names_the_eigenvalues_when_none_is_small() -> None:
    with pytest.raises(ValueError, match="no eigenvalue of the covariance is below 1e-09: they go from"):
        le.AlphaEdit(layers=0, threshold=1e-9).preservation(covariance(matrix()), Place(0))


def test_encore_equals_its_dense_form() -> None:
    keys, residuals = problem()
    past, _ = problem(seed=2, facts=5)
    dense = 3.0 * matrix() + 0.7 * torch.eye(D_IN, dtype=torch.float64) + past @ past.T + keys @ keys.T
    expected = torch.linalg.solve(dense, keys @ residuals.T).T
    assert_relative(change(le.ENCORE(layers=0, lambda_=3.0, norm_weight=0.7), keys, residuals, past), expected)


@pytest.mark.parametrize("split", [[30], [1] * 30, [10, 20], [20, 10], [5, 17, 3, 5]])
def test_history_in_any_split_equals_one_stacked_solve(split: list[int]) -> None:
    # 30 keys of a matrix of 48 pass the point where past keys are folded into the factor
    keys, values = problem(facts=30)
    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    method = le.ENCORE(layers=0, lambda_=2.0, norm_weight=0.1)
    stacked = weight + change(method, keys, values - weight @ keys)
    preservation = method.preservation(covariance(matrix()), Place(0))
    present = weight.clone()
    for k, v in zip(keys.split(split, dim=1), values.split(split, dim=1), strict=True):
        present += low_rank_update(preservation, k, v - present @ k, 1.0).dense()
        preservation.remember(k)
    assert_relative(present, stacked)


def test_past_keys_are_folded_so_that_a_round_does_not_grow() -> None:
    preservation = Preservation(matrix())
    sizes = []
    for seed in range(40):
        preservation.remember(problem(seed, facts=3)[0])
        sizes.append(preservation._past.shape[1])
    assert max(sizes) <= D_IN // 3
    keys, _ = problem()
    past = torch.cat([problem(seed, facts=3)[0] for seed in range(40)], dim=1)
    assert_relative(preservation.solve(keys), torch.linalg.solve(matrix() + past @ past.T, keys))


def test_pmet_spreads_by_square_roots() -> None:
    method = le.PMET(layers=[3, 4, 5, 6])
    assert [method.spread(layer) for layer in (3, 4, 5, 6)] == [0.25**0.5, (1 / 3) ** 0.5, 0.5**0.5, 1.0]
    assert replace(method, even_spread=True).spread(3) == 0.25
    assert (method.site, replace(method, attention_delta=False).site) == ("attention+mlp", "mlp")


# Stopping rules


def evaluated(right: list[list[int]], tokens: list[list[int]], kl: float = 1.0, times: int = 0) -> Evaluated:
    count = len(right)
    return Evaluated(torch.full((count,), kl), torch.tensor(right), torch.tensor(tokens), torch.full((count,), times))


def test_most_probable_asks_for_every_token_in_every_context() -> None:
    step = evaluated([[2, 2, 2], [1, 2, 2], [2, 2, 1]], [[2, 2, 2]] * 3)
    assert le.MostProbable().reached(step).tolist() == [True, False, False]


def test_published_most_probable_counts_tokens_and_leaves_out_the_bare_prompt() -> None:
    rule = le.MostProbable(published=True)
    # one wrong context of two tokens, but as many right tokens as contexts; all right, but too many tokens; bare wrong
    step = evaluated([[2, 2, 0], [2, 2, 2], [0, 1, 1]], [[2, 2, 2], [2, 2, 2], [1, 1, 1]])
    assert rule.reached(step).tolist() == [True, False, True]


@pytest.mark.parametrize("extra_steps", [0, 1, 3])
def test_most_probable_takes_so_many_more_steps(extra_steps: int) -> None:
    rule = le.MostProbable(extra_steps)
    done = [bool(rule.done(evaluated([[1]], [[1]], times=times))) for times in range(1, 6)]
    assert done == [times > extra_steps for times in range(1, 6)]


def test_kl_below_lowers_the_nll_while_the_target_leads() -> None:
    rule = le.KLBelow(max_kl=0.01, nll_factor_after=0.1)
    step = evaluated([[1, 1], [1, 0]], [[1, 1], [1, 1]], kl=0.005)
    assert rule.done(step).tolist() == [True, False]
    assert rule.nll_factor(step).tolist() == pytest.approx([0.1, 1.0])
    assert not rule.done(evaluated([[1, 1]], [[1, 1]], kl=0.02)).any()


# On models

FACTS = [
    le.Fact("The mother tongue of {} is", "Danielle Darrieux", "English", target_true="French"),
    le.Fact("{} plays the", "Toko Yasuda", "piano", target_true="guitar"),
    le.Fact("The capital of {} is", "Peru", "Oslo", target_true="Lima"),
    le.Fact("{} was born in", "Ada", "Rome", target_true="London"),
]


def language_model(architecture: str = "llama") -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, dtype=torch.float64), tiny_tokenizer("bytelevel"))


def estimated(lm: le.LanguageModel, layers: tuple[int, ...]) -> Covariance:
    moments = {Place(layer): matrix(layer, lm.weight(Place(layer)).shape[1]).float() for layer in layers}
    return Covariance(moments, Provenance(lm.name, lm.fingerprint, "test", 10**6, None, "float64"))


def make(name: str, layers: tuple[int, ...]) -> le.Method:
    settings = {"threshold": 0.5, "relative": True} if name == "AlphaEdit" else {}
    method = METHODS[name](layers=layers, contexts=BARE, **settings)
    return replace(method, values=replace(method.values, steps=4))


@pytest.mark.parametrize("layers", [(2,), (1, 2)])
@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if issubclass(kind, ClosedForm)])
def test_every_method_edits_in_rounds_and_reverts(name: str, layers: tuple[int, ...]) -> None:
    lm = language_model()
    method = make(name, layers)
    before = {layer: lm.weight(Place(layer)).clone() for layer in layers}
    size = method.facts_per_solve or 2
    edit = run(lm, FACTS, method, covariance=estimated(lm, layers), facts_per_round=size)
    assert [sorted(updates) for updates in edit.rounds] == [list(map(Place, layers))] * (4 // size)
    assert all(update.norm() > 0 for updates in edit.rounds for update in updates.values())
    assert edit.record.method["name"] == name
    edit.revert(lm)
    assert all(lm.weight(Place(layer)).equal(weight) for layer, weight in before.items())


@pytest.mark.parametrize("name", ["AlphaEdit", "ENCORE"])
def test_rounds_remember_the_keys_they_wrote(name: str) -> None:
    class Looking(le.EditModule):
        def teardown(self, stage: str) -> None:
            self.last = self.editor.preservation
            super().teardown(stage)

    lm = language_model()
    method = make(name, (1, 2))
    module = Looking(lm, method, covariance=estimated(lm, (1, 2)))
    fit(module, facts_per_round=2)
    assert not module.editor.preservation  # a fit that is over does not hold on to them
    keys = module.editor.round_keys[Place(2)]
    assert keys.shape == (lm.weight(Place(2)).shape[1], 2)
    # a change that later rounds would make at a remembered key is smaller than without memory
    fresh = method.preservation(module.covariance, Place(2))
    assert (keys.T @ module.last[Place(2)].solve(keys)).trace() < (keys.T @ fresh.solve(keys)).trace()


def fit(module: le.EditModule, facts_per_round: int, facts: list[le.Fact] = FACTS) -> None:
    data = FactsDataModule(facts, facts_per_round)
    Trainer(
        accelerator="cpu",
        max_epochs=len(data.rounds),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(module, datamodule=data)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom", "falcon", "gemma2"])
def test_joint_values_follow_plain_hooks(architecture: str) -> None:
    """The loss of δ at attention and MLP output, and its gradient, against full forward passes with hooks."""
    lm = le.LanguageModel(tiny_model(architecture), tiny_tokenizer("bytelevel"))
    prompts = tokenize_facts(lm.tokenizer, FACTS[:2], Contexts(("{}", "So it is. {}"), (0.5, 0.5)))
    settings = le.ValueSettings(kl_factor=0.3, loss_threshold=0.0)
    search = ValueOptimization(lm, prompts, 1, "attention+mlp", settings)
    first = search.backward().clone()
    with torch.no_grad():
        search.delta.copy_(torch.randn(search.delta.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    losses = search.backward()
    gradient = search.delta.grad
    assert gradient is not None and (losses - first).abs().min() > 1e-4
    for index, fact in enumerate(prompts):
        delta = search.delta[index].detach().clone().requires_grad_()
        loss = plain_joint_loss(lm, fact, delta, settings)
        loss.backward()
        assert delta.grad is not None
        torch.testing.assert_close(losses[index], loss.detach(), rtol=1e-4, atol=1e-5)
        assert_relative(gradient[index], delta.grad, 2e-4)


def plain_joint_loss(lm: le.LanguageModel, fact, delta: Tensor, settings: le.ValueSettings) -> Tensor:
    modules = (lm.module(Place(1, "attention_out")), lm.module(Place(1)))
    initial: list[Tensor] = []

    def logits_of(ids: list[int], lookup: int, shifts: tuple[Tensor, ...] | None) -> Tensor:
        handles = []
        for number, module in enumerate(modules):

            def hook(_, __, output, number=number):
                flat = output.reshape(-1, output.shape[-1])
                if shifts is None:
                    initial.append(flat[lookup].detach().clone())
                    return None
                one = torch.zeros(len(flat), 1)
                one[lookup] = 1.0
                return (flat + one * shifts[number]).view_as(output)

            handles.append(module.register_forward_hook(hook))
        try:
            return lm.model(input_ids=torch.tensor([ids])).logits[0]
        finally:
            for handle in handles:
                handle.remove()

    bare = fact.rows[0]
    with torch.no_grad():
        logits_of(bare.ids, bare.lookup, None)
        norms = [vector.norm() for vector in initial[:2]]
        reference = lm.model(input_ids=torch.tensor([fact.subject.ids])).logits[0, fact.subject.lookup].log_softmax(-1)
    parts = delta.chunk(2)
    loss = settings.weight_decay * sum(part.norm() / norm**2 for part, norm in zip(parts, norms, strict=True))
    for row in fact.rows:
        log_p = logits_of(row.ids, row.lookup, parts).log_softmax(-1)[-len(row.targets) :]
        loss = loss - log_p[range(len(row.targets)), row.targets].mean() / len(fact.rows)
    log_p = logits_of(fact.subject.ids, fact.subject.lookup, parts)[fact.subject.lookup].log_softmax(-1)
    return loss + settings.kl_factor * (log_p.exp() * (log_p - reference)).sum()


def test_merged_facts_share_one_key_and_serve_both_texts() -> None:
    lm = language_model()
    two = [
        le.Fact("The mother tongue of {} is", "Danielle Darrieux", "English"),
        le.Fact("The mother tongue of this {} is", "Danielle Darrieux", "English"),
        FACTS[2],
    ]
    method = le.MEMIT(layers=[1], lambda_=0.01, contexts=BARE, values=le.ValueSettings(steps=3))
    settings = le.RunSettings(on_collision="merge", collision_similarity=-1.0)
    module = le.EditModule(lm, method, covariance=estimated(lm, (1,)), settings=settings)
    fit(module, facts_per_round=3, facts=two)
    assert module.edit is not None
    assert (
        module.editor.round_keys[Place(1)].shape[1] == 1
    )  # every two keys have a cosine of at least -1, so all are one
    assert module.edit.facts_in_round == [3]
    keys = [prompt for prompt in module.editor.prompts if prompt is not None]
    assert len(keys) == 1 and keys[0].bare == (0, 1, 2) and sum(keys[0].key_weights) == pytest.approx(1)


def test_settings_are_recorded() -> None:
    method = le.ENCORE(layers=[1])
    assert method.to_dict()["values"]["stopping"] == {"name": "MostProbable", **asdict(le.MostProbable())}


def test_eigendecomposition_is_kept_beside_the_covariance(tmp_path) -> None:
    moment = matrix().float()
    saved = Covariance({Place(0): moment}, Provenance("tiny", None, "test", 10**6, None, "float32"))
    saved.save(tmp_path)
    values, vectors = Covariance.load(tmp_path).eigen(Place(0))
    again = Covariance.load(tmp_path)
    file = tmp_path / "eigen.0.safetensors"
    stamp = file.stat().st_mtime_ns
    assert (
        again.eigen(Place(0))[0].equal(values)
        and again.eigen(Place(0))[1].equal(vectors)
        and file.stat().st_mtime_ns == stamp
    )
    torch.testing.assert_close(vectors @ values.diag() @ vectors.T, moment.double())
    Covariance({Place(0): 2 * moment}, saved.provenance).save(tmp_path)  # another moment: the kept one is of no use
    torch.testing.assert_close(Covariance.load(tmp_path).eigen(Place(0))[0], 2 * values)
    file.write_bytes(b"damaged")
    torch.testing.assert_close(Covariance.load(tmp_path).eigen(Place(0))[0], 2 * values)


def test_a_part_of_a_covariance_on_another_device_shares_its_eigendecompositions() -> None:
    whole = covariance(matrix())
    assert whole.on(torch.device("meta"), Place(0))[Place(0)].device.type == "meta"
    there = whole.on(torch.device("cpu"), Place(0))
    assert there.provenance is whole.provenance
    assert there.eigen(Place(0))[0] is whole.eigen(Place(0))[0]
    with pytest.raises(CovarianceError, match="no layer 1"):
        whole.on(torch.device("cpu"), Place(1))


@pytest.mark.cuda
@pytest.mark.parametrize("method", [le.MEMIT(layers=0), le.AlphaEdit(layers=0, threshold=0.5, relative=True)])
def test_what_is_factored_on_a_gpu_solves_as_on_the_cpu(method: le.Method) -> None:
    keys, _ = problem()
    here = method.preservation(covariance(matrix()), Place(0))
    there = method.preservation(covariance(matrix()).on(torch.device("cuda"), Place(0)), Place(0))
    assert_relative(there.solve(keys.cuda()).cpu(), here.solve(keys))


@pytest.mark.parametrize("past", [3, 40])
def test_a_diagonal_preservation_term_equals_its_dense_form(past: int) -> None:
    """40 keys of a matrix of 48 are folded into the factor."""
    keys, _ = problem()
    more, _ = problem(seed=2, facts=past)
    diagonal = torch.rand(D_IN, dtype=torch.float64) + 0.5
    sparse, dense = Preservation(diagonal), Preservation(diagonal.diag())
    for _ in range(2):
        assert_relative(sparse.solve(keys), dense.solve(keys))
        for preservation in (sparse, dense):
            preservation.remember(more)
    assert_relative(sparse.solve(keys), dense.solve(keys))
    with pytest.raises(ValueError, match="not positive definite"):
        Preservation(diagonal - 2)


def test_an_eigendecomposition_that_cannot_be_kept_serves_this_run(tmp_path) -> None:
    covariance(matrix()).save(tmp_path)
    loaded = Covariance.load(tmp_path)
    (tmp_path / "covariance.safetensors").unlink()
    tmp_path.rmdir()
    with pytest.warns(UserWarning, match=r"could not be kept in .*eigen\.0\.safetensors.*computes it again"):
        values, _ = loaded.eigen(Place(0))
    assert loaded.eigen(Place(0))[0] is values
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix().float().double()))
