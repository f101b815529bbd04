"""Row "ig": attributing an answer to the neurons of all layers, against the published loop over layers and tokens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import Options, Result, WrongResultError
from benchmarks.published.neurons import integrated_gradients, key_module
from lightedit.analysis.prompts import answer_of
from lightedit.analysis.tracing import tokens_of_a_pass
from lightedit.data.builtin import builtin_facts
from lightedit.data.fact import Fact
from lightedit.lm import LanguageModel
from lightedit.methods.neurons.asking import ask
from lightedit.methods.neurons.attribution import Query, attribute, midpoints
from lightedit.progress import progress

TOLERANCE = 1e-3  # of a layer's largest attribution
_POINTS = 20
_FACTS = 3
_STEP = 6  # with --quick the loop attributes every so manieth layer


def row(options: Options) -> Result:
    """Measure the built-in model on the CPU in float32, on the first built-in facts."""
    lm = LanguageModel.load("smollm2", dtype="float32", device="cpu")
    return run(lm, builtin_facts()[:_FACTS], every=_STEP if options.quick else 1)


@dataclass(frozen=True)
class Attributed:
    """One fact attributed by both: seconds, tokens, and the largest difference as a share of a layer's largest."""

    fact: str
    tokens: int
    answer_tokens: int
    ours: float
    loop: float
    difference: float

    @property
    def ratio(self) -> float:
        return self.loop / self.ours


def run(lm: LanguageModel, facts: Sequence[Fact], points: int = _POINTS, every: int = 1) -> Result:
    """Attribute each fact's answer to the keys of all layers by both.

    The loop runs the whole prompt through the whole model for each layer and token of the answer, all points in one
    batch, as the published code does. It has the same points and neurons as we, so that results can be compared.

    Args:
        lm: the language model, on the CPU in float32.
        facts: the facts.
        points: points of the integral.
        every: the loop attributes every so manieth layer, and its time is scaled to all layers.

    Raises:
        WrongResultError: an attribution differs from the loop's by more than `TOLERANCE`.
    """
    measured = [_measure(lm, fact, points, every) for fact in facts]
    ours, loop = (sum(getattr(each, name) for each in measured) / len(measured) for name in ("ours", "loop"))
    table = [
        ("ours, s a fact", f"{ours:.2f}"),
        ("published loop, s a fact", f"{loop:.1f}"),
        ("times as fast", f"{loop / ours:.1f}"),
    ]
    figures = {"facts": [vars(each) | {"ratio": each.ratio} for each in measured], "points": points,
               "loop_layers": f"every {every}"}  # fmt: skip
    notes = [f"{each.fact!r}: {each.tokens} tokens, {each.answer_tokens} of its answer" for each in measured]
    if every > 1:
        notes.append(f"a quick look: the loop attributed one layer in {every}, and its time is scaled to all")
    return Result(table, figures, notes)


def _measure(lm: LanguageModel, fact: Fact, points: int, every: int) -> Attributed:
    queries = ask(lm, fact, [fact.text], answer_of(fact)).queries()
    started = time.perf_counter()
    found = attribute(lm, queries, range(lm.n_layers), midpoints(points), max_tokens=tokens_of_a_pass(lm))
    ours = time.perf_counter() - started
    layers = range(0, lm.n_layers, every)
    started = time.perf_counter()
    expected = _loop(lm, queries, layers, points, fact.text)
    loop = (time.perf_counter() - started) * lm.n_layers / len(layers)
    difference = max(
        float((found.scores[layer] - expected[layer]).abs().max() / expected[layer].abs().max()) for layer in layers
    )
    if not difference <= TOLERANCE:
        raise WrongResultError(
            f"{fact.text!r}: an attribution differs from the loop's by {difference:.1e} of the largest"
        )
    return Attributed(fact.text, len(queries[0].ids), len(queries), ours, loop, difference)


def _loop(
    lm: LanguageModel, queries: Sequence[Query], layers: Sequence[int], points: int, title: str
) -> dict[int, Tensor]:
    found = {}
    with progress(f"the published loop on {title!r}") as report:
        for number, layer in enumerate(layers, start=1):
            module, alphas = key_module(lm.model, layer), midpoints(points).tolist()
            found[layer] = torch.stack(
                [
                    integrated_gradients(lm.model, query.ids, query.target, module, "input", alphas, batch=points)
                    for query in queries
                ]
            )
            report(number, len(layers))
    return found
