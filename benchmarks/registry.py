"""The ops at the sizes of known models, each with what one would call instead."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightedit.methods.closed_form.preservation import Preservation
from lightedit.ops import (
    Head,
    add_low_rank_,
    mirror_,
    preservation_memorization_solve,
    rowwise_low_rank,
    second_moment_,
    target_nll_kl,
)

D_IN = {"smollm2": 1536, "gpt2-xl": 6400, "llama-2-7b": 11008, "llama-3-8b": 14336, "gpt-j-6b": 16384}
TOKENS = (1024, 4096, 16384, 65536)
FACTS = (1, 10, 100, 1000, 4096)


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: its name.
        shape: the size in words.
        work: runs the op.
        error: ||ours - exact|| / ||exact|| in float64, from a run of its own.
        tolerance: how large that may be.
        baselines: name -> what one would call instead.
        flops: of the arithmetic that the op needs, or None.
        bytes: that it must move at the least, or None.
        units: dtype of the product whose rate is the ceiling of `flops`.
    """

    op: str
    shape: str
    work: Callable[[], object]
    error: Callable[[], float]
    tolerance: float
    baselines: dict[str, Callable[[], object]]
    flops: float | None = None
    bytes: float | None = None
    units: torch.dtype = torch.float32


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Every case in turn, each with tensors of its own; `quick` keeps those that take seconds on a few CPU cores."""
    for d in D_IN.values():
        for tokens in TOKENS:
            for dtype in (torch.float32, torch.bfloat16):
                if not quick or (d <= 6400 and tokens == 4096):
                    yield second_moment_case(d, tokens, dtype, device)
        for facts in FACTS:
            if not quick or (d, facts) in ((1536, 10), (1536, 100), (6400, 100)):
                yield solve_case(d, facts, device)
                yield add_low_rank_case(d, facts, device)
    for facts in (100, 1000):
        if not quick or facts == 100:
            yield single_edits_case(6400, facts, device)
            yield rowwise_case(facts, 6400, device)
    for vocabulary in (49152, 128256):
        if not quick or vocabulary == 49152:
            yield target_nll_kl_case(vocabulary, device)


def _relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def second_moment_case(d: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Against whole products; with bfloat16 keys also against itself with float32 ones."""
    keys = torch.randn(tokens, d, device=device).to(dtype)
    whole, gram = keys.float(), torch.zeros(d, d, device=device)

    def error() -> float:
        gram.zero_()
        second_moment_(gram, keys)
        some = slice(0, d, max(1, d // 256))  # rows enough to tell, at a small share of the whole product in float64
        exact = keys[:, some].double().T @ keys.double()
        return _relative(mirror_(gram)[some], exact)

    baselines: dict[str, Callable[[], object]] = {"addmm_ in float32": lambda: gram.addmm_(whole.T, whole)}
    if dtype != torch.float32:
        same = torch.zeros(d, d, device=device, dtype=dtype)
        baselines[f"addmm_ in {name_of(dtype)}"] = lambda: same.addmm_(keys.T, keys)
        baselines["itself with float32 keys"] = lambda: second_moment_(gram, whole)
    shape = f"d {d}, {tokens} tokens, {name_of(dtype)}"
    flops = 1.0 * tokens * d * (d + 1)
    return Case("second_moment_", shape, lambda: second_moment_(gram, keys), error, 1e-5, baselines, flops, units=dtype)


def solve_case(d: int, facts: int, device: torch.device) -> Case:
    """The whole closed form with a cached factor, against the published d x d solve."""
    matrix, keys = _system(d, facts, device)
    preservation = Preservation(matrix)
    keys32 = keys.float()

    def ours() -> Tensor:
        return preservation_memorization_solve(keys, preservation.solve(keys), 1.0)[0]

    def dense() -> Tensor:
        return torch.linalg.solve(matrix + keys @ keys.T, keys)

    baselines: dict[str, Callable[[], object]] = {"float64 d x d solve": dense}
    baselines["float32 d x d solve"] = lambda: torch.linalg.solve(matrix.float() + keys32 @ keys32.T, keys32)
    shape = f"d {d}, B {facts}, float64, factor cached"
    flops = 2.0 * d * d * facts + 2.0 * d * facts * facts
    name = "preservation_memorization_solve"
    exact = lambda: _relative(ours(), dense())  # noqa: E731
    return Case(name, shape, ours, exact, 1e-8, baselines, flops, units=torch.float64)


def single_edits_case(d: int, facts: int, device: torch.device) -> Case:
    """One fact a system, for single edits that share one factor, against a loop."""
    matrix, keys = _system(d, facts, device)
    solved = Preservation(matrix).solve(keys)
    apart = [tensor.T[..., None].contiguous() for tensor in (keys, solved)]  # [B, d, 1]

    def ours() -> Tensor:
        return preservation_memorization_solve(*apart, 0.0)[0]

    def loop() -> Tensor:
        return torch.stack([x / (k.T @ x) for k, x in zip(*apart, strict=True)])

    shape = f"d {d}, {facts} systems of one fact, float64, X known"
    moved = 3.0 * 8 * facts * d
    name = "preservation_memorization_solve"
    return Case(name, shape, ours, lambda: _relative(ours(), loop()), 1e-12, {"one after the other": loop}, bytes=moved)


def _system(d: int, facts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A [d, d] as from keys with a spread of scales, and K [d, B]; float64."""
    scales = torch.logspace(0, -2, d, dtype=torch.float64, device=device)
    samples = torch.randn(2 * d, d, device=device) * scales.float()
    gram = torch.zeros(d, d, device=device)
    second_moment_(gram, samples)
    matrix = mirror_(gram).double() / (2 * d)
    matrix.diagonal().add_(1e-4)
    return matrix, torch.randn(d, facts, dtype=torch.float64, device=device) * scales[:, None]


def add_low_rank_case(d_in: int, facts: int, device: torch.device) -> Case:
    """Into a bfloat16 weight, against a dense change that is rounded twice."""
    d_out = d_in // 4
    base = torch.randn(d_out, d_in, device=device).bfloat16()
    left, right = torch.randn(d_out, facts, device=device), torch.randn(d_in, facts, device=device)
    weight = base.clone()

    def error() -> float:
        weight.copy_(base)
        add_low_rank_(weight, left, right)
        return _relative(weight, base.double() + left.double() @ right.double().T)

    def dense() -> None:
        nonlocal weight
        weight += (left @ right.T).bfloat16()

    shape = f"{d_out} x {d_in}, B {facts}, bfloat16"
    flops, moved = 2.0 * d_out * d_in * facts, 4.0 * d_out * d_in
    work = lambda: add_low_rank_(weight, left, right)  # noqa: E731
    return Case("add_low_rank_", shape, work, error, 2e-3, {"dense +=": dense}, flops, moved)


def rowwise_case(rows: int, d_in: int, device: torch.device) -> Case:
    """Changes of rank one, against each row's own dense matrix."""
    d_out, tokens = d_in // 4, 16
    x = torch.randn(rows, tokens, d_in, device=device).bfloat16()
    left, right = torch.randn(rows, d_out, 1, device=device), torch.randn(rows, d_in, 1, device=device)

    def dense() -> Tensor:
        return torch.stack(
            [states.float() @ (out @ into.T).T for states, out, into in zip(x, left, right, strict=True)]
        )

    def error() -> float:
        exact = torch.bmm(torch.bmm(x.double(), right.double()), left.double().mT)
        return _relative(rowwise_low_rank(x, left, right), exact)

    shape = f"{rows} rows of {tokens} tokens, {d_in} to {d_out}, bfloat16"
    work = lambda: rowwise_low_rank(x, left, right)  # noqa: E731
    return Case("rowwise_low_rank", shape, work, error, 4e-3, {"each row's dense matrix": dense})


def target_nll_kl_case(vocabulary: int, device: torch.device) -> Case:
    """Loss and gradient, against autograd over all logits at once."""
    d, targets, known = 576, 256, 64
    hidden = torch.randn(targets + known, d, device=device, requires_grad=True)
    head = Head(torch.randn(vocabulary, d, device=device) / d**0.5)
    ids = torch.randint(vocabulary, (targets,), device=device)
    unedited = torch.randn(known, vocabulary, device=device).log_softmax(-1)

    def ours() -> Tensor:
        return torch.autograd.grad(target_nll_kl(hidden, head, ids, unedited)[0].sum(), hidden)[0]

    def plain(states: Tensor = hidden, weight: Tensor = head.weight) -> Tensor:
        log_p = (states @ weight.T).log_softmax(-1)
        nll = -log_p[:targets].gather(1, ids[:, None]).sum()
        kl = torch.nn.functional.kl_div(unedited.to(log_p), log_p[targets:], log_target=True, reduction="sum")
        return torch.autograd.grad(nll + kl, states)[0]

    def error() -> float:
        exact = plain(hidden.detach().double().requires_grad_(), head.weight.double())
        return _relative(ours(), exact)

    shape = f"{targets + known} positions, {vocabulary} tokens, d {d}, float32, forward and backward"
    flops = 4.0 * (targets + known) * d * vocabulary
    return Case("target_nll_kl", shape, ours, error, 1e-4, {"autograd over all logits": plain}, flops)


def name_of(dtype: torch.dtype) -> str:
    """Such as float32."""
    return str(dtype).removeprefix("torch.")
