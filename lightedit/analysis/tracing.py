"""Causal tracing: which states carry a fact from its subject to the answer."""

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lightedit.analysis.clean_and_corrupted import Runs, run_clean_and_corrupted
from lightedit.analysis.knowing import Asked, ask
from lightedit.analysis.noise import noise_level, noise_of
from lightedit.analysis.prompts import TracedPrompt, traced_prompts
from lightedit.analysis.restoring import Branch, restored, state_branches, window_branches
from lightedit.analysis.settings import SEVERED, TraceSettings
from lightedit.analysis.trace import FactTrace, Trace
from lightedit.data.fact import Fact, FactError
from lightedit.data.words import counted
from lightedit.errors import NumericalError
from lightedit.lm import LanguageModel, Place
from lightedit.lm.arguments import check_model
from lightedit.progress import progress
from lightedit.runs.kept import KeptRecords, kept_records
from lightedit.runs.provenance import computing, fingerprint_inputs

_CPU_TOKENS = 1024
_GPU_SHARE = 0.25  # of the free memory, for the states of one block in a pass


def trace(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    settings: TraceSettings | None = None,
    checkpoint: str | Path | None = None,
) -> Trace:
    """Trace, for each fact, which states carry it from the subject to the answer (Meng et al., 2022, section 2).

        found = trace(lm, read_facts("known_facts.json", limit=100))
        found.save("traces/known")

    A clean run gives the probability P of the answer. In the corrupted runs, noise is added to the embeddings of the
    subject's tokens, which gives P*. In a corrupted run with restoration, one token's output of a block, or of the MLPs
    or attentions of a window of layers, is that of the clean run. TE = P - P* is the total effect of a fact, and
    IE = P*_restored - P* the indirect effect of the restored states. All restorations of a fact have the same noise.

    Answers are `target_true`, or `target_new` where a fact has no true target. Facts that the model does not know are
    left out, with a message on standard error; see `TraceSettings.only_known`.

    Args:
        lm: the language model, with its present weights.
        facts: facts with subjects.
        settings: what is restored, and how states are corrupted.
        checkpoint: a folder of this run only, in which finished facts are stored. After an interruption, the same call
            resumes from them. Delete it once the trace is saved.

    Raises:
        FactError: there are no facts, none that the model knows, or one that cannot be traced.
        ArgumentError: the window has more layers than the model.
        UnsupportedModelError: the model has no such places.
        NumericalError: a probability is not finite.
        ResumeError: `checkpoint` holds another run or a damaged file, or another process uses it.
    """
    check_model(lm, what="causal tracing")
    settings = settings or TraceSettings()
    settings.check(lm)
    prompts = traced_prompts(lm, facts)
    level = noise_level(lm, prompts, settings)
    chosen, left_out = _known(prompts, ask(lm, prompts, settings.answer), settings)
    if left_out:
        print(_excluded(lm, len(facts), left_out), file=sys.stderr)
    with ExitStack() as stack:
        kept: KeptRecords | None = None
        if checkpoint is not None:
            inputs = _inputs(lm, facts, settings)
            kept = stack.enter_context(kept_records(Path(checkpoint), "trace", inputs))
        found = {} if kept is None else {i: FactTrace.from_dict(record) for i, record in kept.records.items()}
        rest = [index for index in chosen if index not in found]
        report = stack.enter_context(progress(f"tracing {counted(len(chosen))}", settings.progress_bar))
        for number, index in enumerate(rest, start=1):
            found[index] = _trace_one(lm, chosen[index], level, settings)
            if kept is not None:
                kept.add(index, found[index].to_dict())
            report(number, len(rest))
    traced = tuple(found[index] for index in sorted(chosen))
    return Trace(lm.name, lm.n_layers, level, settings, traced, tuple(left_out))


def _known(
    prompts: Sequence[TracedPrompt], asked: Sequence[Asked], settings: TraceSettings
) -> tuple[dict[int, TracedPrompt], list[str]]:
    """Index -> the prompt with the answer that is explained, and the texts of the facts that are left out."""
    chosen, left_out = {}, []
    for index, (prompt, answer) in enumerate(zip(prompts, asked, strict=True)):
        if settings.only_known and not answer.knows:
            left_out.append(prompt.fact.text)
        else:
            chosen[index] = prompt if settings.answer == "joint" else prompt.explaining(answer.said)
    if not chosen:
        raise FactError(
            f"facts: none of the {len(prompts)} is known to the model, so there is nothing to trace; give facts that "
            "it knows, or trace what it says instead (only_known=False)"
        )
    return chosen, left_out


def _excluded(lm: LanguageModel, given: int, left_out: Sequence[str]) -> str:
    shown = ", ".join(map(repr, left_out[:2])) + (", ..." if len(left_out) > 2 else "")
    return f"{given - len(left_out)} of {given} facts are traced; {lm.name} does not know the others: {shown}"


def _inputs(lm: LanguageModel, facts: Sequence[Fact], settings: TraceSettings) -> dict[str, Any]:
    """What determines the result."""
    kept = {name: value for name, value in asdict(settings).items() if name not in ("progress_bar", "tokens_per_pass")}
    return {**fingerprint_inputs(lm, facts), **computing(lm), "settings": kept}


def _trace_one(lm: LanguageModel, prompt: TracedPrompt, level: float, settings: TraceSettings) -> FactTrace:
    noise = noise_of(prompt, lm.d_model, level, settings).to(lm.device, lm.dtype)
    runs = run_clean_and_corrupted(lm, prompt, noise, settings.places, settings.replace)
    p_corrupted = float(runs.p_corrupted.mean())
    found = _restore(lm, runs, settings)
    if settings.tokens == "all":
        for kind in settings.kinds:  # tokens before the subject are the same in both runs
            before = {position: [p_corrupted] * lm.n_layers for position in range(prompt.subject.start)}
            found[kind] = before | found[kind]
    values = [runs.p_clean, p_corrupted, *(p for kind in found.values() for token in kind.values() for p in token)]
    if not all(map(math.isfinite, values)):
        raise NumericalError(f"a probability of {prompt.fact.text!r} is NaN or infinite; load the model in float32")
    return FactTrace(
        prompt.fact.text,
        lm.continuation(prompt.ids[: prompt.length], prompt.targets),
        tuple(prompt.tokens),
        tuple(prompt.token_class(position) for position in range(prompt.length)),
        (prompt.subject.start, prompt.subject.stop),
        runs.p_clean,
        p_corrupted,
        found,
    )


def _restore(lm: LanguageModel, runs: Runs, settings: TraceSettings) -> dict[str, dict[int, list[float]]]:
    """Kind -> position -> by layer, the mean probability over samples."""
    prompt, last = runs.prompt, runs.prompt.subject[-1]
    every = range(prompt.subject.start, prompt.length) if settings.tokens == "all" else [last]
    branches: dict[str, list[Branch]] = {
        kind: state_branches(runs, lm.n_layers) if kind == "state" else window_branches(lm, runs, kind, settings.window)
        for kind in settings.kinds
    }
    found = _means(lm, runs, branches, every, settings)
    if settings.severed:
        past = {name: state_branches(runs, lm.n_layers, place) for place, name in SEVERED.items()}
        found |= _means(lm, runs, past, [last], settings)
    return found


def _means(
    lm: LanguageModel,
    runs: Runs,
    branches: dict[str, list[Branch]],
    positions: Sequence[int],
    settings: TraceSettings,
) -> dict[str, dict[int, list[float]]]:
    size = settings.tokens_per_pass or tokens_of_a_pass(lm)
    together = [branch for own in branches.values() for branch in own]
    means = restored(lm, runs, together, positions, size).double().mean(dim=-1).unflatten(0, (len(branches), -1))
    return {
        kind: {position: own[:, index].tolist() for index, position in enumerate(positions)}
        for kind, own in zip(branches, means, strict=True)
    }


def tokens_of_a_pass(lm: LanguageModel) -> int:
    """Most tokens of one pass: 1024 on a CPU, where larger ones are no faster; on a GPU by its free memory."""
    if lm.device.type != "cuda":
        return _CPU_TOKENS
    width = 12 * lm.d_model + 4 * lm.anatomy.shape(Place(0))[1]  # numbers in a block for each token, with copies
    free, _ = torch.cuda.mem_get_info(lm.device)
    return max(_CPU_TOKENS, int(_GPU_SHARE * free / (width * lm.dtype.itemsize)))
