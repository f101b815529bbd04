"""MEND and KnowledgeEditor as they were published: one edit at a time, with whole matrices ΔW.

Written straight on a transformers model, and sharing no code with the package. Procedures: Mitchell et al., 2022 (MEND,
arXiv 2110.11309) and De Cao et al., 2021 (KnowledgeEditor, arXiv 2104.08164), as their released code carries them out:
MEND adds what it computes to the weights, and KnowledgeEditor's softmax runs over the rows of a matrix as it is stored.

Shapes: T = tokens, D = d_in + d_out, r = rank; a matrix is stored as [d_out, d_in] by Linear, [d_in, d_out] by Conv1D.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Network = Callable[[Tensor], Tensor]
EPS = 1e-7


class Row(NamedTuple):
    """Token ids of a text without its last token, and those of the answer at its end."""

    ids: Sequence[int]
    targets: Sequence[int]


class Layer(NamedTuple):
    """One residual layer of MEND's network: U [D, r], V [r, D], and bias, scale and offset [D]."""

    u: Tensor
    v: Tensor
    bias: Tensor
    scale: Tensor
    offset: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        return z + (self.scale * (z @ self.v.T @ self.u.T + self.bias) + self.offset).clamp(min=0)


@dataclass
class Normaliser:
    """Running statistics of z, updated token by token (Welford)."""

    count: int = 0
    mean: Tensor | None = None
    squares: Tensor | None = None

    def observe(self, tokens: Tensor) -> None:
        for token in tokens:
            self.count += 1
            if self.mean is None or self.squares is None:
                self.mean, self.squares = token.clone(), torch.zeros_like(token)
                continue
            shift = token - self.mean
            self.mean = self.mean + shift / self.count
            self.squares = self.squares + shift * (token - self.mean)

    def __call__(self, tokens: Tensor) -> Tensor:
        assert self.mean is not None and self.squares is not None
        return (tokens - self.mean) / ((self.squares / (self.count - 1)).sqrt() + EPS)


class MENDMatrix(NamedTuple):
    """One edited matrix: its module's name, its rate η, its layers, and the normaliser of its shape (None for none)."""

    name: str
    rate: Tensor
    layers: Sequence[Layer]
    norm: Normaliser | None


class KEMatrix(NamedTuple):
    """One edited matrix: its module's name, and what maps a condition to γ, α, δ, β and η, each row after row."""

    name: str
    network: Network


def nll(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The mean NLL over all answer tokens of a batch, from logits [rows, T, vocabulary]."""
    each = []
    for row, row_logits in zip(rows, logits, strict=True):
        log_p = row_logits[: len(row.ids)].log_softmax(-1)
        for back in range(len(row.targets), 0, -1):
            each.append(-log_p[len(row.ids) - back, row.targets[len(row.targets) - back]])
    return torch.stack(each).mean()


def padded(rows: Sequence[Row], pad: int = 0) -> Tensor:
    """Token ids [rows, T], padded on the right, where no token sees the padding."""
    width = max(len(row.ids) for row in rows)
    return torch.tensor([list(row.ids) + [pad] * (width - len(row.ids)) for row in rows])


@contextmanager
def _watched(model: PreTrainedModel, names: Sequence[str]) -> Iterator[dict[str, dict[str, Tensor]]]:
    """What enters each module ("x"), and after a backward pass the gradient of what leaves it ("delta")."""
    seen: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    handles = []
    for name in names:
        model.get_parameter(f"{name}.weight").requires_grad_(True)

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            seen[name]["x"] = args[0].detach()
            output.register_hook(lambda grad: seen[name].__setitem__("delta", grad.detach()))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for name in names:
            model.get_parameter(f"{name}.weight").requires_grad_(False)
            model.get_parameter(f"{name}.weight").grad = None


def mend_factors(model: PreTrainedModel, rows: Sequence[Row], names: Sequence[str]) -> dict[str, Tensor]:
    """z = [x; delta] of each matrix, [T, D], of the tokens where neither is zero, for the loss of the whole batch."""
    with torch.enable_grad(), _watched(model, names) as seen:
        nll(model(input_ids=padded(rows)).logits, rows).backward()
    found = {}
    for name, parts in seen.items():
        x, delta = (parts[part].flatten(0, 1) for part in ("x", "delta"))
        used = (x != 0).any(-1) & (delta != 0).any(-1)
        found[name] = torch.cat([x[used], delta[used]], dim=-1)
    return found


def published_mend(
    model: PreTrainedModel, rows: Sequence[Row], matrices: Sequence[MENDMatrix], observe: bool = False, sign: int = 1
) -> dict[str, Tensor]:
    """The changes that write the rows' answers together, parameter's name -> ΔW as it is stored.

    Args:
        model: the model.
        rows: prompts with answers.
        matrices: the edited matrices.
        observe: whether the normalisers first see the tokens, as in training.
        sign: 1 adds η Σ delta xᵀ, as published; -1 subtracts it, as the paper has it.
    """
    factors = mend_factors(model, rows, [matrix.name for matrix in matrices])
    changes = {}
    for matrix in matrices:
        if observe and matrix.norm is not None:
            matrix.norm.observe(factors[matrix.name])
    for matrix in matrices:
        module = model.get_submodule(matrix.name)
        z = factors[matrix.name] if matrix.norm is None else matrix.norm(factors[matrix.name])
        for layer in matrix.layers:
            z = layer(z)
        d_in = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
        x, delta = z[:, :d_in], z[:, d_in:]
        product = torch.einsum("ti,to->oi", x, delta)
        changes[f"{matrix.name}.weight"] = sign * matrix.rate * _as_stored(module, product)
    return changes


def _as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    return weight if isinstance(module, nn.Linear) else weight.T


def mend_step(
    model: PreTrainedModel,
    own: Row,
    rephrasing: Row,
    text: Sequence[int],
    matrices: Sequence[MENDMatrix],
    edit_weight: float,
    sign: int = 1,
) -> Tensor:
    """The training loss of one edit: edit_weight times the NLL of a rephrasing, plus KL(old || new) on a text."""
    with torch.no_grad():
        before = model(input_ids=torch.tensor([list(text)])).logits[0].log_softmax(-1)
    changes = published_mend(model, [own], matrices, sign=sign)
    weights = {name: model.get_parameter(name).detach() + change for name, change in changes.items()}

    def edited(ids: Sequence[int]) -> Tensor:
        return torch.func.functional_call(model, weights, (), {"input_ids": torch.tensor([list(ids)])}).logits

    after = edited(text)[0].log_softmax(-1)
    locality = (before.exp() * (before - after)).sum(-1).mean()
    return edit_weight * nll(edited(rephrasing.ids), [rephrasing]) + locality


def ke_condition(text: Sequence[int], embedding: Tensor, lstm: nn.LSTM, linear: Network) -> Tensor:
    """The vector of a condition text: tanh of a linear map of the final states of both directions, [width]."""
    _, (final, _) = lstm(embedding[torch.tensor(list(text))][None])
    return torch.tanh(linear(torch.cat([final[0, 0], final[1, 0]])))


def published_ke(
    model: PreTrainedModel, row: Row, condition: Tensor, matrices: Sequence[KEMatrix]
) -> Mapping[str, Tensor]:
    """The changes that write one answer, parameter's name -> ΔW as it is stored; they are added to the weights.

    ΔW = σ(η) (softmax(α) γᵀ ⊙ ∇W + softmax(β) δᵀ).
    """
    names = [f"{matrix.name}.weight" for matrix in matrices]
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    with torch.enable_grad():
        loss = nll(model(input_ids=padded([row])).logits, [row])
        gradients = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    changes = {}
    for matrix, name, gradient in zip(matrices, names, gradients, strict=True):
        model.get_parameter(name).requires_grad_(False)
        rows, columns = gradient.shape
        outputs = matrix.network(condition)
        gamma, alpha, delta, beta, eta = outputs.split([columns, rows, columns, rows, 1])
        scaled = torch.outer(alpha.softmax(0), gamma) * gradient
        changes[name] = eta.sigmoid() * (scaled + torch.outer(beta.softmax(0), delta))
    return changes
