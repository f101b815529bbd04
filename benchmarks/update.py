"""Row "update": step 2 for a batch of facts against the published one, which solves a d x d system in float64."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median

import torch

from benchmarks import Options, Result, WrongResultError
from benchmarks.published import Request, published_memit
from benchmarks.values import load_facts
from lightedit.data.facts import Fact
from lightedit.data.prompts import tokenize_facts
from lightedit.lm import LanguageModel, Place
from lightedit.methods import MEMIT
from lightedit.methods.closed_form.keys import KeyWalk
from lightedit.methods.closed_form.writing import write_facts
from lightedit.ops import use
from lightedit.statistics.covariance import Covariance, Provenance

TOLERANCE = 1e-4  # ||ours - published|| / ||published|| of a layer's change, with float32 keys
_REPEATS = 5


def row(options: Options) -> Result:
    """Measure MEMIT's update of the built-in model on the CPU in float32."""
    facts, source = load_facts(options.facts)
    lm = LanguageModel.load("smollm2", dtype="float32", device="cpu")
    return run(lm, facts, MEMIT(layers=(4, 5, 6, 7, 8), lambda_=1000.0), [source])


def run(lm: LanguageModel, facts: Sequence[Fact], method: MEMIT, notes: Sequence[str] = ()) -> Result:
    """Time step 2 for given targets: ours, ours with the ops on their references, and the published one.

    The covariance is that of random keys: its values do not matter to the time.

    Args:
        lm: the model, on the CPU in float32; so it is left.
        facts: the facts.
        method: what to run.
        notes: passed on to the result.

    Raises:
        WrongResultError: a layer's change differs from the published one by more than `TOLERANCE`.
    """
    contexts = method.contexts.sample(lm)
    prompts = tokenize_facts(lm.tokenizer, facts, contexts)
    covariance = _random_covariance(lm, method.layers)
    present = KeyWalk(lm, prompts, Place(method.layers[0])).outputs(Place(method.value_layer, "block"))
    generator = torch.Generator().manual_seed(0)
    targets = present + 0.3 * present.norm(dim=0) * torch.randn(present.shape, generator=generator).double() / 24

    start = time.perf_counter()
    preservation = method.factors(lm, covariance)
    factors = time.perf_counter() - start
    seconds: dict[str, list[float]] = {"ours": [], "reference": []}
    changes = {}
    for _ in range(_REPEATS):
        for name, times in seconds.items():
            with use("reference") if name == "reference" else nullcontext():
                start = time.perf_counter()
                written = list(write_facts(lm, method, preservation, prompts, targets, ("benchmark", 0)))
                times.append(time.perf_counter() - start)
            changes[name] = {place.layer: change.dense().double() for place, change, _ in written}
            lm.weights.remove([("benchmark", 0)])
    requests = [Request(fact.prompt, fact.subject, fact.target_new) for fact in facts]
    start = time.perf_counter()
    published = published_memit(
        lm.model, lm.tokenizer, requests, contexts.templates, list(targets.T), method.layers,
        {layer: covariance[Place(layer)] for layer in method.layers}, method.lambda_,
    )  # fmt: skip
    theirs = time.perf_counter() - start
    difference = max(
        float((change[layer] - expected).norm() / expected.norm())
        for change in changes.values()
        for layer, expected in published.items()
    )
    if not difference <= TOLERANCE:  # NaN fails too
        raise WrongResultError(
            f"a layer's change is {difference:.1e} from the published one's, relative to its norm; at most "
            f"{TOLERANCE:.0e} is expected, so no speed is reported"
        )
    ours = {name: median(times) for name, times in seconds.items()}
    system = _median_solve(covariance[Place(method.layers[0])], len(facts))
    figures = {
        "facts": len(facts),
        "layers": list(method.layers),
        "factor_seconds": factors,
        "seconds": ours,
        "published_seconds": theirs,
        "published_solve_seconds_per_layer": system,
        "largest_difference": difference,
    }
    table = [
        (f"ours, {len(facts)} facts", f"{ours['ours']:.2f} s for {len(method.layers)} layers"),
        ("factors of the preservation terms, once a run", f"{factors:.2f} s"),
        ("ours with the ops on their references, over ours", f"{ours['reference'] / ours['ours']:.2f}"),
        ("published, over ours", f"{theirs / ours['ours']:.1f}"),
        ("published d x d solves alone, over all of ours", f"{system * len(method.layers) / ours['ours']:.2f}"),
        ("largest relative difference of a change", f"{difference:.1e}"),
    ]
    return Result(table, figures, list(notes))


def _random_covariance(lm: LanguageModel, layers: Sequence[int]) -> Covariance:
    moments = {}
    for layer in layers:
        d_in = lm.weight(Place(layer)).shape[1]
        keys = torch.randn(2 * d_in, d_in, generator=torch.Generator().manual_seed(layer))
        moments[Place(layer)] = keys.T @ keys / len(keys)
    return Covariance(moments, Provenance(lm.name, lm.fingerprint, "noise", 2 * d_in, 1, "float32"))


def _median_solve(covariance: torch.Tensor, facts: int) -> float:
    """Seconds of one d x d system in float64 with as many right-hand sides as there are facts."""
    keys = torch.randn(len(covariance), facts, dtype=torch.float64)
    system = covariance.double() + keys @ keys.T
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.linalg.solve(system, keys)
        seconds.append(time.perf_counter() - start)
    return median(seconds)
