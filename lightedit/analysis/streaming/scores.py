"""Scores of facts in a stream: F1 of generated answers, accuracy or perplexity."""

import math
from collections.abc import Sequence

from lightedit.analysis.streaming.settings import StreamSettings
from lightedit.data.fact import Fact
from lightedit.data.served import encode_targets
from lightedit.evaluation.scoring import continuations
from lightedit.lm import LanguageModel
from lightedit.metrics import score_targets
from lightedit.metrics.functional import answer_f1


def mean_score(lm: LanguageModel, facts: Sequence[Fact], settings: StreamSettings) -> float | None:
    """The mean score of facts in the present model, None for no facts; of perplexities the geometric mean.

    Raises:
        NumericalError: the model gives NaN or infinity.
    """
    if not facts:
        return None
    if settings.score == "f1":
        return float(answer_f1(_answers(lm, facts, settings), [fact.target_new for fact in facts]).mean())
    texts, targets = [fact.text for fact in facts], [fact.target_new for fact in facts]
    scored = score_targets(lm, texts, targets, settings.batch_size, servings=[fact.serving for fact in facts])
    if settings.score == "accuracy":
        return float((scored.rank == 1).double().mean())
    return math.exp(float(scored.nll.mean()))


def _answers(lm: LanguageModel, facts: Sequence[Fact], settings: StreamSettings) -> list[str]:
    """The greedy answers. Facts without `end_turn` get as many tokens as their targets have."""
    texts, targets = [fact.text for fact in facts], [fact.target_new for fact in facts]
    encoded = encode_targets(lm.tokenizer, texts, targets, [fact.serving for fact in facts])
    sizes = []
    for fact, (ids, count) in zip(facts, encoded, strict=True):
        room = count if lm.positions is None else lm.positions + 1 - (len(ids) - count)
        sizes.append(min(settings.answer_tokens, max(count, room)) if fact.end_turn else count)
    answers: dict[int, str] = {}
    for size in sorted(set(sizes)):
        chosen = [index for index, own in enumerate(sizes) if own == size]
        own_facts = [facts[index] for index in chosen]
        answers.update(zip(chosen, continuations(lm, own_facts, tokens=size), strict=True))
    return [answers[index] for index in range(len(facts))]


def paraphrases_of(facts: Sequence[Fact]) -> list[Fact]:
    """The paraphrases of facts, each as a fact of its own with the same target."""
    return [
        Fact(text, target_new=of.target_new, separator=of.separator, chat=of.chat, end_turn=of.end_turn)
        for of in facts
        for text in of.paraphrase_prompts
        if "{}" not in text
    ]
