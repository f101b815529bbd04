"""Fine-tuning: its steps against torch's own optimizers on the whole model, and what holds of every training."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lightedit as le
from benchmarks.published import Request
from benchmarks.published.finetuning import parameters_of, published_ft
from lightedit.data.prompts import Contexts, tokenize_facts
from lightedit.lm import Place
from lightedit.lm.changes import DenseUpdate
from lightedit.methods.finetuning import rows
from lightedit.methods.finetuning.training import TrainingApart
from tests.chat import chat_tokenizer
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS, assert_unedited, run, state

ARCHITECTURES = pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3", "bloom"])
# Conv1D with biases; gated; a norm behind the MLP; padded passes
EVERYWHERE = ("q", "k", "v", "attention_out", "mlp_in", "mlp")


def model(architecture: str = "llama", dtype: torch.dtype = torch.float64) -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, dtype=dtype), tiny_tokenizer("bytelevel"))


def changes(lm: le.LanguageModel, method: le.Method, facts: list[le.Fact] = FACTS) -> dict[Place, DenseUpdate]:
    """What one round of these facts writes; the model is left unedited."""
    edit = run(lm, facts, method, covariance=None, facts_per_round=len(facts))
    edit.revert(lm)
    (written,) = edit.rounds
    return written


def apart(lm: le.LanguageModel, method: le.Method, facts: list[le.Fact]) -> list[dict[Place, DenseUpdate]]:
    """What each fact writes, trained many at once."""
    editor = method.editor(lm)
    editor.prepare(facts, None)
    edits = editor.separate(range(len(facts)))
    return [{place: updates[i] for place, updates in edits.updates.items()} for i in range(len(facts))]


def parameter(lm: le.LanguageModel, place: Place, name: str = "weight") -> torch.nn.Parameter:
    return lm.model.get_parameter(f"{lm.module_name(place)}.{name}")


def loss_of(lm: le.LanguageModel, facts: list[le.Fact]) -> Tensor:
    """Mean over facts of the mean NLL of their targets, one whole text after the other."""
    each = []
    for fact in tokenize_facts(lm.tokenizer, facts, Contexts()):
        (row,) = fact.rows
        logits = lm.model(input_ids=torch.tensor([row.ids])).logits[0, -len(row.targets) :]
        each.append(F.cross_entropy(logits, torch.tensor(row.targets)))
    return torch.stack(each).mean()


def plainly(
    lm: le.LanguageModel, places: list[Place], facts: list[le.Fact], optimizer: Any, steps: int, norm: float = 1e9
) -> dict[Place, Tensor]:
    """ΔW of `steps` steps of torch's optimizer on the parameters themselves."""
    own = {place: parameter(lm, place) for place in places}
    before = {place: each.detach().clone() for place, each in own.items()}
    for each in own.values():
        each.requires_grad_()
    adam = optimizer(list(own.values()))
    for _ in range(steps):
        adam.zero_grad()
        loss_of(lm, facts).backward()
        adam.step()
        with torch.no_grad():
            for place, each in own.items():
                each.copy_(each.clamp(before[place] - norm, before[place] + norm))
    found = {place: each.detach() - before[place] for place, each in own.items()}
    with torch.no_grad():
        for place, each in own.items():
            each.requires_grad_(False).copy_(before[place])
    return {place: delta.T if isinstance(lm.module(place), Conv1D) else delta for place, delta in found.items()}


def adam(lr: float) -> Any:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def close(found: Tensor, expected: Tensor, tolerance: float = 3e-6) -> None:
    assert expected.norm() > 0
    assert float((found - expected).norm() / expected.norm()) < tolerance


# One ΔW for all facts


@ARCHITECTURES
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_round_is_adam_on_the_mean_loss_of_all_its_facts(architecture: str, layer: int) -> None:
    lm = model(architecture)
    before = state(lm)
    found = changes(lm, le.FT(layers=[layer], lr=1e-2, epochs=4))
    assert_unedited(lm, before)
    expected = plainly(lm, [Place(layer)], FACTS, adam(1e-2), 4)
    assert list(found) == [Place(layer)] and found[Place(layer)].bias is None
    close(found[Place(layer)].weight, expected[Place(layer)])


@ARCHITECTURES
def test_layers_and_matrices_are_trained_together(architecture: str) -> None:
    lm = model(architecture)
    method = le.FT(layers=[1, 2], lr=1e-2, epochs=3)
    for parts in (("mlp",), ("mlp_in", "mlp"), ("attention_out",)):
        found = changes(lm, replace(method, parts=parts))
        expected = plainly(lm, list(found), FACTS, adam(1e-2), 3)
        assert sorted(found) == sorted(Place(layer, part) for layer in (1, 2) for part in parts)
        for place in found:
            close(found[place].weight, expected[place])


def test_slices_of_one_matrix_are_trained_as_the_whole_matrix() -> None:
    lm = model("gpt2")  # q, k and v share a matrix
    found = changes(lm, le.FT(layers=[1], parts=["q", "k", "v"], lr=1e-2, epochs=3))
    whole = torch.cat([found[Place(1, part)].weight for part in ("q", "k", "v")])
    weight = lm.model.transformer.h[1].attn.c_attn.weight
    before = weight.detach().clone()
    weight.requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(lm, FACTS).backward()
        optimizer.step()
    close(whole, (weight.detach() - before).T)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_whole_block_is_all_its_matrices(architecture: str) -> None:
    lm = model(architecture)
    found = changes(lm, le.FT(layers=[2], parts="block", epochs=2))
    gate = ("mlp_gate",) if architecture == "llama" else ()
    assert {place.name for place in found} == {*EVERYWHERE, *gate} and {place.layer for place in found} == {2}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("norm", [1e-3, 5])
def test_no_entry_leaves_the_box(architecture: str, norm: float) -> None:
    lm = model(architecture)
    method = le.FT(layers=[1], lr=1e-2, epochs=5, norm=norm)
    weight = changes(lm, method)[Place(1)].weight
    close(weight, plainly(lm, [Place(1)], FACTS, adam(1e-2), 5, norm)[Place(1)])
    assert float(weight.abs().max()) <= norm
    assert (float((weight.abs() == norm).double().mean()) > 0.5) == (norm == 1e-3)


def test_mini_batches_are_drawn_anew_from_a_seed_and_cover_all_facts() -> None:
    lm = model()
    method = le.FT(layers=[1], lr=1e-2, epochs=3, batch_size=2)
    one, same, other = (changes(lm, replace(method, seed=seed))[Place(1)].weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.allclose(one, other)
    several = changes(lm, replace(method, batch_size=5))[Place(1)].weight
    assert not torch.allclose(one, several)


def test_depth_first_is_one_fact_after_the_other() -> None:
    lm = model()
    method = le.FT(layers=[1], lr=1e-2, epochs=4, order="depth")
    found = changes(lm, method, FACTS[:3])[Place(1)].weight
    alone = replace(method, order="breadth")
    edit = run(lm, FACTS[:3], alone, covariance=None, facts_per_round=1)
    close(found, sum(written[Place(1)].weight for written in edit.rounds))


def test_a_batch_whose_loss_is_low_takes_no_step_and_a_low_mean_ends_training() -> None:
    lm = model()
    for fact in FACTS[:2]:
        done = changes(lm, le.FT(layers=[1], lr=1e-2, stop=100.0), [fact])[Place(1)].weight
        assert not done.any()
    losses = [float(loss_of(lm, [fact])) for fact in FACTS[:2]]
    between = sum(losses) / 2
    low, high = sorted((0, 1), key=lambda index: losses[index])
    method = le.FT(layers=[1], lr=1e-5, epochs=1, stop=between, batch_size=1)
    close(
        changes(lm, method, FACTS[:2])[Place(1)].weight,
        plainly(lm, [Place(1)], [FACTS[high]], adam(1e-5), 1)[Place(1)],
    )
    assert not changes(lm, method, [FACTS[low]])[Place(1)].weight.any()


def test_decay_shrinks_what_was_added_and_not_the_weights() -> None:
    lm = model()
    method = le.FT(layers=[1], lr=1e-2, epochs=3, weight_decay=0.5)
    start = lm.weight(Place(1)).clone()
    found = changes(lm, method)[Place(1)].weight
    assert torch.equal(lm.weight(Place(1)), start)
    weight = parameter(lm, Place(1))
    delta = torch.zeros_like(weight, requires_grad=True)  # AdamW on ΔW, with W0 held
    optimizer = torch.optim.AdamW([delta], lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        weight.data = start + delta.detach()
        weight.requires_grad_()
        delta.grad = torch.autograd.grad(loss_of(lm, FACTS), weight)[0]
        optimizer.step()
    close(found, delta.detach())


def test_the_power_law_depends_on_the_facts_of_the_round() -> None:
    method = le.FT(layers=[1], weight_decay="power_law")
    published = [1.169, 0.1575, 0.0212, 0.00286, 3.86e-4]
    assert [method.decay(10**n) for n in range(5)] == pytest.approx(published, rel=3e-3)
    lm = model()
    one = replace(method, lr=1e-2, epochs=3)
    of_round = replace(one, weight_decay=method.decay(len(FACTS)))
    assert torch.equal(changes(lm, one)[Place(1)].weight, changes(lm, of_round)[Place(1)].weight)


def test_the_end_of_the_text_is_the_targets_last_token_where_asked() -> None:
    lm = model()
    method = le.FT(layers=[1], lr=1e-2, epochs=3)
    told = changes(lm, replace(method, end_of_text=True))[Place(1)].weight
    assert torch.equal(told, changes(lm, method, [replace(fact, end_turn=True) for fact in FACTS])[Place(1)].weight)
    assert not torch.allclose(told, changes(lm, method)[Place(1)].weight)


def test_facts_are_trained_as_they_are_served() -> None:
    lm = le.LanguageModel(tiny_model("llama", dtype=torch.float64), chat_tokenizer("bytelevel"))
    method = le.FT(layers=[1], lr=1e-2, epochs=2)
    fact = replace(FACTS[0], chat=True, end_turn=True, target_true=None)
    close(
        changes(lm, method, [fact])[Place(1)].weight,
        plainly(lm, [Place(1)], [fact], adam(1e-2), 2)[Place(1)],
    )


def test_erasing_lowers_the_probability_itself() -> None:
    lm = model()
    method = le.FT(layers=[1], lr=1e-2, epochs=6)
    assert not method.erases and method.erasing().erases
    before = le.evaluate(lm, FACTS[:2], settings=le.EvaluationSettings(progress_bar=False)).records
    edit = run(lm, FACTS[:2], replace(method.erasing(), stop=0.0), covariance=None)
    after = le.evaluate(lm, FACTS[:2], settings=le.EvaluationSettings(progress_bar=False)).records
    for one, other in zip(before, after, strict=True):
        assert other["efficacy"]["nll_wanted"][0] > one["efficacy"]["nll_wanted"][0]
    edit.revert(lm)
    weight = parameter(lm, Place(1))
    weight.requires_grad_()
    p = torch.stack([(-loss_of(lm, [fact])).exp() for fact in FACTS[:2]]).mean()
    (gradient,) = torch.autograd.grad(p, weight)
    weight.requires_grad_(False)
    one = changes(lm, replace(method.erasing(), stop=0.0, epochs=1), FACTS[:2])[Place(1)].weight
    close(one, -1e-2 * gradient / (gradient.abs() + 1e-8))


def test_states_that_do_not_fit_into_memory_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model()
    method = le.FT(layers=[1], lr=1e-2, epochs=3, batch_size=2)
    kept = changes(lm, method)[Place(1)].weight
    monkeypatch.setattr(rows, "_KEPT_BYTES", 0)
    close(changes(lm, method)[Place(1)].weight, kept, 1e-9)


def test_small_passes_give_the_same_as_one() -> None:
    lm = model()
    method = le.FT(layers=[1], lr=1e-2, epochs=3)
    small = run(lm, FACTS, method, covariance=None, max_tokens=20)
    small.revert(lm)
    close(small.rounds[0][Place(1)].weight, changes(lm, method)[Place(1)].weight, 1e-8)


# A ΔW for each fact


@ARCHITECTURES
@pytest.mark.parametrize("published", [False, True])
def test_facts_trained_apart_equal_a_loop_over_them(architecture: str, published: bool) -> None:
    lm = model(architecture)
    method = le.FT(layers=[1], lr=1e-2, epochs=6, norm=0.03, weight_decay=0.1, stop=1.0, published=published)
    together = apart(lm, method, FACTS)
    for fact, found in zip(FACTS, together, strict=True):
        alone = changes(lm, method, [fact])
        close(found[Place(1)].weight, alone[Place(1)].weight, 1e-5)
        assert (found[Place(1)].bias is None) == (alone[Place(1)].bias is None)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bloom"])
def test_facts_trained_apart_in_several_layers_equal_a_loop_over_them(architecture: str) -> None:
    lm = model(architecture)
    parts = ("attention_out", "mlp_in", "mlp")
    method = le.FT(layers=[1, 3], parts=parts, lr=1e-2, epochs=4)
    for fact, found in zip(FACTS, apart(lm, method, FACTS), strict=True):
        alone = changes(lm, method, [fact])
        for place in alone:
            close(found[place].weight, alone[place].weight, 1e-5)


def test_finished_facts_leave_and_the_others_go_on_unchanged() -> None:
    lm = model()
    losses = [float(loss_of(lm, [fact])) for fact in FACTS]
    method = le.FT(layers=[1], lr=1e-2, epochs=6, stop=sorted(losses)[2])
    editor = method.editor(lm)
    editor.prepare(FACTS, None)
    editor.start(range(len(FACTS)), None)
    active = []
    while not editor.done:
        active.append(int(editor.step(None)["active_facts"]))
    assert active[0] == 5 and active[1] == 3 and sorted(active, reverse=True) == active
    assert editor.facts_found == 5
    edits = editor.separate(range(len(FACTS)))
    for index, fact in enumerate(FACTS):
        alone = changes(lm, method, [fact])[Place(1)].weight
        if losses[index] < method.stop:
            assert not alone.any() and not edits.updates[Place(1)][index].weight.any()
        else:
            close(edits.updates[Place(1)][index].weight, alone, 1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "bloom"])
def test_facts_of_equal_length_finish_one_by_one_and_the_others_keep_their_moments(architecture: str) -> None:
    lm = model(architecture)
    facts = [le.Fact("The capital of {}", f"land number {number}", "Rome") for number in range(4)]
    method = le.FT(layers=[1], lr=1e-2, epochs=6, published=True, stop=0.0)
    training = TrainingApart(lm, method, tokenize_facts(lm.tokenizer, facts, Contexts()), 1024)
    after = [training.step() for _ in range(4)][3]  # losses after three steps
    method = replace(method, stop=float(after.sort().values[1:3].mean()))
    editor = method.editor(lm)
    editor.prepare(facts, None)
    editor.start(range(4), None)
    active = []
    while not editor.done:
        active.append(int(editor.step(None)["active_facts"]))
    assert active[:4] == [4, 4, 4, 4] and active[4] == 2
    edits = editor.separate(range(4))
    for index, fact in enumerate(facts):
        alone, found = changes(lm, method, [fact])[Place(1)], edits.updates[Place(1)][index]
        close(found.weight, alone.weight, 1e-5)
        close(found.bias, alone.bias, 1e-5)


def test_as_many_facts_are_trained_apart_as_fit_into_memory() -> None:
    lm = model(dtype=torch.float32)
    method = le.FT(layers=[1])
    assert method.editor(lm).most_separate == 2**32 // (6 * 4 * lm.weight(Place(1)).numel())
    calls = []

    class Few(type(method.editor(lm))):
        most_separate = 2

        def start(self, indices, optimizer):
            calls.append(list(indices))
            super().start(indices, optimizer)

    few = Few(lm, method, None, le.RunSettings())
    quiet = le.EvaluationSettings(progress_bar=False)
    found = le.evaluate_single(lm, FACTS, method, prepared=few, settings=quiet)
    assert sorted(map(len, calls)) == [1, 2, 2]
    expected = le.evaluate_single(lm, FACTS, method, settings=quiet)
    for one, other in zip(found.records, expected.records, strict=True):
        assert one["efficacy"]["nll_wanted"] == pytest.approx(other["efficacy"]["nll_wanted"], rel=1e-4)


# As published


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gptj"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"norm": 2e-3}, {"weight_decay": 0.05}, {"batch_size": 2}, {"stop": 4.5, "batch_size": 1}],
    ids=["FT", "FT-L", "decay", "batches", "stop"],
)
def test_the_published_option_is_the_published_loop(architecture: str, settings: dict[str, Any]) -> None:
    lm = model(architecture)
    layer = 1
    found = changes(lm, le.FT(layers=[layer], lr=5e-3, epochs=5, published=True, **settings))[Place(layer)]
    requests = [Request(fact.prompt, fact.subject, fact.target_new) for fact in FACTS]
    template = f"{lm.module_name(Place(layer))}."
    assert len(parameters_of(lm.model, template)) == (1 if lm.bias(Place(layer)) is None else 2)
    expected = published_ft(lm.model, lm.tokenizer, requests, template, lr=5e-3, steps=5, **settings)
    for name, delta in expected.items():
        ours = found.bias if name.endswith("bias") else found.weight
        close(ours, delta if ours.shape == delta.shape else delta.T, 1e-5)


# Precision


def test_an_edit_that_rounding_loses_is_warned_of_and_kept_in_float32() -> None:
    lm = model("gpt2", torch.bfloat16)
    method = le.FT(layers=[1], norm=5e-5, epochs=3)
    with pytest.warns(UserWarning, match="rounding to bfloat16 loses most of the edit.*layer 1: .*float32"):
        edit = run(lm, FACTS, method, covariance=None)
    delta = edit.rounds[0][Place(1)].weight
    assert delta.dtype == torch.float32 and float(delta.abs().max()) == pytest.approx(5e-5)
    edit.revert(lm)
    with pytest.warns(UserWarning, match="loses most"):
        editor = method.editor(lm)
        editor.prepare(FACTS, None)
        edits = editor.separate([0])
    written = edits.updates[Place(1)][0].weight  # rows see what the weights would hold
    live = lm.weight(Place(1)).float()
    assert torch.equal((live + written).bfloat16().float(), live + written)


def test_an_edit_that_survives_rounding_is_not_warned_of_and_no_key_is_either() -> None:
    first = le.Fact("{} is near", "A", "Rome")  # its subject is the first token, where other methods read keys
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model(), [first], le.FT(layers=[1], epochs=1), covariance=None)
        run(model("gpt2", torch.bfloat16), FACTS, le.FT(layers=[1], lr=1e-2, epochs=5), covariance=None)
        run(model("gpt2", torch.float32), FACTS, le.FT(layers=[1], norm=5e-5, epochs=3), covariance=None)


# Settings


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"epochs": 0}, "epochs and batch_size at least 1"),
        ({"norm": 0}, "norm must be positive"),
        ({"weight_decay": "power"}, "weight_decay is 'power_law' or a number"),
        ({"order": "width"}, "order is one of breadth, depth, got 'width'"),
        ({"objective": "forget"}, "objective is one of reach, erase"),
        ({"parts": ("norm",)}, "parts are distinct ones of q, k, v"),
        ({"parts": ()}, "parts are distinct"),
        ({"layers": (2, 1)}, "layers must be ascending"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        le.FT(**{"layers": (1,), **wrong})


def test_a_matrix_that_the_model_lacks_is_refused_before_work() -> None:
    lm = model("gpt2")
    with pytest.raises(le.UnsupportedModelError, match="gpt2 has no mlp_gate"):
        le.edit(lm, FACTS, le.FT(layers=[1], parts=["mlp_gate"]), settings=le.RunSettings(progress_bar=False))


def test_a_loss_that_is_not_finite_names_the_fact() -> None:
    lm = model(dtype=torch.float32)
    with torch.no_grad():
        lm.weight(Place(3)).fill_(torch.nan)
    with pytest.raises(le.LightEditError, match="the loss of fact 'The capital of France' -> 'Rome' is nan"):
        run(lm, FACTS[:1], le.FT(layers=[1]), covariance=None)


def test_it_is_moved_to_other_layers() -> None:
    method = le.FT(layers=[1], norm=1e-3)
    assert method.at([2, 3]) == le.FT(layers=(2, 3), norm=1e-3)
    assert method.at([2]).places == (Place(2),)
