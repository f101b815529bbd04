"""Single edits, many at once: every fact is edited alone, from the model as it is, and scored; no weight is written.

The protocol of most published tables edits one fact, scores it, undoes it, and goes on to the next. Here values are
optimised for many facts at a time, one factor of each preservation term serves all solves, and in the passes that score
every row carries the edit of its own fact.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from lightedit.data.facts import Fact, FactError
from lightedit.data.modules import chunks_by_suffix
from lightedit.data.prompts import tokenize_facts
from lightedit.digests import digest
from lightedit.evaluation.evaluate import check_comparison, summarize
from lightedit.evaluation.kept_scores import KeptScores, kept_scores
from lightedit.evaluation.references import References
from lightedit.evaluation.result import Evaluation
from lightedit.evaluation.scoring import score_facts
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.lm import LanguageModel, Place
from lightedit.methods import Method
from lightedit.methods.closed_form.values import optimize_values
from lightedit.methods.closed_form.writing import separate_updates
from lightedit.metrics import RecordScores
from lightedit.progress import progress, subprogress
from lightedit.runs.provenance import determining, provenance
from lightedit.statistics.covariance import Covariance

_SEARCH = 0.8  # share of the time that finding values takes, without generation; it only serves the progress bar


def evaluate_single(
    lm: LanguageModel,
    facts: Sequence[Fact],
    method: Method,
    covariance: Covariance,
    batch_size: int = 64,
    facts_per_chunk: int = 32,
    progress_bar: bool = True,
    generate: bool = False,
    targets: Mapping[int, Tensor] | None = None,
    before: Evaluation | None = None,
    references: References | None = None,
    checkpoint: str | Path | None = None,
) -> Evaluation:
    """Score each fact right after it alone is edited into `lm`, which stays as it is.

    The scores are those of editing a fact, evaluating it and reverting the edit, fact after fact, floating-point
    rounding aside; see `evaluate` for what they are.

    Args:
        lm: the model that every edit starts from.
        facts: at least one.
        method: such as `ROME(layers=[5])`.
        covariance: second moments at the method's matrices, from `estimate_covariance`.
        batch_size: texts of one forward pass at most, when scoring; bounds memory.
        facts_per_chunk: facts whose values are optimised together, and whose edits are held in memory.
        progress_bar: show progress and the time left on standard error.
        generate: let the edited models write, too; see `evaluate`.
        targets: fact's index -> value at the method's site, [d], or [2 d] for two sites, where it is known.
        before: `lm`'s evaluation of the same facts, for KnowledgeEditor's metrics; see `evaluate`.
        references: texts for RS; needs `generate`.
        checkpoint: a folder of this run alone, in which the scores of finished chunks are kept: after the process was
            killed, the same call goes on after them. Delete it once the evaluation is saved.

    Raises:
        FactError: there are no facts, or one cannot be edited.
        ValueError: a size is below 1, `before` is of other facts, or `references` come without `generate`.
        CovarianceError: a covariance of another model or other matrices, or one that cannot be solved with.
        FloatingPointError: the value optimisation, an update or a score gave NaN or infinity.
        ResumeError: `checkpoint` holds another run, or a damaged file, or another process is at work there.
    """
    check_single(lm, facts, method, batch_size, facts_per_chunk)
    asked = EvaluationSettings(batch_size, generate)
    check_comparison(facts, asked, before, references)
    preservation = method.factors(lm, covariance)
    contexts = method.contexts.sample(lm)
    prompts = tokenize_facts(lm.tokenizer, facts, contexts)
    with ExitStack() as stack:
        kept: KeptScores | None = None
        if checkpoint is not None:
            settings = provenance(lm, method, contexts, covariance) | determining(lm, method, covariance, facts)
            settings |= {"generate": generate}
            settings["targets"] = digest(tensors={str(index): value for index, value in (targets or {}).items()})
            kept = stack.enter_context(kept_scores(Path(checkpoint), settings))
        records: dict[int, RecordScores] = {} if kept is None else dict(kept.records)
        report = stack.enter_context(progress(f"editing and scoring {len(facts)} facts, each alone", progress_bar))
        unscored = [index for index in range(len(facts)) if index not in records]
        done = 0
        for chunk in chunks_by_suffix(facts, unscored, facts_per_chunk):
            started = time.perf_counter()
            known = {} if targets is None else {index: targets[index] for index in chunk if index in targets}
            missing = [index for index in chunk if index not in known]
            searching = _SEARCH * len(missing)
            if missing:
                chosen = [prompts[index] for index in missing]
                reported = subprogress(report, done, searching, len(unscored))
                found = optimize_values(
                    lm, chosen, method.value_layer, method.site, method.values, report=reported
                ).targets
                known.update(zip(missing, found, strict=True))
            device = lm.weight(Place(method.value_layer)).device
            values = torch.stack([known[index].to(device, torch.float64) for index in chunk]).T
            edits = separate_updates(lm, method, preservation, [prompts[index] for index in chunk], values)
            rest = subprogress(report, done + searching, len(chunk) - searching, len(unscored))
            scored = score_facts(lm, [facts[index] for index in chunk], settings=asked, report=rest, edits=edits)
            records.update(zip(chunk, scored, strict=True))
            done += len(chunk)
            if kept is not None:
                kept.add({index: records[index] for index in chunk}, time.perf_counter() - started)
    return summarize(facts, [records[index] for index in range(len(facts))], before, references)


def check_single(
    lm: LanguageModel, facts: Sequence[Fact], method: Method, batch_size: int = 64, facts_per_chunk: int = 32
) -> None:
    """Raise what `evaluate_single` would raise for these arguments at once."""
    if not facts:
        raise FactError("facts: the list is empty; give at least one fact to edit")
    for name, size in (("batch_size", batch_size), ("facts_per_chunk", facts_per_chunk)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    lm.check_layers(method.layers)
