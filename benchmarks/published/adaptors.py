"""GRACE as it was published: literal, the whole model in every step, one fact after the other.

Written straight on a transformers model and its tokenizer, and sharing no code with the package. Procedure: Hartvigsen
et al., 2023 (arXiv 2211.11031), in the order of steps of the released code, for causal models.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.published import Request

IGNORED = -100  # label of a token without loss

Replaced = Literal["replace_last", "replace_prompt", "replace_all"]


@dataclass
class PublishedGRACE:
    """The codebook of one module, and its lookup in a forward pass of the module.

    Attributes:
        keys: [n, d_in].
        values: a list of one [d_out] each, or [n, d_out].
        radii: ε of each entry, a list or a tensor [n].
        labels: the labels of each entry's fact, prompt included.
        replaced: which positions receive a value: the query's, those before it, or all.
        query: position of the query token, for all rows; the last one where it is beyond the row.
        chosen: the entry in training, which answers at any distance; None for a lookup.
    """

    replaced: Replaced = "replace_last"
    keys: Tensor | None = None
    values: Any = field(default_factory=list)
    radii: Any = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    query: int = 10**9
    chosen: int | None = None

    def lookup(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The module's output [rows, tokens, d_out], with values where a key is near."""
        if self.keys is None:
            return output
        token = min(self.query, inputs.shape[1] - 1)
        distances = torch.cdist(self.keys, inputs[:, token], p=2)  # [n, rows]
        nearest, index = distances.min(0)
        radii = torch.as_tensor(self.radii).to(nearest)[index]
        if self.chosen is not None:
            index, radii = torch.full_like(index, self.chosen), torch.full_like(radii, torch.inf)
        table = self.values if isinstance(self.values, Tensor) else torch.stack(self.values)
        values = table[index][:, None].to(output.dtype)
        act = (nearest <= radii)[:, None, None]
        positions = {
            "replace_last": slice(token, token + 1),
            "replace_prompt": slice(0, token),
            "replace_all": slice(None),
        }[self.replaced]
        output = output.clone()
        output[:, positions] = torch.where(act, values, output[:, positions])
        return output

    @contextmanager
    def at(self, module: nn.Module) -> Iterator[None]:
        """Within the context, the codebook acts behind `module`."""
        handle = module.register_forward_hook(lambda _, args, output: self.lookup(args[0], output))
        try:
            yield
        finally:
            handle.remove()


def published_grace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    requests: Sequence[Request],
    module: nn.Module,
    start: Callable[[int], Tensor],
    radius: float = 1.0,
    lr: float = 1.0,
    steps: int = 100,
    expand: Literal["coverage", "moving_average"] = "coverage",
    replaced: Replaced = "replace_last",
) -> PublishedGRACE:
    """Edit the requests in, one after the other, and return the codebook; the model is unchanged.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        requests: the facts.
        module: the module behind which the codebook acts.
        start: the first value of a request's new entry, [d_out], by the request's index.
        radius: ε_init.
        lr: learning rate of Adam, which starts afresh for each request.
        steps: its steps.
        expand: how the radius grows to a query of the same label.
        replaced: which positions receive a value.
    """
    book = PublishedGRACE(replaced)
    for index, request in enumerate(requests):
        prompt = tokenizer(request.prompt.replace("{}", request.subject))["input_ids"]
        target = tokenizer(" " + request.target, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + target])
        labels = torch.tensor([[IGNORED] * len(prompt) + target])
        book.query = int((labels == IGNORED).sum()) - 1
        book.chosen = None
        entry, anew = _teach(book, _query(model, module, ids, book.query), labels[0], radius, expand)
        value = nn.Parameter((start(index) if anew else book.values[entry]).detach().clone())
        book.values[entry], book.chosen = value, entry
        optimizer = torch.optim.Adam([value], lr=lr)
        with book.at(module), torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[0, 1:], ignore_index=IGNORED)
                loss.backward()
                optimizer.step()
        book.values[entry] = value.detach()
    book.query, book.chosen = 10**9, None
    return book


def _teach(book: PublishedGRACE, query: Tensor, label: Tensor, radius: float, expand: str) -> tuple[int, bool]:
    """Let an entry answer the query; returns it, and whether its value starts anew."""
    if book.keys is None:
        _add(book, query, label, radius)
        return 0, True
    distances = torch.cdist(book.keys, query[None], p=2)[:, 0]
    smallest, nearest = distances.min(0)
    distance, i = float(smallest), int(nearest)
    if distance > radius + book.radii[i]:
        _add(book, query, label, radius)
        return len(book.radii) - 1, True
    if label.float().mean() == book.labels[i].float().mean():
        if distance > book.radii[i]:
            if expand == "moving_average":
                book.keys[i] = torch.stack([book.keys[i], query]).mean(0)
            book.radii[i] = distance
        return i, False
    book.radii[i] = distance / 2 - 1e-5
    _add(book, query, label, distance / 2)
    return len(book.radii) - 1, True


def _add(book: PublishedGRACE, query: Tensor, label: Tensor, radius: float) -> None:
    book.keys = query[None].clone() if book.keys is None else torch.vstack([book.keys, query[None]])
    book.values.append(torch.empty(0))
    book.radii.append(radius)
    book.labels.append(label)


@torch.no_grad()
def _query(model: PreTrainedModel, module: nn.Module, ids: Tensor, position: int) -> Tensor:
    """What enters the module at a position, [d_in]."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        seen.append(args[0][0, position].clone())

    handle = module.register_forward_hook(keep)
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]
