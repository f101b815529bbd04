"""The diagonal of the Fisher information of facts: how much their losses depend on each weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightedit.data.prompts import FactPrompts
from lightedit.lm import LanguageModel, Place
from lightedit.ops import target_nll_kl


@torch.enable_grad()
def fisher_information(
    lm: LanguageModel, prompts: Sequence[FactPrompts], places: Sequence[Place]
) -> dict[Place, Tensor]:
    """F = mean over facts of g², with g the gradient of one fact's loss (Kirkpatrick et al., 2017, arXiv 1612.00796).

    The loss is the mean NLL of the target's tokens, each predicted from the true tokens before it, under the present
    weights. g is squared elementwise for each fact, before the mean. A fact takes one forward and backward pass.

    Args:
        lm: the model.
        prompts: at least one fact.
        places: places with matrices.

    Returns:
        Place -> F, [d_out, d_in], float32 or wider.
    """
    fisher: dict[Place, Tensor] = {}
    head = lm.head
    reference = torch.empty(
        0, len(head.weight), dtype=torch.promote_types(head.weight.dtype, torch.float32), device=head.weight.device
    )
    for fact in prompts:
        reads = [(i, position) for i, row in enumerate(fact.rows) for position in lm.reads(row.ids, row.targets)]
        weights = [1 / (len(fact.rows) * len(row.targets)) for row in fact.rows for _ in row.targets]
        rows, positions = torch.tensor(reads).T
        with lm.probe(places) as probes, lm.before_head(len(fact.rows), (rows, positions)) as states:
            lm.forward(lm.batch([row.ids for row in fact.rows], [row.targets for row in fact.rows]))
        targets = torch.tensor([token for row in fact.rows for token in row.targets], device=head.weight.device)
        nll, _ = target_nll_kl(states[0], head, targets, reference)
        (nll * torch.tensor(weights, device=nll.device, dtype=nll.dtype)).sum().backward()
        for place in places:
            grads, inputs = (part.flatten(0, 1) for part in (probes[place].grads, probes[place].inputs))
            wide = torch.promote_types(grads.dtype, torch.float32)
            square = (grads.to(wide).T @ inputs.to(wide)).square_() / len(prompts)
            fisher[place] = fisher[place] + square if place in fisher else square
    return fisher
