"""Row "ops": each op on its live implementation, timed against what one would call instead."""

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks import Options, Result, WrongResultError
from benchmarks.registry import Case, cases, name_of
from lightedit.ops import implementations, use

SQUARE, COPY = 4096, 1 << 28  # side of the matrix product, and elements of the copy, that give the machine's ceilings
_REFERENCE = "its reference"
_REPEATS, _ENOUGH = 7, 20.0  # no more than so many, and none begun after so many seconds


def row(options: Options) -> Result:
    """Measure on the GPU where there is one, else on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return run(cases(device, options.quick), device, options.quick)


def run(chosen: Iterable[Case], device: torch.device, quick: bool = False) -> Result:
    """Check and then time every case.

    Raises:
        WrongResultError: an op's result is off by more than its case allows.
    """
    ceilings = _ceilings(device)
    figures, table = [], [(f"ceiling, {name}", _rate(name, ceiling)) for name, ceiling in ceilings.items()]
    for case in chosen:
        error = case.error()
        if not error <= case.tolerance:  # NaN fails too
            raise WrongResultError(
                f"{case.op}, {case.shape}: the result is {error:.1e} from the exact one, relative to its norm; at most "
                f"{case.tolerance:.0e} is expected, so no speed is reported"
            )
        live = implementations()[case.op][device.type]
        works = {"ours": case.work, **case.baselines}
        if live != "reference":
            works[_REFERENCE] = case.work
        seconds = _medians(works, device)
        ours = seconds.pop("ours")
        figure: dict[str, Any] = {"op": case.op, "shape": case.shape, "implementation": live, "error": error}
        figure |= {"seconds": ours, "baseline_seconds": seconds}
        figure["ratios"] = {name: theirs / ours for name, theirs in seconds.items()}
        figure["shares"] = shares = {
            name: amount / ours / ceilings[name]
            for name, amount in ((f"{name_of(case.units)} product", case.flops), ("copy", case.bytes))
            if amount is not None and name in ceilings
        }
        figures.append(figure)
        against = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in figure["ratios"].items())
        part = "".join(f"; {share:.0%} of the {name} ceiling" for name, share in shares.items())
        table.append((f"{case.op}, {case.shape}", f"{ours * 1e3:.1f} ms ({live}): {against}{part}"))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    notes = ["at a few sizes only; without --quick at all"] if quick else []
    return Result(table, {"device": name, "ceilings": ceilings, "cases": figures}, notes)


def _ceilings(device: torch.device) -> dict[str, float]:
    """Flop/s of a large product in each dtype, bytes/s of a large copy (read and written)."""
    ceilings = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        left, right = torch.randn(2, SQUARE, SQUARE, device=device).to(dtype)
        seconds = _medians({"": partial(torch.mm, left, right)}, device)[""]
        ceilings[f"{name_of(dtype)} product"] = 2 * SQUARE**3 / seconds
    source, target = torch.zeros(2, COPY // 2, device=device)
    ceilings["copy"] = 2 * source.nbytes / _medians({"": lambda: target.copy_(source)}, device)[""]
    return ceilings


def _medians(works: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a change of the machine's load meets all of them.

    What is named `_REFERENCE` runs on the reference, chosen before its time is taken.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    begun = time.perf_counter()
    while not (count := len(next(iter(seconds.values())))) or (
        count < _REPEATS and time.perf_counter() - begun < _ENOUGH
    ):
        for name, work in works.items():
            with use("reference") if name == _REFERENCE else nullcontext():
                _wait(device)
                start = time.perf_counter()
                work()
                _wait(device)
                seconds[name].append(time.perf_counter() - start)
    return {name: median(taken) for name, taken in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _rate(name: str, ceiling: float) -> str:
    return f"{ceiling / 1e9:.0f} {'GB/s' if name == 'copy' else 'Gflop/s'}"
