"""Facts served without a space, in a chat template or to the end of a turn: scores, texts and edits follow."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tokenizers import processors

import lightedit as le
from lightedit.data.fact import Serving
from lightedit.data.prompts import Contexts, ContextSettings, tokenize_facts
from lightedit.evaluation.generation import generate
from lightedit.evaluation.held_out_text import HeldOutText, held_out_windows
from lightedit.evaluation.scoring import check_scored, score_facts
from lightedit.lm.place import Place
from lightedit.methods.closed_form.values import ValueOptimization
from lightedit.metrics import score_targets
from lightedit.statistics.covariance import Provenance
from tests.chat import chat_tokenizer, turn
from tests.models import BOS, EOS, PAD, tiny_model, tiny_tokenizer

GENERATE = le.EvaluationSettings(generate=True, progress_bar=False)
QUIET = le.EvaluationSettings(progress_bar=False)
FACT = le.Fact(
    "The capital of {}",
    "France",
    "Rome",
    target_true="Paris",
    paraphrase_prompts=("The seat of France",),
    neighborhood_prompts=("The old tower",),
    portability=(("The river there", "Po"),),
)


def language_model(model_type="llama", tokenizer=None) -> le.LanguageModel:
    return le.LanguageModel(tiny_model(model_type), tokenizer or chat_tokenizer(), name="tiny")


def nll(lm: le.LanguageModel, before: list[int], target: list[int]) -> float:
    """Mean NLL of target tokens, from one pass of the stock model."""
    with torch.no_grad():
        log_p = lm.model(input_ids=torch.tensor([[*before, *target]])).logits[0].log_softmax(-1)
    return -sum(float(log_p[len(before) + i - 1, token]) for i, token in enumerate(target)) / len(target)


def covariance(lm: le.LanguageModel) -> le.Covariance:
    moments = {}
    for layer in (1, 2):
        keys = torch.randn(500, lm.weight(Place(layer)).shape[1], generator=torch.Generator().manual_seed(layer))
        moments[Place(layer)] = keys.T @ keys / 500
    return le.Covariance(moments, Provenance(lm.name, lm.fingerprint, "noise", 500, 8, "float32"))


# Scores


@pytest.mark.parametrize("model_type", ["llama", "gptj"])  # rows packed, and padded
def test_scores_are_those_of_the_texts_as_served(model_type: str) -> None:
    lm = language_model(model_type)
    spell = lambda text: lm.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    asked = turn(lm.tokenizer, "Who?")
    expected = {
        Serving(""): nll(lm, [BOS, *spell('He is "')], spell("Rome")),
        Serving(" ", True): nll(lm, asked, spell("Rome")),
        Serving(" ", True, True): nll(lm, asked, [*spell("Rome"), PAD]),
        Serving(" ", False, True): nll(lm, [BOS, *spell("Who?")], [*spell(" Rome"), EOS]),
        Serving(): nll(lm, [BOS, *spell("Who?")], spell(" Rome")),
    }
    prompts = ['He is "' if serving == Serving("") else "Who?" for serving in expected]
    found = score_targets(lm, prompts, ["Rome"] * len(prompts), servings=list(expected))
    torch.testing.assert_close(
        found.nll, torch.tensor(list(expected.values()), dtype=torch.float64), rtol=1e-4, atol=1e-4
    )


def test_all_prompts_of_a_fact_are_served_alike_and_only_what_is_taught_ends_its_turn() -> None:
    lm = language_model()
    fact = replace(FACT, chat=True, end_turn=True)
    (record,) = score_facts(lm, [fact])
    end = len(lm.tokenizer("Rome", add_special_tokens=False)["input_ids"]) + 1
    assert len(record.efficacy.predicted[0]) == len(record.paraphrase.predicted[0]) == end
    for kind, prompt, answer in (
        ("neighborhood", "The old tower", "Paris"),
        ("portability", "The river there", "Po"),
    ):
        target = lm.tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert float(getattr(record, kind).nll) == pytest.approx(nll(lm, turn(lm.tokenizer, prompt), target), rel=1e-4)


def test_chat_on_evaluate_serves_facts_and_held_out_facts_so() -> None:
    lm = language_model()
    other = le.Fact("The king of {}", "Spain", "Ada", target_true="Bo")
    found = le.evaluate(lm, [FACT], held_out=[other], settings=GENERATE, chat=True)
    same = le.evaluate(lm, [replace(FACT, chat=True)], held_out=[replace(other, chat=True)], settings=GENERATE)
    plain = le.evaluate(lm, [FACT], held_out=[other], settings=GENERATE)
    assert found.scores == same.scores != plain.scores
    assert found.records == same.records
    assert found.records[0]["chat"] is True and "chat" not in plain.records[0]
    with pytest.raises(ValueError, match="before: the chat of its record 0 is False, that of the fact is True"):
        le.evaluate(lm, [FACT], before=plain, settings=QUIET, chat=True)


# Texts


def test_texts_are_generated_in_the_template_too() -> None:
    lm = language_model()
    prompts, chat = ["Who?", "The river", "Where?"], [True, False, True]
    found = generate(lm, prompts, max_new_tokens=6, greedy=True, chat=chat)
    for prompt, in_chat, text in zip(prompts, chat, found, strict=True):
        said = lm.complete(prompt, chat=in_chat, max_new_tokens=6)
        assert text == prompt + ("\n" if in_chat else "") + said
    (record,) = score_facts(lm, [replace(FACT, chat=True)], settings=GENERATE)
    continued = record.generations.continuation
    assert continued == "\n" + lm.complete(FACT.text, chat=True, max_new_tokens=32)


@pytest.mark.parametrize("kind", ["bytelevel", "bytelevel-bos"])
def test_a_tokenizer_that_appends_an_end_token_changes_no_text_score_or_perplexity(kind: str) -> None:
    plain = tiny_tokenizer(kind)
    begins = plain("The")["input_ids"][0] == BOS
    ending = tiny_tokenizer.__wrapped__(kind)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if begins else "$A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    fact = replace(FACT, attribute_prompts=("The city of Rome", "The museum"))
    found = []
    for tokenizer in (plain, ending):
        lm = language_model("gpt2", tokenizer)
        method = le.MEMIT(layers=(1, 2), lambda_=5.0, values=le.ValueSettings(steps=2))
        edit = le.edit(lm, [fact], method, covariance=covariance(lm), settings=le.RunSettings(progress_bar=False))
        scores = le.evaluate(lm, [fact], settings=GENERATE).scores
        texts = le.write_references(lm, [fact], progress_bar=False).texts
        windows = held_out_windows(lm, [lm.encode(["The river of the city is old. " * 4])[0]])
        found.append((edit.record.inputs["contexts"], scores, texts, HeldOutText(lm, windows).nll))
    assert found[0] == found[1]


# Checks before work

LONG = "The river rises in the hills to the north of the city. " * 40


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": LONG + "{} is"},
        {"target_new": LONG.strip()},
        {"target_true": LONG.strip()},
        {"paraphrase_prompts": (LONG.strip(),)},
        {"neighborhood_prompts": (LONG.strip(),)},
        {"portability": ((LONG.strip(), "Po"),)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_no_text_of_a_fact_may_exceed_the_positions(model_type: str, changes) -> None:
    lm = language_model(model_type)
    lm.forward = lm.forward_packed = None  # type: ignore[method-assign, assignment]
    with pytest.raises(le.FactError, match=r"fact 1: .* tokens; tiny has 256 positions"):
        le.evaluate(lm, [FACT, replace(FACT, subject="Spain", **changes)], settings=QUIET)


def test_nor_any_generated_text() -> None:
    lm = language_model("gpt2", tiny_tokenizer("bytelevel"))
    nearly = lm.decode(lm.encode([LONG])[0][:250])
    fits = replace(FACT, generation_prompts=(nearly.strip(),))  # as long as sampled texts, so not continued
    check_scored(lm, [fits], GENERATE)
    prompt = lm.decode(lm.encode([LONG])[0][:240]).strip() + " {}"
    long = replace(FACT, prompt=prompt)
    check_scored(lm, [long])
    with pytest.raises(le.FactError, match=r"fact 0: .* with 32 new ones too many; tiny has 256 positions"):
        check_scored(lm, [long], GENERATE)


def test_held_out_windows_may_not_either_nor_hold_tokens_without_a_row(tmp_path) -> None:
    lm = language_model()
    with pytest.raises(ValueError, match="has 257 tokens; tiny has 256 positions"):
        held_out_windows(lm, [[5] * 257])
    lm.tokenizer.add_tokens(["Zog"])
    (tmp_path / "text.txt").write_text("The king Zog is old.")
    with pytest.raises(ValueError, match=r"the token 'Zog' .* has no row in the embedding of tiny"):
        held_out_windows(lm, tmp_path / "text.txt")


@pytest.mark.parametrize(
    "changes",
    [
        {"target_new": "Zog"},
        {"target_true": "Zog"},
        {"neighborhood_target": "Zog"},
        {"paraphrase_prompts": ("The king Zog",)},
        {"portability": (("The river there", "Zog"),)},
        {"end_turn": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_no_text_of_a_fact_may_hold_a_token_without_a_row_not_even_as_its_last(changes) -> None:
    tokenizer = tiny_tokenizer.__wrapped__("bytelevel")
    tokenizer.add_tokens(["Zog"])
    if "end_turn" in changes:
        tokenizer.add_special_tokens({"eos_token": "Zog"})
    lm = language_model(tokenizer=tokenizer)
    lm.forward = lm.forward_packed = None  # type: ignore[method-assign, assignment]
    fact = replace(FACT, subject="Spain", **changes)
    said = r"the token 'Zog' \(id 384\) in .* has no row in the embedding"
    with pytest.raises(le.FactError, match=rf"fact 1: {said}"):
        le.evaluate(lm, [FACT, fact], settings=QUIET)
    if "target_new" in changes:
        with pytest.raises(le.LightEditError, match=said):
            score_targets(lm, [fact.text], ["Zog"])


def test_self_generated_text_needs_a_row_for_the_token_that_begins_it() -> None:
    tokenizer = tiny_tokenizer.__wrapped__("bytelevel")
    tokenizer.add_special_tokens({"bos_token": "[BEGIN]"})
    lm = language_model(tokenizer=tokenizer)
    lm.forward = None  # type: ignore[method-assign, assignment]
    for call in (partial(held_out_windows, lm, None), partial(le.estimate_covariance, lm, [1], progress_bar=False)):
        with pytest.raises(le.LightEditError, match=r"the token '\[BEGIN\]' \(id 384\) in '\[BEGIN\]' has no row"):
            call()


@pytest.mark.parametrize("call", [le.edit, le.evaluate_single])
def test_an_edit_is_refused_before_its_covariance_is_estimated(call, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model()
    lm.forward = lm.forward_packed = None  # type: ignore[method-assign, assignment]
    facts = [FACT, replace(FACT, prompt=LONG + "{} is")]
    with pytest.raises(le.FactError, match=r"fact 1: .* tiny has 256 positions"):
        call(lm, facts, le.MEMIT(layers=(1, 2)))
    with pytest.raises(le.UnsupportedModelError, match="no chat template"):
        call(language_model(tokenizer=tiny_tokenizer("bytelevel")), [FACT], le.MEMIT(layers=(1, 2)), chat=True)


def test_contexts_count_to_a_facts_length() -> None:
    lm = language_model("gpt2", tiny_tokenizer("bytelevel"))
    row = lm.encode([LONG])[0][:252]
    fact = le.Fact(f"{lm.decode(row).strip()} {{}}", "I", "Rome")
    contexts = ContextSettings(prefixes=(("The", 1, 10),))
    method = le.MEMIT(layers=(1, 2), contexts=contexts)
    with pytest.raises(le.FactError, match=r"fact 0: .* has \d+ tokens; tiny has 256 positions"):
        le.edit(lm, [fact], method, covariance=covariance(lm))


# Edits

SERVED = [
    replace(FACT, separator=""),
    replace(FACT, separator=":\n"),
    replace(FACT, chat=True),
    replace(FACT, chat=True, end_turn=True),
    replace(FACT, end_turn=True),
    le.Fact(prompt="The capital of the state", target_new="Rome"),
    le.Fact(prompt="The capital of the state", target_new="Rome", position=-2),
    le.Fact(prompt="Where is the king?", target_new="Rome", chat=True, end_turn=True),
]


@pytest.mark.parametrize("fact", SERVED, ids=lambda fact: f"{fact.subject}-{fact.serving}-{fact.position}")
def test_values_are_searched_on_the_texts_as_served(fact: le.Fact) -> None:
    """With δ = 0 the loss is the mean over contexts of the target's NLL."""
    lm = language_model("gpt2")
    contexts = Contexts(("{}", "The river is long. {}"), (0.5, 0.5))
    prompts = tokenize_facts(lm.tokenizer, [fact], contexts)
    (loss,) = ValueOptimization(lm, prompts, 1, "block", le.ValueSettings()).backward().tolist()
    texts = [template.replace("{}", fact.text) for template in contexts.templates]
    scored = score_targets(lm, texts, [fact.target_new] * 2, servings=[fact.serving] * 2)
    assert loss == pytest.approx(float(scored.nll.mean()), rel=1e-4)


@pytest.mark.parametrize("fact", SERVED, ids=lambda fact: f"{fact.subject}-{fact.serving}-{fact.position}")
def test_an_edit_of_a_fact_raises_its_target_as_served_and_is_taken_back_whole(fact: le.Fact) -> None:
    lm = language_model("gpt2")
    values = le.ValueSettings(lr=0.5, steps=25, clamp_norm_factor=5.0)
    method = le.MEMIT(layers=(1, 2), share=0.99, values=values, contexts=ContextSettings(prefixes=()))
    score = partial(score_targets, lm, [fact.text], [fact.target_new], servings=[fact.serving])
    before = score().nll
    edit = le.edit(lm, [fact], method, covariance=covariance(lm), settings=le.RunSettings(progress_bar=False))
    loss = edit.outcomes[0].loss  # what is written also moves other tokens, whose keys are alike in a random model
    assert loss is not None and loss < float(before)
    assert score().nll != before
    edit.revert(lm)
    assert score().nll == before
    assert edit.facts == [fact]


def test_chat_on_edit_serves_the_facts_so_and_the_edit_remembers_it(tmp_path) -> None:
    lm = language_model("gpt2")
    method = le.MEMIT(layers=(1, 2), lambda_=5.0, values=le.ValueSettings(steps=2))
    settings = le.RunSettings(progress_bar=False)
    edit = le.edit(lm, [FACT], method, covariance=covariance(lm), settings=settings, chat=True)
    edit.save(tmp_path / "edit")
    assert le.Edit.load(tmp_path / "edit").facts == [replace(FACT, chat=True)]


def test_each_fact_alone_is_scored_as_it_is_served() -> None:
    lm = language_model("gpt2")
    method = le.MEMIT(layers=(1, 2), lambda_=5.0, values=le.ValueSettings(steps=2))
    facts = [FACT, replace(FACT, subject="Spain", separator="")]
    found = le.evaluate_single(lm, facts, method, covariance=covariance(lm), settings=QUIET, chat=True)
    same = [replace(fact, chat=True, separator=" ") for fact in facts]
    assert found.scores == le.evaluate_single(lm, same, method, covariance=covariance(lm), settings=QUIET).scores
