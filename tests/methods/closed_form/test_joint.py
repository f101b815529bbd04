"""Values that are searched knowing of each other: what the search adds is what the solve writes."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import lightedit as le
from lightedit.data.prompts import ContextSettings
from lightedit.lm import Place
from lightedit.methods.closed_form import values
from lightedit.methods.closed_form.editor import ClosedFormEditor
from lightedit.methods.closed_form.joint import Joint, written
from lightedit.methods.closed_form.keys import KeyWalk
from lightedit.methods.closed_form.writing import shares_written
from lightedit.methods.protocol import EditorSettings, search
from lightedit.metrics.scoring import score_targets
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS, covariance_of, run

BARE = ContextSettings(prefixes=())
VALUES = le.ValueSettings(lr=0.3, steps=12, clamp_norm_factor=2.0, kl_factor=0.0, weight_decay=0.0)
WIDE = replace(VALUES, lr=1.0, clamp_norm_factor=50.0, loss_threshold=6.0, steps=100)
ONE = le.MEMIT(layers=(1,), values=VALUES, contexts=BARE, lambda_=0.1)
METHODS = [
    ONE,
    replace(ONE, share=0.7),
    le.EMMET(layers=(1,), values=VALUES, contexts=BARE, mu=0.5),
    le.PMET(layers=(1,), values=VALUES, contexts=BARE, lambda_=0.1, attention_delta=False),
    le.AlphaEdit(layers=(1,), values=VALUES, contexts=BARE, threshold=0.5, relative=True),
    le.ENCORE(layers=(1,), values=VALUES, contexts=BARE, lambda_=0.1, norm_weight=0.1),
]
EQUAL = [  # keys
    le.Fact("The capital of {} is", "France", "Rome"),
    le.Fact("The capital of {} lies on the river", "France", "Danube"),
]
ALIKE = [FACTS[1], FACTS[3]]  # keys of similarity 0.54
GROUPS = [ALIKE[0], *EQUAL, FACTS[2], ALIKE[1]]
EACH = pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)


def model(architecture: str = "llama") -> le.LanguageModel:
    return le.LanguageModel(tiny_model(architecture, dtype=torch.float64), tiny_tokenizer("bytelevel"))


def editor_of(lm: le.LanguageModel, method: le.Method, facts=GROUPS, rule: str = "joint") -> ClosedFormEditor:
    settings = EditorSettings(on_collision=rule, collision_similarity=0.5)
    editor = method.editor(lm, covariance=covariance_of(lm, method.covariance_places), settings=settings)
    assert isinstance(editor, ClosedFormEditor)
    editor.prepare(facts, [list(range(len(facts)))])
    return editor


def nll(lm: le.LanguageModel, facts) -> torch.Tensor:
    return score_targets(lm, [fact.text for fact in facts], [fact.target_new for fact in facts]).nll


@EACH
def test_what_a_layer_writes_is_what_was_asked_for_times_the_shares(method: le.Method) -> None:
    lm = model()
    editor = editor_of(lm, method)
    shares = shares_written(lm, method, editor.preservation, editor.prompts)
    assert shares.diagonal().min() > 0.2 and (shares - shares.diag().diag()).abs().max() > 0.1
    asked = torch.randn(lm.d_model, len(GROUPS), dtype=torch.float64)
    before = KeyWalk(lm, editor.prompts, Place(1)).outputs(Place(1, "mlp"))
    output = KeyWalk(lm, editor.prompts, Place(1)).outputs(Place(1, "mlp" if method.site == "mlp" else "block"))
    editor.results.update(enumerate((output + asked).T))
    editor.write(range(len(GROUPS)), ("x", 0))
    change = KeyWalk(lm, editor.prompts, Place(1)).outputs(Place(1, "mlp")) - before
    torch.testing.assert_close(change, asked @ shares, rtol=1e-9, atol=1e-9)


def test_several_layers_write_nearly_what_the_shares_say() -> None:
    lm = model()
    method = replace(ONE, layers=(0, 1, 2))
    editor = editor_of(lm, method)
    shares = shares_written(lm, method, editor.preservation, editor.prompts)
    before = KeyWalk(lm, editor.prompts, Place(2)).outputs(Place(2, "block"))
    asked = 0.01 * torch.randn(before.shape, dtype=torch.float64)
    editor.results.update(enumerate((before + asked).T))
    editor.write(range(len(GROUPS)), ("x", 0))
    change = KeyWalk(lm, editor.prompts, Place(2)).outputs(Place(2, "block")) - before
    assert float((change - asked @ shares).norm() / asked.norm()) < 0.1
    assert float((change - asked).norm() / asked.norm()) > 0.3


@pytest.mark.parametrize(("pair", "threshold"), [(EQUAL, 7.0), (ALIKE, 6.5)], ids=["equal", "alike"])
@EACH
def test_the_activations_of_a_joint_search_are_those_of_the_edited_model(
    method: le.Method, pair: list[le.Fact], threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = model()
    editor = editor_of(lm, method, pair)
    place = Place(1, "mlp" if method.site == "mlp" else "block")
    before = KeyWalk(lm, editor.prompts, Place(1)).outputs(place)
    seen: list[torch.Tensor] = []

    def kept(delta: torch.Tensor, joint: Sequence[Joint]) -> torch.Tensor:
        seen.append(written(delta, joint).detach().T)
        return written(delta, joint)

    monkeypatch.setattr(values, "written", kept)
    # the last step is followed by no evaluation, unless the loss ends the search
    editor.method = replace(method, values=replace(WIDE, loss_threshold=threshold))
    search(editor, range(2), editor.make_optimizer())
    assert max(editor.losses.values()) < threshold < nll(lm, pair).max()
    editor.write(range(2), ("x", 0))
    change = KeyWalk(lm, editor.prompts, Place(1)).outputs(place) - before
    assert seen[-1].norm() > 0.1 * before.norm()
    torch.testing.assert_close(change, seen[-1], rtol=1e-7, atol=1e-7)


def test_facts_with_equal_keys_are_met_where_values_of_their_own_would_cancel_out() -> None:
    lm = model()
    after = {}
    for rule in ("keep", "joint"):
        editor = editor_of(lm, ONE, EQUAL, rule=rule)
        search(editor, range(2), editor.make_optimizer())
        editor.write(range(2), ("x", 0))
        after[rule] = nll(lm, EQUAL)
        lm.weights.remove([("x", 0)])
    assert after["joint"].sum() < after["keep"].sum() - 0.3


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_group_is_searched_as_a_whole_whatever_the_chunks(size: int) -> None:
    lm = model()
    settings = {"on_collision": "joint", "collision_similarity": 0.5}
    whole = run(lm, GROUPS, ONE, **settings)
    whole_update = whole.rounds[0][Place(1)]
    whole.revert(lm)
    parts = run(lm, GROUPS, ONE, facts_per_chunk=size, **settings)
    torch.testing.assert_close(parts.rounds[0][Place(1)].dense(), whole_update.dense(), rtol=1e-8, atol=1e-10)


def test_a_group_ends_together_and_others_by_themselves() -> None:
    lm = model()
    editor = editor_of(lm, replace(ONE, values=WIDE))
    optimizer = editor.make_optimizer()
    editor.start(range(len(GROUPS)), optimizer)
    running, order = editor._search, list(editor._searched)
    seen = set()
    while not editor.done:
        editor.step(optimizer)
        active = dict(zip(order, running.active.tolist(), strict=True))
        seen.add((active[1], active[2]))
    assert seen == {(True, True), (False, False)}
    steps = dict(zip(order, running.values().steps.tolist(), strict=True))
    assert steps[1] == steps[2] and steps[0] == steps[4] and len(set(steps.values())) == 3
    assert all(editor.losses[index] < 6.0 for index in (0, 1, 2, 4))


def test_values_of_a_group_are_taken_as_a_whole_only() -> None:
    lm = model()
    editor = editor_of(lm, ONE)
    search(editor, range(len(GROUPS)), editor.make_optimizer())
    assert sorted(editor.to_give(range(len(GROUPS)))) == [3]
    for with_others, expected in ((False, [3]), (True, [0, 3, 4])):  # fact 1 depends on fact 2, which is not given
        other = editor_of(lm, ONE)
        other.give({index: torch.zeros(lm.d_model) for index in (1, 3, 0, 4)}, with_others)
        search(other, range(len(GROUPS)), other.make_optimizer())
        assert [index for index in range(len(GROUPS)) if not other.results[index].any()] == expected
