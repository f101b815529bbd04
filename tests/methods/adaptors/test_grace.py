"""GRACE: the codebook's rule, its values, and what the model then says and leaves alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lightedit as le
from lightedit.lm.batch import pad
from lightedit.lm.place import Place
from lightedit.methods.adaptors.codebook import Codebook
from lightedit.methods.adaptors.rule import Rule
from tests.models import tiny_model, tiny_tokenizer
from tests.runs import FACTS as LONG
from tests.runs import assert_unedited, run, state

PLACE = Place(1, "mlp")
# one value at one token of a random model can teach one token
FACTS = [replace(fact, target_new=new) for fact, new in zip(LONG, ("the", "of", "and", "in", "to"), strict=True)]
METHOD = le.GRACE(layer=1, steps=20, lr=0.5, radius=0.5)
ROMA, BERN = (7, 8), (9,)


@pytest.fixture
def lm() -> le.LanguageModel:
    return le.LanguageModel(tiny_model("gpt2"), tiny_tokenizer("bytelevel"))


def book(*entries: tuple[list[float], tuple[int, ...]], rule: Rule) -> Codebook:
    """The codebook after these queries and labels."""
    found = Codebook.empty(2, 3, "last")
    for query, label in entries:
        found, _, _ = rule.teach(found, torch.tensor(query), label)
    return found


RULE = Rule(radius=1.0, expand="coverage", published=False)


def test_a_far_query_gets_an_entry_of_its_own_in_any_order() -> None:
    near, far = ([0.0, 0.0], ROMA), ([5.0, 0.0], BERN)
    one, other = book(near, far, rule=RULE), book(far, near, rule=RULE)
    assert one.radii.tolist() == other.radii.tolist() == [1.0, 1.0]
    assert torch.equal(one.keys, other.keys.flip(0))


@pytest.mark.parametrize(
    ("expand", "radius", "key"), [("coverage", 1.5, 0.0), ("sum", 2.0, 0.0), ("average", 1.5, 0.75)]
)
def test_a_near_query_of_the_same_label_expands(expand: str, radius: float, key: float) -> None:
    rule = Rule(1.0, expand, published=False)
    found = book(([0.0, 0.0], ROMA), rule=rule)
    found, entry, anew = rule.teach(found, torch.tensor([1.5, 0.0]), ROMA)
    assert (len(found), entry, anew) == (1, 0, False)
    assert found.radii.tolist() == [radius] and found.keys.tolist() == [[key, 0.0]]


def test_labels_of_one_mean_are_two_labels() -> None:
    assert len(book(([0.0, 0.0], (7, 9)), ([0.5, 0.0], (8,)), rule=RULE)) == 2
    assert len(book(([0.0, 0.0], (7, 9)), ([0.5, 0.0], (8,)), rule=replace(RULE, published=True))) == 1


def test_a_split_halves_the_distance_and_never_enlarges_a_radius() -> None:
    found = book(([0.0, 0.0], ROMA), ([0.5, 0.0], BERN), rule=RULE)
    assert found.radii.tolist() == [0.25, 0.25]
    found, _, _ = RULE.teach(found, torch.tensor([-1.2, 0.0]), (3,))
    assert found.radii[:2].tolist() == [0.25, 0.25]  # the published code sets the first one to 0.6
    as_published = book(([0.0, 0.0], ROMA), ([0.5, 0.0], BERN), ([-1.2, 0.0], (3,)), rule=replace(RULE, published=True))
    assert as_published.radii[0] == pytest.approx(0.6 - 1e-5)


def test_radii_only_shrink_over_many_random_splits_and_keys_answer_themselves() -> None:
    draws = torch.Generator().manual_seed(0)
    found = Codebook.empty(2, 3, "last")
    for number in range(40):
        before = found.radii.clone()
        found, entry, _ = RULE.teach(found, torch.rand(2, generator=draws) * 4, (number,))
        assert (found.radii[: len(before)] <= before).all() and found.radii[entry] <= 1.0
    distance, nearest = found.nearest(found.keys)
    assert nearest.tolist() == list(range(len(found))) and not distance.any()
    apart = torch.cdist(found.keys, found.keys).fill_diagonal_(torch.inf)
    assert (found.radii[:, None] + found.radii[None] <= apart + 1e-5).all()  # no query is in two entries


def test_another_label_at_a_key_replaces_its_label_and_value() -> None:
    found = book(([0.0, 0.0], ROMA), rule=RULE)
    found, entry, anew = RULE.teach(found, torch.tensor([0.0, 0.0]), BERN)
    assert (len(found), entry, anew) == (1, 0, True)
    assert found.radii.tolist() == [1.0] and found.labels[0].tolist() == [9, -1]


def test_a_query_within_rounding_of_its_key_is_covered_whatever_its_radius() -> None:
    key = torch.tensor([[1e3, 1.0]])
    found = replace(book(([1e3, 1.0], ROMA), rule=RULE), radii=torch.zeros(1))
    assert found.decide(key + torch.tensor([[1e-3, 0.0]]), torch.zeros(1, 3))[0].all()
    assert not found.decide(key + 1.0, torch.zeros(1, 3))[0].any()


@pytest.mark.parametrize("spread", [10.0, 0.01])
def test_the_nearest_key_is_that_of_exact_distances(spread: float) -> None:
    draws = torch.Generator().manual_seed(0)
    keys = 100.0 + spread * torch.randn(300, 64, generator=draws)
    queries = torch.cat([keys[::30], keys[::30] + spread * torch.randn(10, 64, generator=draws)])
    whole = torch.zeros(300, dtype=torch.long)
    found = Codebook(keys, torch.zeros(300, 3), torch.ones(300), whole[:, None], whole)
    distance, index = found.nearest(queries)
    exact = (queries[:, None].double() - keys.double()).norm(dim=-1)
    assert index.tolist() == exact.argmin(1).tolist() and not distance[:10].any()
    torch.testing.assert_close(distance.double(), exact.min(1).values, rtol=1e-5, atol=1e-6)


# In a model


def logits(lm: le.LanguageModel, texts: list[str]) -> Tensor:
    rows = lm.encode(texts)
    return torch.stack([lm.forward(pad([row], lm.pad_id))[0, -1] for row in rows])


OTHERS = ["The weather today is", "Once upon a time", "He was born in", "The river"]


def test_a_fact_is_stated_after_save_and_load_and_other_inputs_keep_every_bit(lm, tmp_path: Path) -> None:
    unedited, before = logits(lm, OTHERS), state(lm)
    edit = run(lm, FACTS, METHOD, outcomes=True)
    assert edit.held, edit
    assert torch.equal(logits(lm, OTHERS), unedited)
    edit.save(tmp_path / "edit")
    other = le.LanguageModel(tiny_model("gpt2"), tiny_tokenizer("bytelevel"))
    le.Edit.load(tmp_path / "edit").apply(other)
    for fact, said in zip(FACTS, other.complete([fact.text for fact in FACTS]), strict=True):
        assert said.startswith(f" {fact.target_new}")
    assert torch.equal(logits(other, OTHERS), unedited)
    edit.revert(lm)
    assert_unedited(lm, before)


def test_a_batch_decides_each_row_by_itself(lm) -> None:
    run(lm, FACTS[:1], METHOD)
    rows = lm.encode([FACTS[0].text, *OTHERS])
    together = lm.forward(pad(rows, lm.pad_id))
    for number, row in enumerate(rows):
        alone = lm.forward(pad([row], lm.pad_id))[0, -1]
        torch.testing.assert_close(together[number, len(row) - 1], alone, rtol=1e-5, atol=1e-4)


def test_training_lowers_the_loss(lm) -> None:
    editor = METHOD.editor(lm)
    editor.prepare(FACTS, None)
    editor.start(range(len(FACTS)), None)
    losses = []
    while not editor.done:
        losses.append(float(editor.step(None)["loss"]))
    assert losses[-1] < 0.3 * losses[0] and len(losses) == METHOD.steps


def test_two_far_facts_in_either_order_are_the_same_edit(lm) -> None:
    books = []
    for facts in (FACTS[:2], FACTS[1::-1]):
        edit = run(lm, facts, METHOD, facts_per_round=1)
        books.append(lm.weights.adaptor(PLACE, edit.id))
        edit.revert(lm)
    one, other = books
    for name in ("keys", "values", "radii"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name).flip(0), rtol=1e-5, atol=1e-5)


def test_facts_of_one_round_are_those_of_single_rounds(lm) -> None:
    facts = [
        *FACTS,
        replace(FACTS[0], prompt="The capital of the {}"),
        replace(FACTS[3], prompt="Music of {}", target_new="Bern"),
    ]
    wide = replace(METHOD, radius=6.0, steps=3)
    books = []
    for size in (1, len(facts)):
        edit = run(lm, facts, wide, facts_per_round=size)
        books.append(lm.weights.adaptor(PLACE, edit.id))
        edit.revert(lm)
    for name, tensor in books[0].tensors().items():
        torch.testing.assert_close(tensor, books[1].tensors()[name], rtol=1e-5, atol=1e-5)


def by_hand(lm: le.LanguageModel, text: str, tokens: int, value: Tensor, everywhere: bool) -> list[int]:
    """The greedy continuation, if `value` is the place's output at the prompt's last token, or at all tokens."""
    ids = lm.encode([text])[0]
    prompt = len(ids)
    module = lm.module(PLACE)

    def put(_, args, output):
        output = output.clone()
        output[:, slice(0, None) if everywhere else slice(prompt - 1, prompt)] = value
        return output

    with module.register_forward_hook(put):
        for _ in range(tokens):
            ids = [*ids, int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[prompt:]


@pytest.mark.parametrize("positions", ["last", "all"])
def test_the_decision_of_the_prompt_is_kept_while_decoding(lm, positions: str) -> None:
    method = replace(METHOD, positions=positions)
    edit = run(lm, FACTS[:1], method)
    (value,) = edit.rounds[0][PLACE].values
    row = lm.encode([FACTS[0].text])[0]
    with lm.weights.unedited():
        expected = by_hand(lm, FACTS[0].text, 9, value, positions == "all")
    assert lm.generate([row], 9, top_k=1, seed=[0], edits=None)[0] == expected[:9]
    # a row in between that does not match is continued as without the edit
    others = lm.encode([OTHERS[0], FACTS[0].text, OTHERS[1]])
    said = lm.generate(others, 9, top_k=1, seed=[0, 0, 0], edits=None)
    with lm.weights.unedited():
        assert [said[0], said[2]] == lm.generate([others[0], others[2]], 9, top_k=1, seed=[0, 0], edits=None)
    assert said[1] == expected


@pytest.mark.parametrize("init", ["cold", "warm", "adv"])
def test_each_start_learns_its_facts(lm, init: str) -> None:
    assert run(lm, FACTS[:2], replace(METHOD, init=init, steps=40), outcomes=True).held


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 0.0}, "radius must be positive"),
        ({"expand": "wide"}, "expand is one of coverage, sum, average"),
        ({"init": "hot"}, "init is one of cold, warm, adv"),
        ({"part": "head"}, "part is one of q, k, v"),
        ({"positions": "first"}, "positions is one of all, prompt, last"),
        ({"steps": 0}, "steps at least 1"),
        ({"published": True, "expand": "sum"}, "has no expand 'sum'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(le.LightEditError, match=message):
        le.GRACE(**{"layer": 1, **settings})


def test_relative_radii_are_shares_of_the_distance_between_unrelated_prompts(lm) -> None:
    edit = run(lm, FACTS[:1], le.GRACE(layer=1, radius=0.25, relative=True, steps=1))
    distance = edit.record.inputs["distance"]
    assert float(edit.rounds[0][PLACE].radii[0]) == pytest.approx(0.25 * distance) and distance > 0.1
