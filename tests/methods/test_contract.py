"""What every method promises, whatever it is: the same tests for each."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer

import lightedit as le
from lightedit.data.prompts import ContextSettings
from lightedit.lm import Place
from lightedit.lm.batch import pad
from lightedit.lm.changes import DenseUpdate
from lightedit.methods import METHODS
from lightedit.methods.closed_form.method import ClosedForm
from lightedit.runs.folder import kept_rounds
from tests.methods.hypernetworks.trained import ready
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS, LAYERS, QUIET, VALUES, assert_unedited, covariance_of, state
from tests.toy import GradientStep

pytestmark = pytest.mark.filterwarnings("ignore:.*hold \\(the model:UserWarning")
CONTEXTS = ContextSettings(prefixes=(("The", 1, 4),))
APART = replace(CONTEXTS, separate=True)
ALL: dict[str, le.Method] = {
    "ROME": le.ROME(layers=(1,), values=VALUES, contexts=CONTEXTS),
    "MEMIT": le.MEMIT(layers=LAYERS, values=VALUES, contexts=CONTEXTS, lambda_=5.0),
    "EMMET": le.EMMET(layers=LAYERS, values=VALUES, contexts=CONTEXTS, mu=0.1),
    "PMET": le.PMET(layers=LAYERS, values=VALUES, contexts=CONTEXTS, lambda_=5.0),
    "PMET, attention too": le.PMET(layers=LAYERS, values=VALUES, contexts=CONTEXTS, lambda_=5.0, write_attention=True),
    "AlphaEdit": le.AlphaEdit(layers=LAYERS, values=VALUES, contexts=CONTEXTS, threshold=0.9, ridge=1.0),
    "ENCORE": le.ENCORE(layers=LAYERS, values=VALUES, contexts=CONTEXTS, lambda_=5.0, norm_weight=1.0),
    "MEMIT, contexts apart": le.MEMIT(layers=LAYERS, values=VALUES, contexts=APART, share=0.75),
    "AlphaEdit, contexts apart": le.AlphaEdit(layers=LAYERS, values=VALUES, contexts=APART, threshold=0.9, ridge=1.0),
    "FT": le.FT(layers=LAYERS, lr=1e-2, epochs=4),
    "FT, the whole block": le.FT(layers=(1,), lr=1e-2, epochs=2, parts="block"),
    "FT, published": le.FT(layers=(1,), lr=1e-2, epochs=4, norm=0.02, weight_decay=0.1, published=True),
    "EWC": le.EWC(layers=(1,), lr=1e-2, epochs=4, lambda_=50.0),
    "Retrain": le.Retrain(layers=(1,), lr=1e-2, epochs=4, every=3),
    "gradient step": GradientStep(),
    "GRACE": le.GRACE(layer=1, steps=5),
    "GRACE, the whole prompt": le.GRACE(layer=1, part="mlp_in", steps=5, positions="prompt", relative=True, init="adv"),
    "GRACE, published": le.GRACE(layer=1, steps=5, positions="all", published=True, init="warm"),
    "Defer": le.Defer(layer=1, steps=5),
    "Memory": le.Memory(layer=1, steps=5, entries=7),
    "MEND": le.MEND(layers=(2, 3), rank=8, rate=1e-2),
    "MEND, published": le.MEND(layers=(3,), rank=8, norm=False, rate=0.05, published=True),
    "KE": le.KE(layers=(2, 3), hidden=4, width=8, middle=4),
    "KN": le.KN(layers=LAYERS, search=le.NeuronSearch(points=4, threshold=0.05, prompts="prompt")),
}
EVERY = pytest.mark.parametrize("method", list(ALL.values()), ids=list(ALL))
MODELS = pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)], ids=["llama-32", "gpt2-bf16"]
)
ADAPTORS = (le.GRACE, le.Defer, le.Memory)  # they write no weight
QUIETLY = le.RunSettings(progress_bar=False)


def model(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, dtype=dtype), tiny_tokenizer("bytelevel"))


def needs(lm: le.LanguageModel, method: le.Method) -> le.Covariance | None:
    return covariance_of(lm, method.covariance_places) if method.covariance_places else None


def rounds(method: le.Method, size: int = 2) -> int:
    """Facts of one round, or fewer where the method takes no more."""
    return min(size, method.facts_per_solve or size)


def run(
    lm: le.LanguageModel, method: le.Method, facts: list[le.Fact] = FACTS, size: int = 2, **arguments: Any
) -> le.Edit:
    settings = replace(QUIETLY, facts_per_round=rounds(method, size))
    return le.edit(lm, facts, ready(lm, method), covariance=needs(lm, method), settings=settings, **arguments)


def logits(lm: le.LanguageModel) -> torch.Tensor:
    """What the model says after the prompts of the facts, which adaptors change and weights need not."""
    rows = lm.encode([fact.text for fact in FACTS])
    return torch.stack([lm.forward(pad([row], lm.pad_id))[0, -1] for row in rows])


def assert_same_edit(lm: le.LanguageModel, other: le.LanguageModel) -> None:
    assert torch.equal(logits(lm), logits(other))
    for name, parameter in other.model.named_parameters():
        assert torch.equal(parameter, lm.model.get_parameter(name)), name


def test_every_method_of_the_package_is_here() -> None:
    assert {type(method).__name__ for method in ALL.values()} >= set(METHODS)


@EVERY
@MODELS
def test_two_rounds_are_applied_and_reverted_to_the_bit(
    method: le.Method, architecture: str, dtype: torch.dtype
) -> None:
    lm = model(architecture, dtype)
    before, unedited = state(lm), logits(lm)
    edit = run(lm, method, FACTS[:4])
    edited, said = state(lm), logits(lm)
    assert not torch.equal(said, unedited)
    assert edit.facts == FACTS[:4] and sum(edit.facts_in_round) == 4 and len(edit.rounds) >= 2
    assert edit.layers == sorted({place.layer for place in method.places})
    for place in edit.rounds[0] if not isinstance(method, ADAPTORS) else ():
        name = f"{lm.module_name(place)}.weight"
        assert not torch.equal(edited[name], before[name]), name
    edit.revert(lm)
    assert_unedited(lm, before)
    assert torch.equal(logits(lm), unedited)
    edit.apply(lm)
    assert torch.equal(logits(lm), said)
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, edited[name]), name


@EVERY
@MODELS
def test_a_saved_edit_is_loaded_to_the_bit(
    tmp_path: Path, method: le.Method, architecture: str, dtype: torch.dtype
) -> None:
    lm = model(architecture, dtype)
    edit = run(lm, method, FACTS[:4])
    edit.save(tmp_path / "edit")
    other = model(architecture, dtype)
    loaded = le.Edit.load(tmp_path / "edit")
    loaded.apply(other)
    assert (loaded.record, loaded.facts, loaded.facts_in_round) == (edit.record, edit.facts, edit.facts_in_round)
    assert (loaded.outcomes, loaded.damage) == (edit.outcomes, edit.damage)
    assert_same_edit(lm, other)


@EVERY
def test_every_written_fact_has_an_outcome_and_a_search_has_a_loss(method: le.Method) -> None:
    edit = run(model(), method, FACTS[:3])
    assert [outcome.fact for outcome in edit.outcomes] == FACTS[:3] and edit.damage
    searches = method.search_inputs() is not None
    assert [outcome.loss is not None for outcome in edit.outcomes] == [searches] * 3
    assert edit.values.keys() == (set(range(edit.facts_in_round[0])) if searches else set())


@EVERY
def test_a_module_in_the_users_own_trainer_gives_the_same_bits(method: le.Method) -> None:
    lm, other = model(), model()
    run(lm, method, FACTS[:4])
    module = le.EditModule(other, ready(other, method), covariance=needs(other, method))
    trainer = Trainer(accelerator="cpu", logger=False, **QUIET)
    trainer.fit(module, datamodule=le.FactsDataModule(FACTS[:4], facts_per_round=rounds(method)))
    assert module.fraction_done == 1.0 and [row["round"] for row in module.retention]
    assert_same_edit(lm, other)


class Stopped(Exception):
    pass


class StopAfter(Callback):
    """Fails as the round after the first begins, as a killed process would."""

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            raise Stopped


@EVERY
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, method: le.Method) -> None:
    lm = model()
    whole = run(lm, method, FACTS[:4])
    stopped = model()
    before = state(stopped)
    with pytest.raises(Stopped):
        run(stopped, method, FACTS[:4], checkpoint=tmp_path / "run", callbacks=[StopAfter()])
    assert_unedited(stopped, before)
    assert len(kept_rounds(tmp_path / "run")) == 1
    other = model()
    resumed = run(other, method, FACTS[:4], checkpoint=tmp_path / "run")
    assert resumed.facts_in_round == whole.facts_in_round
    assert resumed.outcomes == whole.outcomes
    assert_same_edit(lm, other)


@EVERY
def test_the_single_protocol_scores_each_fact_as_if_edited_alone(method: le.Method) -> None:
    lm = model()
    before = state(lm)
    quiet = le.EvaluationSettings(progress_bar=False)
    together = le.evaluate_single(lm, FACTS, ready(lm, method), covariance=needs(lm, method), settings=quiet)
    assert_unedited(lm, before)
    for fact, record in zip(FACTS, together.records, strict=True):
        edit = run(lm, method, [fact])
        alone = le.evaluate(lm, [fact], settings=quiet).records[0]
        edit.revert(lm)
        assert record["efficacy"]["nll_wanted"] == pytest.approx(alone["efficacy"]["nll_wanted"], rel=1e-3, abs=1e-3)
        assert record["ES"] == alone["ES"]


@EVERY
def test_its_edit_is_reported_and_exported(tmp_path: Path, method: le.Method) -> None:
    lm = model()
    quiet = le.EvaluationSettings(progress_bar=False)
    before = le.evaluate(lm, FACTS, settings=quiet)
    edit = run(lm, method)
    edit.before, edit.after = before, le.evaluate(lm, FACTS, settings=quiet)
    edit.save(tmp_path / "edit")
    page = le.report(tmp_path / "edit", tmp_path / "report.html").read_text(encoding="utf-8")
    assert type(method).__name__ in page and "France" in page
    if isinstance(method, ADAPTORS):
        for export in (le.export_model, le.export_lora):
            with pytest.raises(le.LightEditError, match="module of its own at layer 1"):
                export(lm, tmp_path / "model")
        return
    le.export_model(lm, tmp_path / "model")
    exported = le.LanguageModel.load(tmp_path / "model", device="cpu")
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(exported.model.get_parameter(name), parameter), name


@EVERY
def test_facts_that_come_twice_or_layers_that_are_not_there_are_refused_before_work(method: le.Method) -> None:
    lm = model()
    before = state(lm)
    if (size := rounds(method, len(FACTS) + 1)) > len(FACTS):  # a newer answer in a later round is allowed
        with pytest.raises(le.FactError, match="France"):
            run(lm, method, [*FACTS, replace(FACTS[0], target_new="Madrid")], size=size)
    beyond = replace(method, **({"layers": (9,)} if hasattr(method, "layers") else {"layer": 9}))
    with pytest.raises(le.LightEditError, match="layers 0 to 3"):
        le.edit(lm, FACTS, beyond, covariance=needs(lm, method), settings=QUIETLY)
    with pytest.raises(le.LightEditError, match="lm: expected a LanguageModel, got a list"):
        le.edit(FACTS, lm, method, settings=QUIETLY)  # type: ignore[arg-type]
    assert_unedited(lm, before)


@EVERY
def test_facts_about_one_subject_are_merged_where_the_method_knows_keys(method: le.Method) -> None:
    lm = model()
    twin = le.Fact("The capital of {} is near", "France", "Madrid")
    facts = [*FACTS[:2], twin]
    if rounds(method, 3) < 3 or not isinstance(method, ClosedForm):
        assert run(lm, method, facts, size=3).facts == facts  # nothing collides
        return
    with pytest.raises(le.FactError, match="nearly equal keys"):
        refusing = replace(QUIETLY, on_collision="error")
        le.edit(lm, facts, method, covariance=needs(lm, method), settings=refusing)
    settings = replace(QUIETLY, on_collision="merge")
    edit = le.edit(lm, facts, method, covariance=needs(lm, method), settings=settings)
    assert edit.facts == facts and edit.facts_in_round == [3]


def test_many_facts_are_kept_dense_where_factors_would_be_larger(tmp_path: Path) -> None:
    lm = model()
    d_out, d_in = lm.weight(Place(1)).shape
    count = d_out * d_in // (d_out + d_in) + 1
    facts = [le.Fact("The capital of {}", f"land number {number}", "Rome") for number in range(count)]
    method = le.MEMIT(layers=(1,), values=le.ValueSettings(steps=2), contexts=ContextSettings(prefixes=()), lambda_=5.0)
    settings = replace(QUIETLY, on_collision="keep")
    edit = le.edit(lm, facts, method, covariance=needs(lm, method), settings=settings)
    assert isinstance(edit.rounds[0][Place(1)], DenseUpdate)
    edited = lm.weight(Place(1)).clone()
    edit.save(tmp_path / "edit")
    assert (tmp_path / "edit" / "edit.safetensors").stat().st_size < 4 * d_out * (d_in + count) + 150 * count
    edit.revert(lm)
    le.Edit.load(tmp_path / "edit").apply(lm)
    assert torch.equal(lm.weight(Place(1)), edited)
