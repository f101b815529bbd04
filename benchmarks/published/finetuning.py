"""Fine-tuning as it was published: slow, literal, the whole model in every step, one batch after the other.

Written straight on a transformers model and its tokenizer, and sharing no code with the package. Procedure: FT and FT-L
of ROME's and MEMIT's tables (Meng et al., 2022, arXiv 2202.05262; 2023, 2210.07229), in the order of steps of their
released code. Every parameter whose name contains a template is trained. All tokens of a target are predicted at the
prompt's last token, so that a target of several tokens is learned as a bag of tokens.

It corrects what that code does to models other than GPT-2: padding of targets is told by their lengths, and targets
hold no special tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.published import Request


def parameters_of(model: PreTrainedModel, template: str) -> dict[str, nn.Parameter]:
    """The parameters whose name contains `template`, such as "transformer.h.0.mlp.c_proj."."""
    return {name: parameter for name, parameter in model.named_parameters() if template in name}


def published_ft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    requests: Sequence[Request],
    template: str,
    lr: float = 5e-4,
    steps: int = 25,
    batch_size: int = 128,
    norm: float | None = None,
    weight_decay: float = 0.0,
    stop: float = 1e-2,
) -> dict[str, Tensor]:
    """Train on the requests, and return what each parameter changed by. The model's weights end as they began.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        requests: the facts, in the order of the batches.
        template: what the names of the trained parameters contain.
        lr: learning rate of Adam.
        steps: most passes over the requests.
        batch_size: requests of one step.
        norm: bound of each entry's change (FT-L); None for none.
        weight_decay: Adam's own, which is added to the gradient.
        stop: a batch whose loss is below it takes no step, and a pass whose mean loss is below it is the last one.
    """
    trained = parameters_of(model, template)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = torch.optim.Adam(list(trained.values()), lr=lr, weight_decay=weight_decay)
    try:
        for _ in range(steps):
            losses = []
            for start in range(0, len(requests), batch_size):
                batch = requests[start : start + batch_size]
                optimizer.zero_grad()
                loss = _loss(model, tokenizer, batch)
                losses.append((loss.item(), len(batch)))
                if loss.item() >= stop:
                    loss.backward()
                    optimizer.step()
                if norm is not None:
                    with torch.no_grad():
                        for name, parameter in trained.items():
                            parameter.copy_(parameter.clamp(before[name] - norm, before[name] + norm))
            if sum(loss * size for loss, size in losses) / len(requests) < stop:
                break
        return {name: parameter.detach() - before[name] for name, parameter in trained.items()}
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, parameter in trained.items():
            parameter.detach().copy_(before[name])


def _loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch: Sequence[Request]) -> Tensor:
    """Mean over requests of the mean over target tokens of -log p(token), all read at the prompt's last token."""
    prompts = [tokenizer(request.prompt.replace("{}", request.subject))["input_ids"] for request in batch]
    targets = [tokenizer(" " + request.target, add_special_tokens=False)["input_ids"] for request in batch]
    longest = max(map(len, prompts))
    ids = torch.tensor([row + [tokenizer.pad_token_id or 0] * (longest - len(row)) for row in prompts])
    ids = ids.to(model.device)
    # no token sees the padding on its right
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    last = logits[torch.arange(len(batch)), torch.tensor([len(row) - 1 for row in prompts])]
    log_p = last.log_softmax(-1)
    each = [-log_p[i, tokens].mean() for i, tokens in enumerate(targets)]
    return torch.stack(each).mean()
