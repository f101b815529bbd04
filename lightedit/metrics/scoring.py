"""Teacher-forced scores of given answers, from which the metrics are computed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightedit.data.fact import Serving
from lightedit.data.served import Pair, encode_pairs
from lightedit.errors import ArgumentError, NumericalError
from lightedit.lm import LanguageModel
from lightedit.lm.distinct import distinct
from lightedit.lm.packed import Span
from lightedit.lm.rowwise import RowwiseEdits


@dataclass(frozen=True)
class TargetScores:
    """Scores of n (prompt, target) pairs, on the CPU.

    Attributes:
        nll: mean negative log-likelihood per target token in nats, [n] float64.
        token_accuracy: share of the target's tokens that are the most probable ones given those before them,
            [n] float64.
        predicted: for each pair, the most probable token at the position of each target token, given those before it.
        rank: the worst rank of the target's tokens given those before it, [n]; 1 for the most probable token.
    """

    nll: Tensor
    token_accuracy: Tensor
    predicted: tuple[tuple[int, ...], ...]
    rank: Tensor


@torch.no_grad()
def score_targets(
    lm: LanguageModel,
    prompts: Sequence[str],
    targets: Sequence[str],
    batch_size: int = 64,
    report: Callable[[int, int], None] | None = None,
    edits: RowwiseEdits | None = None,
    servings: Sequence[Serving] | None = None,
) -> TargetScores:
    """Score each target after its prompt, as both reach the model.

    Equal pairs are scored once. Answers to one prompt share the prompt's states if rows can be packed. Otherwise a text
    shares the states of a longer text that begins with it, as for answers of one token. The classes of a classifier
    share those of their prompt. The order of pairs and `batch_size` change scores by floating-point rounding only.

    Args:
        lm: the model, in its present state.
        prompts: n texts.
        targets: n answers, without separator.
        batch_size: texts of one forward pass at most; bounds memory.
        report: called after each pass with (tokens read so far, tokens in all).
        edits: which edit each pair sees on top of the changes in the weights, n rows.
        servings: how each pair reaches the model, such as `fact.serving`; None for after one space, without a chat
            template.

    Raises:
        ArgumentError: `batch_size` is less than 1, or the model cannot run a text, such as one longer than its
            positions; raised before any forward pass.
        FactError: a target cannot be tokenised; raised before any forward pass.
        UnsupportedModelError: a pair is served in the chat template, and there is none.
        NumericalError: a score is NaN or infinite.
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size: got {batch_size}, expected at least 1")
    edits = edits or RowwiseEdits.none(len(prompts))
    servings = servings or [Serving()] * len(prompts)
    asked, place_of = distinct(zip(edits.of_row.tolist(), prompts, targets, servings, strict=True))
    _, *columns = zip(*asked, strict=True) if asked else ([],) * 4
    pairs = encode_pairs(lm, *columns)
    if not lm.answers.apart:
        lm.check_tokens([pair.targets for pair in pairs])
    lm.check_rows([pair.ids for pair in pairs])
    rows, answers = _laid_out(lm, asked, pairs)
    answers_of: list[list[int]] = [[] for _ in rows]
    for index, answer in enumerate(answers):
        answers_of[answer.row].append(index)

    nll = torch.zeros(len(asked), dtype=torch.float64)
    token_accuracy = torch.zeros_like(nll)
    rank = torch.zeros(len(asked), dtype=torch.long)
    predicted: list[tuple[int, ...]] = [()] * len(asked)
    done, total = 0, sum(len(row.ids) for row in rows)
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row].ids))  # so the time left is not underestimated
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        indices = [index for row in group for index in answers_of[row]]
        found = _score(lm, {row: rows[row] for row in group}, [answers[index] for index in indices], edits)
        nll[indices], token_accuracy[indices], rank[indices] = found.nll, found.token_accuracy, found.rank
        for index, tokens in zip(indices, found.predicted, strict=True):
            predicted[index] = tokens
        done += sum(len(rows[row].ids) for row in group)
        if report is not None:
            report(done, total)
    _check_finite(nll, asked)
    answers_said = tuple(predicted[place] for place in place_of)
    return TargetScores(nll[place_of], token_accuracy[place_of], answers_said, rank[place_of])


def _check_finite(nll: Tensor, asked: Sequence[tuple[int, str, str, Serving]]) -> None:
    for index in (~nll.isfinite()).nonzero().flatten().tolist()[:1]:
        _, prompt, target, _ = asked[index]
        raise NumericalError(
            f"the negative log-likelihood of {target!r} after {prompt!r} is {nll[index].item()}; an edit may "
            "have ruined the model (revert it), or its dtype is too narrow (load it in float32)"
        )


class _Answer(NamedTuple):
    """A target in a row: the indices of the tokens that predict its tokens, and its token ids, both [count]."""

    row: int
    read_at: list[int]
    ids: list[int]


@dataclass(frozen=True)
class _Row:
    """Texts with a common beginning, stored as a tree. Each token attends to its ancestors and itself.

    Attributes:
        edit: index of the edit that the row sees.
        prompt: number of tokens up to the one that stands for the prompt, which is a causal model's last one.
        ids: token ids, each after its parent.
        before: index of each token's parent, or -1.
        positions: number of ancestors of each token.
        answer: ids of the answer that is read from the row, where answers stand apart from prompts; else empty.
    """

    edit: int
    prompt: int
    ids: list[int]
    before: list[int]
    positions: list[int]
    answer: tuple[int, ...] = ()

    def add(self, text: Sequence[int]) -> list[int]:
        """Add a text to the tree and return the index of each of its tokens."""
        known = {pair: place for place, pair in enumerate(zip(self.before, self.ids, strict=True))}
        places: list[int] = []
        for position, token in enumerate(text):
            before = places[-1] if places else -1
            if (before, token) not in known:
                known[before, token] = len(self.ids)
                self.ids.append(token)
                self.before.append(before)
                self.positions.append(position)
            places.append(known[before, token])
        return places

    def seen(self) -> np.ndarray:
        """[tokens, tokens] bool; entry (i, j) is True if token i attends to token j."""
        seen = np.eye(len(self.ids), dtype=bool)
        for place, before in enumerate(self.before):
            if before >= 0:
                seen[place] |= seen[before]
        return seen


def _laid_out(
    lm: LanguageModel, asked: Sequence[tuple[int, str, str, Serving]], pairs: Sequence[Pair]
) -> tuple[list[_Row], list[_Answer]]:
    """The rows of pairs, and where each answer is read."""
    if not lm.answers.apart:
        rows, places = _rows(asked, pairs, lm.architecture.supports_packing)
        return rows, [
            _Answer(row, tokens[len(tokens) - len(pair.targets) :], pair.targets)
            for (row, tokens), pair in zip(places, pairs, strict=True)
        ]
    # the classes of one text are read from one row; the tokens of a decoder's answer are a row's own
    shared = lm.kind == "classifier"
    wanted = [
        _Row(edit, lm.answers.query(pair.ids) + 1, pair.ids, [], [], () if shared else tuple(pair.targets))
        for (edit, *_), pair in zip(asked, pairs, strict=True)
    ]
    numbers, row_of = distinct((row.edit, row.prompt, tuple(row.ids), row.answer) for row in wanted)
    rows = [_Row(edit, prompt, list(ids), [], [], answer) for edit, prompt, ids, answer in numbers]
    answers = [
        _Answer(row, list(lm.reads(pair.ids, pair.targets)), pair.targets)
        for row, pair in zip(row_of, pairs, strict=True)
    ]
    return rows, answers


def _rows(
    asked: Sequence[tuple[int, str, str, Serving]], pairs: Sequence[Pair], branching: bool
) -> tuple[list[_Row], list[tuple[int, list[int]]]]:
    """Build the rows of pairs; texts of one edit and of the same prompt tokens share a row where possible.

    Args:
        asked: (edit, prompt, target, serving) of each.
        pairs: the tokens of each.
        branching: whether rows may be trees. Otherwise a text shares the row of a longer text that begins with it.
            Causal attention leaves its states unchanged.

    Returns:
        The rows, and for each pair the index of its row and the indices of its tokens there.
    """
    rows: list[_Row] = []
    place: list[tuple[int, list[int]]] = [(0, [])] * len(pairs)
    rows_of: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for index in sorted(range(len(pairs)), key=lambda index: -len(pairs[index].ids)):
        edit, text = asked[index][0], pairs[index].ids
        prompt = len(text) + 1 - len(pairs[index].targets)
        candidates = rows_of.setdefault((edit, tuple(text[:prompt])), [])
        row = next((row for row in candidates if branching or rows[row].ids[: len(text)] == text), None)
        if row is None:
            row = len(rows)
            rows.append(_Row(edit, prompt, [], [], []))
            candidates.append(row)
        place[index] = row, rows[row].add(text)
    return rows, place


def _score(
    lm: LanguageModel, rows: Mapping[int, _Row], answers: Sequence[_Answer], edits: RowwiseEdits
) -> TargetScores:
    """Scores of the answers in `rows`, from one forward pass."""
    number_of = {row: number for number, row in enumerate(rows)}
    # answers to one prompt read their first token's logits at the same token
    at, read_of = distinct((number_of[answer.row], place) for answer in answers for place in answer.read_at)
    logits = _logits(lm, list(rows.values()), at, edits)
    read_at = torch.tensor(read_of, device=logits.device)
    wanted = torch.tensor([token for answer in answers for token in answer.ids]).to(logits.device)
    losses = (logits.logsumexp(dim=-1)[read_at] - logits[read_at, wanted]).cpu().double()
    said = logits.argmax(dim=-1)[read_at]
    hits = (said == wanted).cpu().double()
    ranks = 1 + (logits[read_at] > logits[read_at, wanted][:, None]).sum(-1).cpu()
    counts = torch.tensor([len(answer.ids) for answer in answers])
    answer_of = torch.arange(len(answers)).repeat_interleave(counts)
    zeros = torch.zeros(len(answers), dtype=torch.float64)
    return TargetScores(
        zeros.index_add(0, answer_of, losses) / counts,
        zeros.index_add(0, answer_of, hits) / counts,
        tuple(tuple(tokens.tolist()) for tokens in said.cpu().split(counts.tolist())),
        torch.stack([of_answer.max() for of_answer in ranks.split(counts.tolist())]),
    )


def _logits(lm: LanguageModel, rows: Sequence[_Row], at: Sequence[tuple[int, int]], edits: RowwiseEdits) -> Tensor:
    """The logits at (row, token index) pairs, [pairs, vocabulary] in float32 or wider."""
    at_row, at_place = (torch.tensor(column) for column in zip(*at, strict=True))
    edits = edits.of(torch.tensor([row.edit for row in rows]))
    prompts_end = lm.reading.prompts_end([row.prompt - 1 for row in rows])
    if not lm.architecture.supports_packing:
        with prompts_end, lm.with_edits(edits), lm.before_head(len(rows), (at_row, at_place)) as states:
            lm.forward(lm.batch([row.ids for row in rows], [row.answer for row in rows]))
        return lm.head.logits(states[0].to(lm.head.weight.device))
    spans = []
    for _, same in groupby(rows, key=lambda row: len(row.ids)):
        together = list(same)
        seen = torch.from_numpy(np.stack([row.seen() for row in together]))
        positions = torch.tensor([row.positions for row in together])
        spans.append(Span.of_trees(seen.to(lm.device), positions.to(lm.device), lm.dtype))
    starts = torch.tensor([0, *accumulate(len(row.ids) for row in rows)])
    ids, positions = (
        torch.tensor([number for row in rows for number in numbers(row)])
        for numbers in (lambda row: row.ids, lambda row: row.positions)
    )
    at_token = torch.zeros_like(at_row), starts[at_row] + at_place
    rectangles = [(span.rows, span.length) for span in spans]
    with prompts_end, lm.with_edits(edits, rectangles), lm.before_head(1, at_token) as states:
        lm.forward_packed(ids, positions, spans)
    return lm.head.logits(states[0].to(lm.head.weight.device))
