"""How probable a model finds given answers, teacher-forced: the raw numbers behind every metric."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightedit.data.prompts import encode_targets
from lightedit.lm import LanguageModel
from lightedit.lm.batch import by_length, pad


@dataclass(frozen=True)
class TargetScores:
    """Scores of n (prompt, target) pairs, on the CPU.

    Attributes:
        nll: mean negative log-likelihood per target token in nats, [n] float64.
        token_accuracy: share of the target's tokens that are the most probable ones given those before them,
            [n] float64.
    """

    nll: Tensor
    token_accuracy: Tensor


@torch.no_grad()
def score_targets(
    lm: LanguageModel,
    prompts: Sequence[str],
    targets: Sequence[str],
    max_tokens: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> TargetScores:
    """Score each target after its prompt and one space.

    Equal pairs are scored once. Neither their order nor `max_tokens` matters, floating-point rounding aside.

    Args:
        lm: the model, as it is now.
        prompts: n texts.
        targets: n answers, without leading space.
        max_tokens: tokens of one forward pass at most, padding included (but one row is always run whole).
        progress: called after each pass with (tokens computed so far, tokens in all).

    Raises:
        FactError: a target cannot be tokenised; raised before any forward pass.
        FloatingPointError: a score is NaN or infinite.
    """
    pairs = list(zip(prompts, targets, strict=True))
    distinct = list(dict.fromkeys(pairs))
    encoded = encode_targets(lm.tokenizer, [prompt for prompt, _ in distinct], [target for _, target in distinct])
    rows = [ids[:-1] for ids, _ in encoded]  # nothing is predicted from a target's last token
    groups = list(by_length([len(row) for row in rows], max_tokens))
    costs = [len(group) * max(len(rows[index]) for index in group) for group in groups]

    nll = torch.zeros(len(distinct), dtype=torch.float64)
    token_accuracy = torch.zeros_like(nll)
    done = 0
    for group, cost in zip(groups, costs, strict=True):
        counts = torch.tensor([encoded[index][1] for index in group])
        row_of = torch.arange(len(group)).repeat_interleave(counts)
        columns = torch.cat([torch.arange(len(rows[i]) - encoded[i][1], len(rows[i])) for i in group])
        batch = pad([rows[index] for index in group], lm.pad_id)
        logits = lm.forward(batch, head_at=(row_of, columns))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # [target tokens, vocabulary]
        wanted = torch.tensor([token for i in group for token in encoded[i][0][-encoded[i][1] :]]).to(logits.device)
        losses = F.cross_entropy(logits, wanted, reduction="none").cpu().double()
        hits = (logits.argmax(dim=-1) == wanted).cpu().double()
        zeros = torch.zeros(len(group), dtype=torch.float64)
        nll[group] = zeros.index_add(0, row_of, losses) / counts
        token_accuracy[group] = zeros.index_add(0, row_of, hits) / counts
        done += cost
        if progress is not None:
            progress(done, sum(costs))

    for index in (~nll.isfinite()).nonzero().flatten().tolist()[:1]:
        prompt, target = distinct[index]
        raise FloatingPointError(
            f"the negative log-likelihood of {target!r} after {prompt!r} is {nll[index].item()}; an edit may "
            "have ruined the model (revert it), or its dtype is too narrow (load it in float32)"
        )
    place = {pair: index for index, pair in enumerate(distinct)}
    order = torch.tensor([place[pair] for pair in pairs], dtype=torch.long)
    return TargetScores(nll[order], token_accuracy[order])
