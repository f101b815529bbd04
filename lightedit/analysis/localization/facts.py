"""The facts of a study: which ones the model knows, and what is prepared for each before it is edited."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from lightedit.analysis.localization.effects import effects
from lightedit.analysis.localization.measuring import Scored, check_rows, essence_prompt, log_probabilities, rows_of
from lightedit.analysis.localization.noised import NoisedSubjects
from lightedit.analysis.localization.settings import LocalizationSettings, Problem
from lightedit.analysis.prompts import TracedPrompt, answer_of, traced_prompts
from lightedit.data.fact import Fact, FactError
from lightedit.digests import digest
from lightedit.errors import ArgumentError
from lightedit.lm import LanguageModel
from lightedit.lm.batch import pad

_CANDIDATES = 50  # most probable tokens among which one with a text is looked for
_TOP_K = 5  # of the sampled texts


@dataclass(frozen=True)
class StudiedFact:
    """A fact of a study, before it is edited.

    Attributes:
        fact: its prompt with the subject.
        answer: its true answer.
        probability: joint probability of that answer.
        said_under_noise: what the model says when the subject is noised; None if that is not asked.
        before_said: the text between the prompt and that, such as one space.
        effects: window -> the tracing effect of each layer.
        texts: token ids of its essence texts.
    """

    fact: str
    answer: str
    probability: float
    said_under_noise: str | None
    before_said: str
    effects: Mapping[int, Sequence[float]]
    texts: Sequence[Sequence[int]]

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Build it from what `to_dict` returns, also after a file."""
        found = {int(window): tuple(map(float, by_layer)) for window, by_layer in record["effects"].items()}
        texts = tuple(tuple(map(int, text)) for text in record["texts"])
        return cls(**{**record, "effects": found, "texts": texts})


def check_facts(lm: LanguageModel, facts: Sequence[Fact], settings: LocalizationSettings) -> list[TracedPrompt]:
    """Check that the facts can be studied, and tokenise them with their true answers.

    Raises:
        FactError: there are no facts; one has no subject, no true answer, cannot be tokenised, or has a text that is
            longer than the model's positions. The message says which fact, from 0.
    """
    prompts = traced_prompts(lm, facts)
    for number, (fact, prompt) in enumerate(zip(facts, prompts, strict=True)):
        if "injection" in settings.problems and fact.target_true is None:
            raise FactError(
                f"fact {number}: {fact.text!r} has no target_true, so its target_new is no error that could be "
                "injected; give one, or leave injection out of problems"
            )
        try:
            check_rows(lm, rows_of(lm, edited_fact("amplification", fact, None), [], None))
            check_rows(lm, rows_of(lm, edited_fact("injection", fact, None), [], None))
            lm.check_rows([prompt.ids[: prompt.length]], settings.continuation_tokens)
            (begin,) = lm.encode([essence_prompt(fact)])
            lm.check_rows([begin], max(1, settings.essence_tokens - len(begin)))
        except (ArgumentError, FactError) as error:
            raise FactError(f"fact {number}: {error}") from error
    return prompts


def known(
    lm: LanguageModel, prompts: Sequence[TracedPrompt], settings: LocalizationSettings
) -> tuple[dict[int, float], list[str]]:
    """Index -> the probability of the true answer, of the facts that the model knows; and the texts of the others.

    Raises:
        FactError: it knows none.
    """
    logs = log_probabilities(lm, [Scored(prompt.ids, prompt.targets) for prompt in prompts])
    chosen = {i: math.exp(log) for i, log in enumerate(logs) if math.exp(log) >= settings.min_probability}
    if settings.continuation_tokens and chosen:
        asked = [prompts[i].ids[: prompts[i].length] for i in chosen]
        written = lm.generate(asked, settings.continuation_tokens)
        said = {i: lm.continuation(row, new) for i, row, new in zip(chosen, asked, written, strict=True)}
        chosen = {i: p for i, p in chosen.items() if answer_of(prompts[i].fact) in said[i]}
    if not chosen:
        raise FactError(
            f"facts: the model knows none of the {len(prompts)}, so there is nothing to study; give facts that it "
            "knows, or lower min_probability and set continuation_tokens to 0"
        )
    return chosen, [prompt.fact.text for i, prompt in enumerate(prompts) if i not in chosen]


def studied(
    lm: LanguageModel,
    prompts: Sequence[TracedPrompt],
    probabilities: Sequence[float],
    settings: LocalizationSettings,
    level: float,
) -> list[StudiedFact]:
    """Prepare facts: trace them, ask what the model says under noise, and sample their essence texts.

    Args:
        lm: the unedited model.
        prompts: n facts.
        probabilities: that of each fact's true answer.
        settings: the study's settings.
        level: ν.
    """
    facts = [prompt.fact for prompt in prompts]
    traced = {window: effects(lm, facts, settings, window, level) for window in settings.windows}
    texts = _essence_texts(lm, facts, settings)
    found = []
    for i, (prompt, probability) in enumerate(zip(prompts, probabilities, strict=True)):
        said = says_under_noise(lm, prompt, settings, level) if "reversal" in settings.problems else ""
        target = said.strip()
        found.append(
            StudiedFact(
                prompt.fact.text,
                answer_of(prompt.fact),
                probability,
                target or None,
                said[: len(said) - len(said.lstrip())],
                {window: tuple(by_fact[i]) for window, by_fact in traced.items()},
                texts[i],
            )
        )
    return found


def edited_fact(problem: Problem, fact: Fact, prepared: StudiedFact | None) -> Fact:
    """The fact that is written and scored: that of the problem's target, with the first prompt of each kind.

    Args:
        problem: what the edit is for.
        fact: the fact.
        prepared: what was prepared for it; needed for reversal.
    """
    target, separator, end_turn = answer_of(fact), fact.separator, fact.end_turn
    if problem == "injection":
        target = fact.target_new
    if problem == "reversal":
        assert prepared is not None and prepared.said_under_noise is not None
        target, end_turn = prepared.said_under_noise, False
        separator = separator if fact.chat else prepared.before_said
    return Fact(
        fact.prompt,
        fact.subject,
        target,
        paraphrase_prompts=fact.paraphrase_prompts[:1],
        neighborhood_prompts=fact.neighborhood_prompts[:1],
        separator=separator,
        chat=fact.chat,
        end_turn=end_turn,
    )


@torch.no_grad()
def says_under_noise(lm: LanguageModel, prompt: TracedPrompt, settings: LocalizationSettings, level: float) -> str:
    """What the model says to a prompt with a noised subject, with the white space before it.

    Each token is the most probable one by its mean probability over the draws of noise, given those before it. Tokens
    without a text, such as that of the text's end, are passed over.
    """
    noised = NoisedSubjects(lm, settings, level)
    rows = noised.samples(prompt.fact, prompt.ids[: prompt.length], prompt.subject)
    said: list[int] = []
    with noised.known():
        for _ in range(settings.reversal_tokens or len(prompt.targets)):
            at = (torch.arange(len(rows)), torch.tensor([len(row) + len(said) - 1 for row in rows]))
            with lm.before_head(len(rows), at) as states:
                lm.forward(pad([[*row, *said] for row in rows], lm.pad_id))
            p = lm.head.log_probs(states[0]).double().exp().mean(dim=0)
            best = p.topk(min(_CANDIDATES, len(p))).indices.tolist()
            said.append(next(token for token in [*best, best[0]] if _has_text(lm, prompt, said, token)))
    return lm.continuation(prompt.ids[: prompt.length], said)


def _has_text(lm: LanguageModel, prompt: TracedPrompt, said: list[int], token: int) -> bool:
    before = prompt.ids[: prompt.length]
    text = lm.continuation(before, [*said, token])
    return bool(text.strip()) and "\ufffd" not in text and text != lm.continuation(before, said)


def _essence_texts(
    lm: LanguageModel, facts: Sequence[Fact], settings: LocalizationSettings
) -> list[tuple[tuple[int, ...], ...]]:
    """The essence texts of each fact, as token ids; each text draws from a generator of its own."""
    begins = lm.encode([essence_prompt(fact) for fact in facts])
    asked = [(i, number) for i in range(len(facts)) for number in range(settings.essence_texts)]
    seeds = [int(digest(f"{settings.seed}/{facts[i].text}/{number}")[:15], 16) for i, number in asked]
    new = max(1, settings.essence_tokens - min(map(len, begins)))
    written = lm.generate([begins[i] for i, _ in asked], new, top_k=_TOP_K, seed=seeds)
    found: list[list[tuple[int, ...]]] = [[] for _ in facts]
    for (i, _), tokens in zip(asked, written, strict=True):
        most = max(1, settings.essence_tokens - len(begins[i]))
        found[i].append((*begins[i], *tokens[:most]))
    return [tuple(texts) for texts in found]
