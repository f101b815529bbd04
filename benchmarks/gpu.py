"""Measure the ops on a GPU: `python -m benchmarks.gpu FILE` prints a table and writes FILE; a wrong result fails it.

`python -m benchmarks.gpu --small` runs every kernel once at small odd sizes instead, for tools that watch its memory.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.run import environment, source_version
from lightedit.ops import (
    NATIVE_STATUS,
    Head,
    Implementation,
    add_low_rank_,
    implementations,
    preservation_memorization_solve,
    rowwise_low_rank,
    second_moment_,
    target_nll_kl,
    use,
)

D, TOKENS, FACTS, D_OUT = 14336, 8192, 100, 4096  # of llama-3-8b
VOCABULARY, HIDDEN, TARGETS, KNOWN = 128256, 4096, 512, 64
RUNS: tuple[Implementation, ...] = ("reference", "triton", "native")
GPU = torch.device("cuda")


def main() -> int:
    """Returns the exit status, 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    if arguments.small == (arguments.file is not None):
        parser.error("give either a file to write or --small")
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU and a torch that sees it")
    torch.manual_seed(0)
    if arguments.small:
        small()
        return 0
    figures: dict[str, Any] = {"ceilings": ceilings()}
    wrong: list[str] = []
    for measure in (second_moment, solve, add_low_rank, loss):
        figures[measure.__name__] = lines = []
        for line in measure(figures["ceilings"]):
            print("  ".join(f"{name} {_text(value)}" for name, value in line.items()), flush=True)
            lines.append(line)
            if not line.get("error", 0.0) <= line.get("tolerance", 0.0):  # NaN is wrong too
                wrong.append(
                    f"{measure.__name__}, {line['what']}: error {line['error']:.1e}, so its speed says nothing"
                )
        torch.cuda.empty_cache()
    record = {"row": "gpu", **source_version(), **environment(), "figures": figures, "wrong": wrong}
    record |= {"gpu": torch.cuda.get_device_name(), "native": NATIVE_STATUS, "live": implementations()}
    new = arguments.file.with_suffix(".new")
    new.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(new, arguments.file)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def seconds(work: Callable[[], object], repeats: int = 9) -> float:
    """Median of timed runs, after two that are not."""
    times = []
    for attempt in range(repeats + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        if attempt >= 2:
            times.append(start.elapsed_time(stop) / 1e3)
    return median(times)


def relative(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact|| for an exact result in float64."""
    return float((actual.double() - exact).norm() / exact.norm())


def ceilings() -> dict[str, float]:
    """flop/s of large products and bytes/s of a large copy, read and written."""
    found = {}
    for name, dtype, side in (("bfloat16", torch.bfloat16, 8192), ("float32", torch.float32, 4096)):
        a, b = torch.randn(2, side, side, device=GPU).to(dtype)
        found[name] = 2 * side**3 / seconds(partial(torch.mm, a, b))
    source, target = torch.randn(2, 1 << 28, device=GPU)
    found["copy"] = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    print("ceilings  " + "  ".join(f"{name} {value:.3g}" for name, value in found.items()), flush=True)
    return found


def runs(op: str) -> Iterator[Implementation]:
    """The implementations that `op` has on this machine, each in use while it is yielded."""
    for name in RUNS:
        try:
            choice = use(name)
            choice.__enter__()
        except RuntimeError as error:
            print(f"{op}: {error}", flush=True)
            continue
        try:
            if implementations()[op]["cuda"] == name:
                yield name
        finally:
            choice.__exit__(None, None, None)


def second_moment(ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Against `addmm_` in bfloat16 and in float32; the share is of the triangle's arithmetic."""
    some = slice(0, D, D // 128)
    for dtype in (torch.bfloat16, torch.float32):
        keys = torch.randn(TOKENS, D, device=GPU).to(dtype)
        below = torch.arange(D, device=GPU)[None, :] <= torch.arange(0, D, D // 128, device=GPU)[:, None]
        exact = torch.where(below, keys[:, some].double().T @ keys.double(), 0.0)
        gram, wide = torch.zeros(D, D, device=GPU), keys.float()
        baselines = {"addmm_ float32": seconds(partial(gram.addmm_, wide.T, wide), repeats=3)}
        if dtype == torch.bfloat16:
            half = torch.zeros(D, D, device=GPU, dtype=dtype)
            baselines["addmm_ bfloat16"] = seconds(partial(half.addmm_, keys.T, keys))
            del half
        del wide
        for masked in (False, True):
            mask = torch.ones(TOKENS, dtype=torch.bool, device=GPU) if masked else None
            for name in runs("second_moment_"):
                gram.zero_()
                second_moment_(gram, keys, mask)
                error = relative(torch.where(below, gram[some], 0.0), exact)
                taken = seconds(partial(second_moment_, gram, keys, mask), repeats=3 if name == "reference" else 9)
                yield {
                    "what": f"{name}, {str(dtype)[6:]}" + (", masked" if masked else ""),
                    "error": error,
                    "tolerance": 2e-5,
                    "seconds": taken,
                    **{f"x {baseline}": theirs / taken for baseline, theirs in baselines.items()},
                    "share of the product ceiling": TOKENS * D * (D + 1) / taken / ceilings[str(dtype)[6:]],
                }


def solve(_: dict[str, float]) -> Iterator[dict[str, Any]]:
    """X from a cached factor and the small system, against the dense d x d solve."""
    scales = torch.logspace(0, -2, D, dtype=torch.float64, device=GPU)
    matrix = torch.zeros(D, D, dtype=torch.float64, device=GPU)
    samples = torch.randn(2 * D, D, device=GPU) * scales.float()
    matrix += (samples.T @ samples) / (2 * D)
    del samples
    matrix.diagonal().add_(1e-4)
    factor = torch.linalg.cholesky(matrix)
    keys = torch.randn(D, FACTS, dtype=torch.float64, device=GPU) * scales[:, None]

    def dense(dtype: torch.dtype) -> Tensor:
        return torch.linalg.solve((matrix + keys @ keys.T).to(dtype), keys.to(dtype))

    def cached(dtype: torch.dtype) -> Tensor:
        k, lower = keys.to(dtype), factors[dtype]
        half = torch.linalg.solve_triangular(lower, k, upper=False)
        return preservation_memorization_solve(k, torch.linalg.solve_triangular(lower.T, half, upper=True), 1.0)[0]

    factors = {torch.float64: factor, torch.float32: factor.float()}
    exact = dense(torch.float64)
    baselines = {f"dense {str(dtype)[6:]}": seconds(partial(dense, dtype), repeats=2) for dtype in factors}
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-2)):
        for name in runs("preservation_memorization_solve"):
            if name == "triton" and dtype == torch.float64:
                continue  # which it leaves to the reference
            taken = seconds(partial(cached, dtype))
            yield {
                "what": f"{name}, {str(dtype)[6:]}, B {FACTS}",
                "error": relative(cached(dtype), exact),
                "tolerance": tolerance,
                "seconds": taken,
                **{f"x {baseline}": theirs / taken for baseline, theirs in baselines.items()},
            }


def add_low_rank(ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Into a bfloat16 weight; the share is of the bandwidth of a copy."""
    base = torch.randn(D_OUT, D, device=GPU).bfloat16()
    for rank in (1, 10, 100):
        left, right = torch.randn(D_OUT, rank, device=GPU), torch.randn(D, rank, device=GPU)
        exact = base.double() + left.double() @ right.double().T
        weight = base.clone()
        dense = seconds(lambda left=left, right=right, weight=weight: weight.add_((left @ right.T).bfloat16()))
        for name in runs("add_low_rank_"):
            weight.copy_(base)
            add_low_rank_(weight, left, right)
            error = relative(weight, exact)
            taken = seconds(partial(add_low_rank_, weight, left, right))
            moved = 2 * weight.nbytes + left.nbytes + right.nbytes
            yield {
                "what": f"{name}, B {rank}",
                "error": error,
                "tolerance": 3e-3,
                "seconds": taken,
                "x dense +=": dense / taken,
                "share of the copy ceiling": moved / taken / ceilings["copy"],
            }


def loss(_: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Forward and backward, against autograd over all logits: time, and memory above what was there before."""
    head = Head((torch.randn(VOCABULARY, HIDDEN, device=GPU) / HIDDEN**0.5).bfloat16())
    states = torch.randn(TARGETS + KNOWN, HIDDEN, device=GPU).bfloat16()
    targets = torch.randint(VOCABULARY, (TARGETS,), device=GPU)
    unedited = torch.randn(KNOWN, VOCABULARY, device=GPU).log_softmax(-1)

    def plain() -> Tensor:
        hidden = states.clone().requires_grad_()
        log_p = head.log_probs(hidden)
        nll = -log_p[:TARGETS].gather(1, targets[:, None]).sum()
        kl = torch.nn.functional.kl_div(unedited, log_p[TARGETS:], log_target=True, reduction="sum")
        return torch.autograd.grad(nll + kl, hidden)[0]

    def ours() -> Tensor:
        hidden = states.clone().requires_grad_()
        return torch.autograd.grad(target_nll_kl(hidden, head, targets, unedited)[0].sum(), hidden)[0]

    def peak(work: Callable[[], object]) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before

    exact, theirs, memory = plain().double(), seconds(plain), peak(plain)
    for name in runs("target_nll_kl"):
        taken = seconds(ours)
        yield {
            "what": f"{name}, {TARGETS + KNOWN} positions, {VOCABULARY} tokens",
            "error": relative(ours(), exact),
            "tolerance": 2e-2,
            "seconds": taken,
            "x autograd": theirs / taken,
            "peak bytes": peak(ours),
            "share of autograd's peak": peak(ours) / memory,
        }


def small() -> None:
    """Every kernel, at sizes that are no multiple of anything, with and without a mask and a total."""
    for name in ("triton", "native"):
        with use(name):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                keys = torch.randn(97, 143, device=GPU).to(dtype)
                for chosen in (None, torch.rand(97, device=GPU) < 0.7):
                    for gram in (torch.float32, torch.float64):
                        second_moment_(torch.zeros(143, 143, device=GPU, dtype=gram), keys, chosen)
                weight, left, right = keys.clone(), torch.randn(97, 21, device=GPU), torch.randn(143, 21, device=GPU)
                add_low_rank_(weight, left, right, None if dtype == torch.float32 else weight.float())
                add_low_rank_(weight.T, right, left)
                rowwise_low_rank(keys[None], left[None, :50], right[None])
                head = Head(torch.randn(131, 143, device=GPU).to(dtype))
                unedited = torch.randn(5, 131, device=GPU).log_softmax(-1)
                target_nll_kl(keys[:9], head, torch.randint(131, (4,), device=GPU), unedited)
            for size in (1, 17, 100, 128, 129):
                for real in (torch.float32, torch.float64):
                    systems = torch.randn(3, 143, size, device=GPU, dtype=real)
                    preservation_memorization_solve(systems, systems, 1.0)
            torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
