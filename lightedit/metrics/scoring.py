"""How probable a model finds given answers, teacher-forced: the raw numbers behind every metric."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from lightedit.data.prompts import encode_targets
from lightedit.lm import LanguageModel
from lightedit.lm.batch import by_length, pad
from lightedit.lm.packed import Span


@dataclass(frozen=True)
class TargetScores:
    """Scores of n (prompt, target) pairs, on the CPU.

    Attributes:
        nll: mean negative log-likelihood per target token in nats, [n] float64.
        token_accuracy: share of the target's tokens that are the most probable ones given those before them,
            [n] float64.
        predicted: the most probable token at the place of each of the target's, given those before it, n rows.
    """

    nll: Tensor
    token_accuracy: Tensor
    predicted: tuple[tuple[int, ...], ...]


@torch.no_grad()
def score_targets(
    lm: LanguageModel,
    prompts: Sequence[str],
    targets: Sequence[str],
    max_tokens: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> TargetScores:
    """Score each target after its prompt and one space.

    Equal pairs are scored once, and answers to one prompt share its pass where one text begins the other: answers of
    one token always do. Neither order nor `max_tokens` matters, floating-point rounding aside.

    Args:
        lm: the model, as it is now.
        prompts: n texts.
        targets: n answers, without leading space.
        max_tokens: tokens of one forward pass at most, padding included (but one row is always run whole).
        progress: called after each pass with (tokens read so far, tokens in all).

    Raises:
        FactError: a target cannot be tokenised; raised before any forward pass.
        FloatingPointError: a score is NaN or infinite.
    """
    pairs = list(zip(prompts, targets, strict=True))
    distinct = list(dict.fromkeys(pairs))
    encoded = encode_targets(lm.tokenizer, [prompt for prompt, _ in distinct], [target for _, target in distinct])
    texts = [tuple(ids[:-1]) for ids, _ in encoded]  # nothing is predicted from a target's last token
    rows, row_of = _longest(texts)
    pairs_of: list[list[int]] = [[] for _ in rows]
    for index, row in enumerate(row_of):
        pairs_of[row].append(index)

    nll = torch.zeros(len(distinct), dtype=torch.float64)
    token_accuracy = torch.zeros_like(nll)
    predicted: list[tuple[int, ...]] = [()] * len(distinct)
    done, total = 0, sum(map(len, rows))
    for group in by_length([len(row) for row in rows], max_tokens):
        answered = [index for row in group for index in pairs_of[row]]
        place = {row: number for number, row in enumerate(group)}
        reads = [  # (row, position) of what predicts each target token
            (place[row_of[index]], position)
            for index in answered
            for position in range(len(texts[index]) - encoded[index][1], len(texts[index]))
        ]
        at = list(dict.fromkeys(reads))  # answers to one prompt begin at the same place
        logits = _logits(lm, [rows[row] for row in group], at)
        number = {read: index for index, read in enumerate(at)}
        read_at = torch.tensor([number[read] for read in reads], device=logits.device)
        wanted = torch.tensor([token for i in answered for token in encoded[i][0][-encoded[i][1] :]]).to(logits.device)
        losses = (logits.logsumexp(dim=-1)[read_at] - logits[read_at, wanted]).cpu().double()
        said = logits.argmax(dim=-1)[read_at]
        hits = (said == wanted).cpu().double()
        counts = torch.tensor([encoded[index][1] for index in answered])
        pair_of = torch.arange(len(answered)).repeat_interleave(counts)
        zeros = torch.zeros(len(answered), dtype=torch.float64)
        nll[answered] = zeros.index_add(0, pair_of, losses) / counts
        token_accuracy[answered] = zeros.index_add(0, pair_of, hits) / counts
        for index, tokens in zip(answered, said.cpu().split(counts.tolist()), strict=True):
            predicted[index] = tuple(tokens.tolist())
        done += sum(len(rows[row]) for row in group)
        if progress is not None:
            progress(done, total)

    for index in (~nll.isfinite()).nonzero().flatten().tolist()[:1]:
        prompt, target = distinct[index]
        raise FloatingPointError(
            f"the negative log-likelihood of {target!r} after {prompt!r} is {nll[index].item()}; an edit may "
            "have ruined the model (revert it), or its dtype is too narrow (load it in float32)"
        )
    order_of = {pair: index for index, pair in enumerate(distinct)}
    order = torch.tensor([order_of[pair] for pair in pairs], dtype=torch.long)
    return TargetScores(nll[order], token_accuracy[order], tuple(predicted[index] for index in order))


def _longest(texts: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The texts that begin no other one, and for each text the index of one that begins with it.

    Attention is causal, so what is read in the shorter text stands in the longer one too.
    """
    rows: list[tuple[int, ...]] = []
    row_of: dict[tuple[int, ...], int] = {}
    for text in sorted(set(texts), reverse=True):  # those that begin with a text come right before it
        if not rows or rows[-1][: len(text)] != text:
            rows.append(text)
        row_of[text] = len(rows) - 1
    return rows, [row_of[text] for text in texts]


def _logits(lm: LanguageModel, rows: Sequence[Sequence[int]], at: Sequence[tuple[int, int]]) -> Tensor:
    """The model's logits at places (row, position), [places, vocabulary] in float32 or better."""
    row, position = (torch.tensor(column) for column in zip(*at, strict=True))
    if not lm.architecture.packs:
        with lm.before_head(len(rows), (row, position)) as states:
            lm.forward(pad(rows, lm.pad_id))
        return lm.head.logits(states[0].to(lm.head.weight.device))
    lengths = [len(text) for text in rows]
    place = torch.tensor([0, *accumulate(lengths)])[row] + position
    spans = [
        Span.of(torch.ones(len(list(same)), length, dtype=torch.bool, device=lm.device), length, None, lm.dtype)
        for length, same in groupby(lengths)
    ]
    ids = torch.tensor([token for text in rows for token in text])
    positions = torch.cat([torch.arange(length) for length in lengths])
    with lm.before_head(1, (torch.zeros_like(place), place)) as states:
        lm.forward_packed(ids, positions, spans)
    return lm.head.logits(states[0].to(lm.head.weight.device))
