"""Row "covariance": the second moments of several layers in one pass against one layer after the other."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks import Options, Result, WrongResultError
from lightedit.data.builtin import builtin_facts
from lightedit.data.texts import read_texts, token_windows
from lightedit.lm import LanguageModel, Place
from lightedit.lm.batch import pad
from lightedit.lm.hooks import capture, stop_after
from lightedit.ops import implementations, use
from lightedit.statistics.estimation import estimate_covariance

LAYERS = (4, 5, 6, 7, 8)
TOLERANCE = 1e-5  # ||ours - published|| / ||published|| of a layer's matrix
_LENGTH, _ROWS, _REPEATS = 256, 16, 3


def row(options: Options) -> Result:
    """Measure the built-in model on the CPU in float32, with 10 tokens per input dimension."""
    lm = LanguageModel.load("smollm2", dtype="float32", device="cpu")
    return run(lm, LAYERS, 10 * lm.weight(Place(0)).shape[1])


def run(lm: LanguageModel, layers: Sequence[int], tokens: int) -> Result:
    """Time, in turns: ours, ours with the ops on their references, and the published way.

    Args:
        lm: the model, on the CPU.
        layers: layers to estimate.
        tokens: how many.

    Raises:
        WrongResultError: a layer's matrix differs from the published way's by more than `TOLERANCE`.
    """
    names = "ours", "ours, with the ops on their references", "published, one layer after the other"
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(_text(lm, tokens), encoding="utf-8")
        ours = partial(
            estimate_covariance, lm, layers, text=text, tokens=tokens, sequence_length=_LENGTH, progress_bar=False
        )
        for _ in range(_REPEATS):
            found = _timed(seconds[names[0]], ours)
            with use("reference"):
                _timed(seconds[names[1]], ours)
            expected = _timed(seconds[names[2]], lambda: _published(lm, layers, text, tokens))
    difference = max(float((found[Place(layer)] - mean).norm() / mean.norm()) for layer, mean in expected.items())
    if not difference <= TOLERANCE:  # NaN fails too
        raise WrongResultError(
            f"a layer's matrix is {difference:.1e} from the published way's, relative to its norm; at most "
            f"{TOLERANCE:.0e} is expected, so no speed is reported"
        )
    taken = {name: median(times) for name, times in seconds.items()}
    live = implementations()["second_moment_"]["cpu"]
    table = [
        (f"ours, {len(layers)} layers in one pass ({live})", f"{taken[names[0]]:.2f} s for {tokens} tokens"),
        *((f"{name}, over ours", f"{taken[name] / taken[names[0]]:.2f}") for name in names[1:]),
        ("largest relative difference of a matrix", f"{difference:.1e}"),
    ]
    figures = {
        "layers": list(layers),
        "tokens": tokens,
        "implementation": live,
        "seconds": taken,
        "largest_difference": difference,
    }
    return Result(table, figures, [])


def _text(lm: LanguageModel, tokens: int) -> str:
    """The built-in facts as a text of at least so many tokens."""
    once = ". ".join(f"{fact.text} {fact.target_true}" for fact in builtin_facts())
    return once * (tokens // len(lm.encode([once])[0]) + 1)


def _timed(seconds: list[float], work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    seconds.append(time.perf_counter() - start)
    return result


@torch.no_grad()
def _published(lm: LanguageModel, layers: Sequence[int], text: Path, tokens: int) -> dict[int, Tensor]:
    """As the published code: the text is run anew for each layer, up to it, and whole products are summed."""
    windows = token_windows(lm, read_texts(text), tokens, _LENGTH)
    means = {}
    for layer in layers:
        module = lm.module(Place(layer))
        gram, count = torch.zeros(2 * lm.weight(Place(layer)).shape[1:]), 0
        for start in range(0, len(windows), _ROWS):
            batch = pad(windows[start : start + _ROWS], lm.pad_id)
            with capture({0: module}, len(batch.ids), inputs=True) as states, stop_after(module):
                lm.forward(batch)
            keys = states[0][batch.mask].float()
            gram.addmm_(keys.T, keys)
            count += len(keys)
        means[layer] = gram / count
    return means
