"""Training hyper-networks: what the loss is, that facts are learned, and that a stopped training goes on."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Trainer

import lightedit as le
from lightedit.lm.batch import pad
from lightedit.lm.changes import LowRankUpdate
from lightedit.methods.hypernetworks.examples import Draws, EditorDataModule, draw, examples_of
from lightedit.methods.hypernetworks.module import HyperNetworkModule
from lightedit.methods.hypernetworks.objectives import KEObjective, MENDObjective
from lightedit.runs.trainer import own_trainer
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS, assert_unedited, state

MEND = le.MEND(layers=(2, 3), rank=16, lr=3e-3, rate_lr=1e-3, edit_weight=1.0)
KE = le.KE(layers=(2, 3), hidden=8, width=16, middle=8, lr=3e-3, warmup=2, margin=0.5)
BOTH = pytest.mark.parametrize("method", [MEND, KE], ids=["MEND", "KE"])
QUIET = le.EditorTrainingSettings(steps=6, batch_size=2, validate_every=2, validation=1, progress_bar=False)
LANDS = ("France", "Spain", "Italy", "Peru", "Old London", "New York", "Rome", "Berlin", "Tokyo", "Vienna")


def model(dtype: torch.dtype = torch.float32) -> le.LanguageModel:
    return le.LanguageModel(tiny_model("llama", dtype=dtype), tiny_tokenizer("bytelevel"))


def facts(count: int) -> list[le.Fact]:
    answers = ("Rome", "Paris", "a king", "music")
    return [
        le.Fact(
            "The capital of {}",
            land,
            answers[number % len(answers)],
            target_true="the sea",
            paraphrase_prompts=(f"{land} has its capital in", f"The king of {land} lives in"),
            neighborhood_prompts=(f"The river of {land} is", f"{land} lies by"),
        )
        for number, land in enumerate(LANDS[:count])
    ]


def fitted(
    lm: le.LanguageModel,
    method: le.Method,
    settings: le.EditorTrainingSettings = QUIET,
    chosen: list[le.Fact] | None = None,
) -> HyperNetworkModule:
    """A module that a trainer has begun with, without a step."""
    module = HyperNetworkModule(lm, method, settings.steps)
    data = EditorDataModule(examples_of(lm, chosen or facts(4)), settings)
    trainer = own_trainer(inference_mode=False, logger=False, enable_checkpointing=False)
    trainer.validate(module, datamodule=data, verbose=False)
    return module


@BOTH
def test_the_loss_is_that_of_each_edit_written_into_the_model(tmp_path: Path, method: le.Method) -> None:
    lm = model(torch.float64)
    module = fitted(lm, method)
    batch = module.data().draws.step(1)
    _, figures = module.losses(batch)
    weights = module.network.state_dict()
    for number, drawn in enumerate(batch):
        before = lm.forward(pad([drawn.locality[0]], lm.pad_id))[0].log_softmax(-1)
        factors = module.factors([drawn.example.own])
        texts = method.conditions(lm, [drawn.example.own], [drawn.example.fact])
        for place, update in module.network.eval()(factors, texts).items():
            lm.weights.add(("alone", 0), place, LowRankUpdate(update.left[0], update.right[0]))
        rows = [drawn.example.own, drawn.rephrasing] if isinstance(method, le.KE) else [drawn.rephrasing]
        losses = []
        for row in rows:
            log_p = lm.forward(pad([row.ids], lm.pad_id))[0, -len(row.targets) :].log_softmax(-1)
            losses.append(-log_p[range(len(row.targets)), row.targets].mean())
        after = lm.forward(pad([drawn.locality[0]], lm.pad_id))[0].log_softmax(-1)
        lm.weights.remove([("alone", 0)])
        kl = (before.exp() * (before - after)).sum(-1).mean()
        torch.testing.assert_close(figures["answer_loss"][number], torch.stack(losses).mean(), atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(figures["locality_loss"][number], kl, atol=1e-9, rtol=1e-7)
    assert all(torch.equal(value, module.network.state_dict()[name]) for name, value in weights.items())


def test_the_gradient_of_a_step_is_that_of_dense_changes() -> None:
    lm = model(torch.float64)
    module = fitted(lm, replace(MEND, rate=0.01))
    module.network.eval()
    torch.manual_seed(0)
    for name, parameter in module.network.named_parameters():
        if name.endswith(".u"):
            parameter.data.normal_(std=0.1)  # at 0, it hides the gradient of v
    batch = module.data().draws.step(0)
    loss, _ = module.losses(batch)
    parameters = list(module.network.parameters())
    ours = torch.autograd.grad(loss, parameters)
    exact = [torch.zeros_like(parameter) for parameter in parameters]
    for drawn in batch:
        updates = module.network(module.factors([drawn.example.own]))
        replaced = {
            f"{lm.module_name(place)}.weight": lm.weight(place) + update.left[0] @ update.right[0].T
            for place, update in updates.items()
        }

        def log_probs(ids: list[int], weights: dict[str, torch.Tensor]) -> torch.Tensor:
            inputs = {"input_ids": torch.tensor([ids]), "use_cache": False}
            return torch.func.functional_call(lm.model, weights, (), inputs).logits[0].log_softmax(-1)

        row, (text,) = drawn.rephrasing, drawn.locality
        answers = log_probs(row.ids, replaced)[-len(row.targets) :]
        before, after = log_probs(text, {}), log_probs(text, replaced)
        nll = -answers[range(len(row.targets)), row.targets].mean()
        total = nll + (before.exp() * (before - after)).sum(-1).mean()
        for sums, grad in zip(exact, torch.autograd.grad(total / len(batch), parameters), strict=True):
            sums += grad
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "steps", "success", "share"),
    [
        (MEND, 100, 0.75, 0.2),
        # KE's two directions a matrix need hundreds of steps; here it must be well on the way
        (replace(KE, lr=0.03, multiplier_lr=1e-3, margin=5.0, hidden=16, width=32, middle=16), 60, 0.0, 0.6),
    ],
    ids=["MEND", "KE"],
)
def test_a_network_learns_eight_facts_by_heart(method: le.Method, steps: int, success: float, share: float) -> None:
    lm = model()
    before = state(lm)
    settings = replace(QUIET, steps=steps, batch_size=8, validate_every=steps)
    module = HyperNetworkModule(lm, method, steps)
    data = EditorDataModule(examples_of(lm, facts(9)), settings)
    data.validation = data.training
    trainer = own_trainer(max_epochs=1, inference_mode=False, logger=False, enable_checkpointing=False,
                          num_sanity_val_steps=0)  # fmt: skip
    trainer.validate(module, datamodule=data, verbose=False)
    start = module.validation
    trainer.fit(module, datamodule=data)
    assert_unedited(lm, before)
    assert start["success"] == 0 and module.validation["success"] >= success
    assert module.validation["answer_loss"] < share * start["answer_loss"]


class Stopped(Exception):
    pass


@BOTH
@pytest.mark.parametrize("steps", [2, 5])
def test_a_stopped_training_goes_on_to_the_same_bits(
    tmp_path: Path, method: le.Method, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = le.train_editor(model(), facts(5), method, tmp_path / "whole", settings=QUIET)
    step = HyperNetworkModule.training_step
    taken = []

    def failing(self: HyperNetworkModule, batch: object, batch_idx: int) -> torch.Tensor:
        taken.append(self.global_step)
        if self.global_step == steps and len(taken) == steps + 1:
            raise Stopped
        return step(self, batch, batch_idx)

    monkeypatch.setattr(HyperNetworkModule, "training_step", failing)
    with pytest.raises(Stopped):
        le.train_editor(model(), facts(5), method, tmp_path / "parts", settings=QUIET)
    assert not (tmp_path / "parts").exists()
    parts = le.train_editor(model(), facts(5), method, tmp_path / "parts", settings=QUIET)
    assert taken[steps + 1] == steps // 2 * 2  # the validation before the stop
    ours, other = (trained.network(model()).state_dict() for trained in (whole, parts))
    assert all(torch.equal(value, other[name]) for name, value in ours.items())
    tables = [(tmp_path / name / "validation.csv").read_text() for name in ("whole", "parts")]
    assert tables[0] == tables[1] and len(tables[0].splitlines()) == 5
    assert not list(tmp_path.glob("*.run"))


def test_another_training_in_the_same_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: HyperNetworkModule, batch: object, batch_idx: int) -> torch.Tensor:
        if self.global_step == 2:
            raise Stopped
        return step(self, batch, batch_idx)

    step = HyperNetworkModule.training_step
    monkeypatch.setattr(HyperNetworkModule, "training_step", failing)
    with pytest.raises(Stopped):
        le.train_editor(model(), facts(5), MEND, tmp_path / "network", settings=QUIET)
    with pytest.raises(le.ResumeError, match=r"differs in method.rank \(16 there, 8 now\)"):
        le.train_editor(model(), facts(5), replace(MEND, rank=8), tmp_path / "network", settings=QUIET)


def test_wrong_input_is_refused_before_work(tmp_path: Path) -> None:
    lm = model()
    out = tmp_path / "network"
    with pytest.raises(le.LightEditError, match="layers 0 to 3"):
        le.train_editor(lm, facts(5), MEND.at([9]), out)
    with pytest.raises(le.LightEditError, match="expected KE or MEND, got FT"):
        le.train_editor(lm, facts(5), le.FT(layers=(1,)), out)  # type: ignore[arg-type]
    with pytest.raises(le.FactError, match="1 given"):
        le.train_editor(lm, facts(1), MEND, out)
    with pytest.raises(le.FactError, match="of which validation holds out 5"):
        le.train_editor(lm, facts(5), MEND, out, settings=replace(QUIET, validation=5))
    with pytest.raises(le.LightEditError, match="steps must be at least 1, got 0"):
        replace(QUIET, steps=0)
    tmp_path.joinpath("full").mkdir()
    with pytest.raises(le.LightEditError, match="exists already"):
        le.train_editor(lm, facts(5), MEND, tmp_path / "full")
    edit = le.edit(lm, FACTS[:1], le.FT(layers=(1,), epochs=1), settings=le.RunSettings(progress_bar=False))
    with pytest.raises(le.LightEditError, match="carries edits"):
        le.train_editor(lm, facts(5), MEND, out)
    edit.revert(lm)
    assert not out.exists() and not list(tmp_path.glob("*.run"))


def test_training_ends_without_better_validations_and_saves_the_best_network(tmp_path: Path) -> None:
    settings = replace(QUIET, steps=40, patience=4)
    method = replace(MEND, lr=0.1)  # which ruins the network at its first step
    trained = le.train_editor(model(), facts(5), method, tmp_path / "network", settings=settings)
    rows = (tmp_path / "network" / "validation.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "0", "2", "4"]
    network = trained.network(model())
    assert not any(value.any() for name, value in network.named_parameters() if name.endswith(".u"))


def test_each_fact_comes_once_in_a_turn_and_draws_do_not_depend_on_earlier_ones() -> None:
    lm = model()
    examples = examples_of(lm, facts(6))
    settings = replace(QUIET, batch_size=3)
    draws = Draws(examples, settings)
    steps = [draws.step(number) for number in range(4)]
    for turn in (steps[:2], steps[2:]):
        assert {drawn.example.fact for step in turn for drawn in step} == set(facts(6))
    assert Draws(examples, settings).step(3) == steps[3]
    assert Draws(examples, replace(settings, seed=1)).step(0) != steps[0]


def test_a_fact_without_neighbours_is_held_by_other_prompts_and_without_rephrasings_by_its_own() -> None:
    lm = model()
    examples = examples_of(lm, [replace(fact, paraphrase_prompts=()) for fact in FACTS])
    for index in range(5):
        drawn = draw(examples, index, 3, random.Random(index))
        assert drawn.rephrasing == drawn.example.own and len(drawn.locality) == 3
        others = [example.own.prompt for example in examples if example is not drawn.example]
        assert all(text in others for text in drawn.locality)


def test_learned_rates_move_at_their_own_rate() -> None:
    lm = model()
    module = fitted(lm, replace(MEND, lr=1e-5, rate_lr=0.25))
    optimizer = module.configure_optimizers()["optimizer"]
    start = {name: parameter.detach().clone() for name, parameter in module.network.named_parameters()}
    loss, _ = module.losses(module.data().draws.step(0))
    loss.backward()
    optimizer.step()
    moved = {
        name: float((parameter.detach() - start[name]).abs().max())
        for name, parameter in module.network.named_parameters()
    }
    assert all(value == pytest.approx(0.25, rel=1e-2) for name, value in moved.items() if name.startswith("rates"))
    assert all(value < 1.1e-5 for name, value in moved.items() if not name.startswith("rates"))


def test_gradients_that_are_not_finite_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MENDObjective, "loss", lambda self, answer, locality, updates: (answer * float("inf")).sum())
    with pytest.raises(le.LightEditError, match="step 0: the gradient of the network is NaN or infinite"):
        le.train_editor(model(), facts(5), MEND, tmp_path / "network", settings=QUIET)


def test_the_margin_and_the_multiplier_are_part_of_the_checkpoint() -> None:
    objective = KE.objective(10)
    assert isinstance(objective, KEObjective) and {"margin", "multiplier"} == set(objective.state_dict())
    assert KE.margins == (0.5, 1e-5) and le.KE(layers=(1,), constraint="lp").margins == (1e-3, 1e-7)


def test_a_users_own_trainer_fits_the_module() -> None:
    lm = model()
    module = HyperNetworkModule(lm, MEND, QUIET.steps)
    data = EditorDataModule(examples_of(lm, facts(5)), QUIET)
    trainer = Trainer(
        max_epochs=data.epochs, accelerator="cpu", inference_mode=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 6
    assert module.validation.keys() == {"loss", "answer_loss", "locality_loss", "success", "kept"}
