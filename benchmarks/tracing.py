"""Row "trace": causal tracing of one fact against the published loop, which runs the whole model for each cell."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import Options, Result, WrongResultError
from benchmarks.published import tracing as published
from lightedit.analysis.clean_and_corrupted import run_clean_and_corrupted
from lightedit.analysis.knowing import ask
from lightedit.analysis.noise import noise_level, noise_of
from lightedit.analysis.prompts import TracedPrompt, traced_prompts
from lightedit.analysis.restoring import restored, state_branches, window_branches
from lightedit.analysis.settings import TraceSettings
from lightedit.analysis.tracing import tokens_of_a_pass
from lightedit.data.builtin import builtin_facts
from lightedit.data.fact import Fact
from lightedit.lm import LanguageModel, Place
from lightedit.progress import progress

TOLERANCE = 1e-4  # of a probability
_STEP = 6  # with --quick the loop traces every so manieth layer
_REPEATS = 9
_KINDS = ("state", "mlp", "attention")


def row(options: Options) -> Result:
    """Measure the built-in model on the CPU in float32, on the first built-in fact that it knows of each form.

    The subject of one begins its prompt; that of the other stands behind some words, which no restoration runs again.
    """
    lm = LanguageModel.load("smollm2", dtype="float32", device="cpu")
    return run(lm, builtin_facts(), TraceSettings(severed=False), every=_STEP if options.quick else 1)


@dataclass(frozen=True)
class Traced:
    """One fact traced by both: seconds, tokens, and the largest difference of a probability."""

    fact: str
    tokens: int
    before_subject: int
    ours: float
    loop: float
    floor: float
    difference: float

    @property
    def ratio(self) -> float:
        return self.loop / self.ours


def run(lm: LanguageModel, facts: Sequence[Fact], settings: TraceSettings, every: int = 1) -> Result:
    """Trace two facts by both.

    Args:
        lm: the language model, on the CPU in float32.
        facts: facts, of which the first known one with a subject in front and the first with one behind are traced.
        settings: the same for both.
        every: the loop traces every so manieth layer, and its time is scaled to all layers.

    Raises:
        WrongResultError: a probability differs from the loop's by more than `TOLERANCE`.
    """
    prompts = traced_prompts(lm, facts)
    level = noise_level(lm, prompts, settings)
    known = [p.explaining(a.said) for p, a in zip(prompts, ask(lm, prompts, "token"), strict=True) if a.knows]
    chosen = [next(p for p in known if (p.fact.prompt.startswith("{}")) == front) for front in (True, False)]
    measured = [_measure(lm, prompt, level, settings, every) for prompt in chosen]
    table = [
        line
        for each, where in zip(measured, ("subject first", "subject behind words"), strict=True)
        for line in (
            (f"{where}: ours, s a fact", f"{each.ours:.2f}"),
            (f"{where}: published loop, s a fact", f"{each.loop:.1f}"),
            (f"{where}: times as fast", f"{each.ratio:.1f}"),
            (f"{where}: share of the arithmetic floor", f"{each.floor / each.ours:.0%}"),
        )
    ]
    figures = {"facts": [vars(each) | {"ratio": each.ratio} for each in measured], "samples": settings.samples,
               "window": settings.window, "loop_layers": f"every {every}"}  # fmt: skip
    notes = [f"{each.fact!r}: {each.tokens} tokens, {each.before_subject} before the subject" for each in measured]
    if every > 1:
        notes.append(f"a quick look: the loop traced one layer in {every}, and its time is scaled to all")
    return Result(table, figures, notes)


def _measure(lm: LanguageModel, prompt: TracedPrompt, level: float, settings: TraceSettings, every: int) -> Traced:
    noise = noise_of(prompt, lm.d_model, level, settings)
    started = time.perf_counter()
    runs = run_clean_and_corrupted(lm, prompt, noise, ("mlp", "attention"))
    branches = [
        *state_branches(runs, lm.n_layers),
        *window_branches(lm, runs, "mlp", settings.window),
        *window_branches(lm, runs, "attention", settings.window),
    ]
    positions = range(prompt.subject.start, prompt.length)
    found = restored(lm, runs, branches, positions, tokens_of_a_pass(lm))
    ours = time.perf_counter() - started
    layers = range(0, lm.n_layers, every)
    expected, loop = _loop(lm, prompt, noise, settings.window, layers)
    own = found.unflatten(0, (len(_KINDS), lm.n_layers))[:, list(layers)]
    before = runs.p_corrupted.expand(*own.shape[:2], prompt.subject.start, -1)
    difference = float((torch.cat([before, own], dim=2) - expected).abs().max())
    if not difference <= TOLERANCE:
        raise WrongResultError(f"{prompt.fact.text!r}: a probability differs by {difference:.1e} from the loop's")
    tokens = sum(len(prompt.ids) - position for position in positions) * settings.samples
    blocks = sum(lm.n_layers - 1 - branch.layer for branch in branches)
    reads = len(branches) * len(positions) * settings.samples
    flops = 2.0 * (tokens * blocks * _block_weights(lm) + reads * lm.head.weight.numel())
    scaled = loop * lm.n_layers / len(layers)
    return Traced(prompt.fact.text, prompt.length, prompt.subject.start, ours, scaled, flops / _rate(lm), difference)


def _loop(
    lm: LanguageModel, prompt: TracedPrompt, noise: Tensor, window: int, layers: Sequence[int]
) -> tuple[Tensor, float]:
    """The loop's probabilities, [kinds, layers, tokens, samples], and its seconds."""
    found = torch.empty(len(_KINDS), len(layers), prompt.length, len(noise))
    started = time.perf_counter()
    with progress(f"the published loop on {prompt.fact.text!r}") as report:
        for k, kind in enumerate(_KINDS):
            for number, layer in enumerate(layers):
                width = 1 if kind == "state" else window
                modules = published.window_modules(lm.model, kind, layer, width, lm.n_layers)
                for position in range(prompt.length):
                    places = [(position, module) for module in modules]
                    found[k, number, position] = published.traced(
                        lm.model, prompt.ids, prompt.targets, prompt.subject, noise, places
                    )
                report(k * len(layers) + number + 1, len(_KINDS) * len(layers))
    return found, time.perf_counter() - started


def _block_weights(lm: LanguageModel) -> int:
    """Weights of the matrices of one block, each of which takes part in one product a token."""
    return sum(parameter.numel() for parameter in lm.blocks[0].parameters() if parameter.ndim == 2)


def _rate(lm: LanguageModel) -> float:
    """Operations a second of a product like those of the MLP."""
    d_out, d_in = lm.anatomy.shape(Place(0))
    left, right = torch.randn(tokens_of_a_pass(lm), d_out), torch.randn(d_out, d_in)
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return 2.0 * len(left) * d_out * d_in / sorted(seconds)[_REPEATS // 2]
