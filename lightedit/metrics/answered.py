"""Metrics of whole answers: classes and generated texts. All values are shares, in [0, 1]."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from lightedit.lm import LanguageModel
from lightedit.lm.rowwise import RowwiseEdits
from lightedit.metrics.functional import unchanged

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answers(
    lm: LanguageModel,
    prompts: Sequence[str],
    max_new_tokens: int = 20,
    batch_size: int = 64,
    edits: RowwiseEdits | None = None,
) -> list[str]:
    """What a model of any kind answers to each prompt: the name of a class, or a greedy text up to its end.

    Args:
        lm: the model, in its present state.
        prompts: n texts.
        max_new_tokens: most tokens of a text.
        batch_size: prompts of one pass at most.
        edits: which edit each prompt sees on top of the changes in the weights, n rows.

    Raises:
        ArgumentError: the model cannot run a prompt.
    """
    new = lm.generate(prompts, max_new_tokens, batch_size=batch_size, edits=edits)
    rows = lm.encode(prompts)
    return [lm.continuation(row, ids).strip() for row, ids in zip(rows, new, strict=True)]


def exact_match(said: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """1 where both texts have the same words, else 0; [n] float64.

    Letter case, punctuation, the articles a, an and the, and white space do not count, as in SQuAD (Rajpurkar et al.,
    2016, arXiv 1606.05250).

    >>> exact_match(["The Tower.", "a tower"], ["tower", "towers"])
    tensor([1., 0.], dtype=torch.float64)
    """
    same = [_words(text) == _words(right) for text, right in zip(said, wanted, strict=True)]
    return torch.tensor(same, dtype=torch.float64)


def f1(said: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """F1 of the words that both texts have in common, [n] float64; words are those of `exact_match`.

    A word counts as often as it stands in both. GRACE's code compares sets of token ids with the end token among them,
    so that a wrong answer of one token scores 0.5; here it scores 0.

    >>> f1(["New York", "Rome", "Paris Paris"], ["York", "Paris", "Paris"])
    tensor([0.6667, 0.0000, 0.6667], dtype=torch.float64)
    """
    scores = []
    for text, right in zip(said, wanted, strict=True):
        one, other = _words(text), _words(right)
        common = sum((Counter(one) & Counter(other)).values())
        scores.append(2 * common / (len(one) + len(other)) if one or other else 1.0)
    return torch.tensor(scores, dtype=torch.float64)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def knowledge_editor_scores(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """KnowledgeEditor's scores of facts that were each edited alone (De Cao et al., 2021, arXiv 2104.08164).

    - success: the answer to the fact's text is the target.
    - retain: share of the unrelated texts whose answer is the one before the edit, right or wrong.
    - equivalence: share of the rephrasings that the edited model answers as it answers the fact's text, whatever that
      is. This is KnowledgeEditor's definition.
    - equivalence_accuracy: share of the rephrasings that it answers with the target. This is lightedit's. Both agree
      for facts that are a success.

    An answer is a class. Of several tokens, each is predicted from the target's tokens before it.

    Args:
        records: those of an `Evaluation`, with `before` for retain.

    Returns:
        Each score that at least one record has, in percent: a mean over records of means over their texts.
    """
    values: dict[str, list[float]] = {}
    for record in records:
        said = record["efficacy"]["predicted"]
        found = {"success": [float(record["efficacy"]["accuracy"][0] == 1)]}
        if "neighborhood" in record and "unchanged" in record["neighborhood"]:
            found["retain"] = record["neighborhood"]["unchanged"]
        if "paraphrase" in record:
            rephrased = record["paraphrase"]
            found["equivalence"] = unchanged(rephrased["predicted"], said * len(rephrased["predicted"])).tolist()
            found["equivalence_accuracy"] = [float(share == 1) for share in rephrased["accuracy"]]
        for name, shares in found.items():
            values.setdefault(name, []).append(mean(shares))
    return {name: 100 * mean(shares) for name, shares in values.items()}
