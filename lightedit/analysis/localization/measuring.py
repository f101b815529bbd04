"""What is measured before and after an edit: probabilities of answers, and perplexities of texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Self

import torch
from torch import Tensor

from lightedit.analysis.localization.noised import NoisedSubjects
from lightedit.analysis.localization.scores import Measured
from lightedit.analysis.prompts import tokens_between
from lightedit.data.fact import Fact
from lightedit.data.prompts import KL_TEMPLATE, subject_positions
from lightedit.data.served import as_served, encode_served
from lightedit.errors import NumericalError
from lightedit.lm import LanguageModel
from lightedit.lm.batch import by_length, pad
from lightedit.lm.rowwise import RowwiseEdits

_TOKENS = 2048  # tokens of a pass at most
_HEAD_ROWS = 128  # positions whose logits exist at one time
_LARGEST_NLL = 80.0  # per token, so that a perplexity is finite


@dataclass(frozen=True)
class Scored:
    """A row after which tokens are scored.

    Attributes:
        ids: token ids that the model reads.
        targets: m token ids, which are predicted at the last m positions.
    """

    ids: list[int]
    targets: list[int]

    @classmethod
    def of(cls, ids: Sequence[int], count: int) -> Self:
        """The row of a text whose last `count` tokens are scored."""
        return cls(list(ids[:-1]), list(ids[-count:]))


@dataclass(frozen=True)
class Rows:
    """The rows from which one fact is measured. Fields are as those of `Measured`; empty for what has no texts.

    Attributes:
        rewrite: the fact's prompt with its target; in forcing one row for each draw of noise.
        paraphrase: the first paraphrase, likewise.
        neighborhood: the first neighbourhood prompt, likewise; it carries noise only if it holds the subject.
        essence: texts that begin with "{subject} is a".
    """

    rewrite: list[Scored]
    paraphrase: list[Scored]
    neighborhood: list[Scored]
    essence: list[Scored]

    @property
    def all(self) -> list[Scored]:
        return [*self.rewrite, *self.paraphrase, *self.neighborhood, *self.essence]


def rows_of(lm: LanguageModel, fact: Fact, texts: Sequence[Sequence[int]], noised: NoisedSubjects | None) -> Rows:
    """The rows of a fact.

    Args:
        lm: the model.
        fact: the fact with the target that is scored.
        texts: token ids of its essence texts.
        noised: puts noise at the subject; None for no noise.

    Raises:
        FactError: the target cannot be tokenised after a prompt.
    """
    assert fact.subject is not None
    prompts = [fact.text, *fact.paraphrase_prompts[:1], *fact.neighborhood_prompts[:1]]
    encoded = encode_served(lm.tokenizer, prompts, [fact.target_new] * len(prompts), [fact.serving] * len(prompts))
    rows: list[list[Scored]] = []
    for number, (prompt, row) in enumerate(zip(prompts, encoded, strict=True)):
        plain = Scored.of(row.ids, row.count)
        if noised is None:
            rows.append([plain])
            continue
        begin = row.start + (fact.prompt.index("{}") if not number else prompt.rfind(fact.subject))
        offsets = row.offsets[: len(row.ids) - row.count]
        subject = tokens_between(offsets, begin, begin + len(fact.subject)) if fact.subject in prompt else range(0)
        if subject:
            rows.append([Scored(ids, plain.targets) for ids in noised.samples(fact, plain.ids, subject)])
        else:  # a paraphrase of the fact without its subject cannot be noised
            rows.append([] if number == 1 and fact.paraphrase_prompts else [plain])
    rest = iter(rows[1:])
    return Rows(
        rows[0],
        next(rest) if fact.paraphrase_prompts else [],
        next(rest) if fact.neighborhood_prompts else [],
        _essence(lm, fact, texts, noised),
    )


def essence_prompt(fact: Fact) -> str:
    """The text that begins the essence texts of a fact."""
    return KL_TEMPLATE.replace("{}", str(fact.subject))


def _essence(
    lm: LanguageModel, fact: Fact, texts: Sequence[Sequence[int]], noised: NoisedSubjects | None
) -> list[Scored]:
    plain = [Scored.of(ids, len(ids) - 1) for ids in texts]
    if noised is None or not plain:
        return plain
    (prompt,), start = as_served(lm.tokenizer, [essence_prompt(fact)], False)
    ((_, last, first),) = subject_positions(lm.tokenizer, [prompt], [(start, start + len(str(fact.subject)))])
    subject = range(first, last + 1)
    return [
        Scored(noised.row(fact, row.ids, subject, sample), row.targets)  # the words that are scored stay the same
        for sample, row in enumerate(plain)
    ]


def check_rows(lm: LanguageModel, rows: Rows) -> None:
    """Raise ArgumentError if the model cannot run a row; for rows without noise."""
    lm.check_rows([row.ids for row in rows.all])
    lm.check_tokens([row.targets for row in rows.all])


def measure(lm: LanguageModel, facts: Sequence[Rows], edits: RowwiseEdits | None = None) -> list[Measured]:
    """Measure facts under the model's present weights.

    Args:
        lm: the model.
        facts: the rows of n facts.
        edits: the edit with which each fact's rows run, in addition to the weights; n rows.

    Raises:
        NumericalError: a probability is NaN.
    """
    rows = [row for fact in facts for row in fact.all]
    edits = (edits or RowwiseEdits.none(len(facts))).rows([i for i, fact in enumerate(facts) for _ in fact.all])
    found = iter(log_probabilities(lm, rows, edits))

    def mean(asked: list[Scored]) -> float | None:
        return fmean([math.exp(next(found)) for _ in asked]) if asked else None

    measured = []
    for fact in facts:
        rewrite, paraphrase, neighborhood = (mean(x) for x in (fact.rewrite, fact.paraphrase, fact.neighborhood))
        assert rewrite is not None
        nlls = [-next(found) / len(text.targets) for text in fact.essence]
        perplexity = fmean([math.exp(min(nll, _LARGEST_NLL)) for nll in nlls]) if nlls else None
        measured.append(Measured(rewrite, paraphrase, neighborhood, perplexity))
    return measured


@torch.no_grad()
def log_probabilities(lm: LanguageModel, rows: Sequence[Scored], edits: RowwiseEdits | None = None) -> list[float]:
    """The joint log-probability of each row's scored tokens, in nats.

    Args:
        lm: the model.
        rows: n rows.
        edits: the edit with which each row runs, in addition to the weights; n rows.
    """
    edits = edits or RowwiseEdits.none(len(rows))
    found = [0.0] * len(rows)
    for group in by_length([len(row.ids) for row in rows], _TOKENS):
        members = [rows[i] for i in group]
        at = [(i, len(row.ids) - m) for i, row in enumerate(members) for m in range(len(row.targets), 0, -1)]
        row_index, positions = torch.tensor(at).T
        with lm.with_edits(edits.rows(group)), lm.before_head(len(members), (row_index, positions)) as states:
            lm.forward(pad([row.ids for row in members], lm.pad_id))
        targets = torch.tensor([token for row in members for token in row.targets])
        logs = _log_probability(lm, states[0], targets).split([len(row.targets) for row in members])
        for index, own in zip(group, logs, strict=True):
            found[index] = float(own.sum())
    if any(map(math.isnan, found)):
        raise NumericalError("a probability is NaN; an edit may have ruined the model, or load it in float32")
    return found


def _log_probability(lm: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of each target, [n] float64, from the head's inputs, [n, d]."""
    head = lm.head
    parts = []
    for states, wanted in zip(hidden.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True):
        logits = head.logits(states.to(head.weight.device))
        chosen = logits.gather(1, wanted[:, None].to(logits.device))[:, 0]
        parts.append((chosen - logits.logsumexp(dim=1)).double().cpu())
    return torch.cat(parts)
