"""`lightedit edit`."""

import sys
from pathlib import Path

import lightedit as le
from lightedit.commands.shared import covariance_of, remove_runs
from lightedit.data.texts import read_texts
from lightedit.editing.artefact import check_free
from lightedit.editing.health import OnLimit
from lightedit.editing.module import OnCollision
from lightedit.editing.retention import check_validation
from lightedit.editing.run import check_edit, rounds_of
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.runs.folder import kept_rounds


def edit(
    lm: str,
    facts: Path,
    method: le.Method,
    out: Path,
    covariance: Path | None = None,
    limit: int | None = None,
    facts_per_round: int | None = None,
    facts_per_chunk: int = 32,
    on_collision: OnCollision = "error",
    evaluate: bool = True,
    generate: bool = False,
    validate_every: int | None = None,
    log: Path | None = None,
    max_kl: float | None = None,
    max_perplexity_ratio: float | None = None,
    max_update_norm: float | None = None,
    on_limit: OnLimit = "stop",
    health_text: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Write facts into a language model and save the edit.

    Finished rounds and scores are kept beside the result, in a folder that ends in .run, until it is saved. After the
    process was killed, the same command goes on after the last of them.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        facts: a file of facts: CounterFact, zsRE or JSON lines.
        method: ROME, MEMIT, EMMET, PMET, AlphaEdit or ENCORE, with its settings as method.layers, method.lambda_,
            method.values.lr and so on.
        out: folder for the edit.
        covariance: what `lightedit covariance` saved, or a folder of published .npz files; by default it is estimated
            from the model's own writing and kept in the cache.
        limit: take the first facts only.
        facts_per_round: facts written together; by default all, or as many as the method takes.
        facts_per_chunk: facts whose values are optimised together; more is faster and takes more memory.
        on_collision: whether facts of one round with nearly equal keys are refused (error), share one value (merge) or
            are written each by itself (keep).
        evaluate: score the model before and after; the scores are kept with the edit, for lightedit report.
        generate: let the model write texts, too, for generation entropy (GE) and success; scoring then takes several
            times as long.
        validate_every: rounds between validations, which score the facts of all rounds so far; by default none.
        log: folder for metrics.csv, retention.csv (with validate_every) and health.csv (with a limit or health_text).
        max_kl: end the run once KL(edited || unedited) on text passes so many nats per token.
        max_perplexity_ratio: end the run once perplexity on text passes so many times the unedited model's.
        max_update_norm: end the run once a round's update of a layer passes this Frobenius norm.
        on_limit: whether the round that passes a limit is kept (stop) or taken back (roll_back).
        health_text: a text file or the id of a data set for the first two; by default the model writes it.
        overwrite: replace an edit that is in the folder already.
        restart: throw away what an interrupted run has kept.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    check_free(out, overwrite)
    check_validation(validate_every, log)
    limits = (max_kl, max_perplexity_ratio, max_update_norm)
    watched = health_text is not None or any(limit is not None for limit in limits)
    callbacks = [le.Health(health_text, *limits, on_limit)] if watched else []
    if health_text is not None:
        read_texts(health_text)  # what is missing is found out before the model is loaded
    chosen = le.read_facts(facts, limit)
    rounds_of(chosen, method, facts_per_round, facts_per_chunk)  # and so are facts and sizes that cannot be
    model = le.LanguageModel.load(lm, dtype, device)
    moments = covariance_of(model, [method], covariance)
    run = out.with_name(out.name + ".run")
    if restart:
        remove_runs(run)
    asked = EvaluationSettings(generate=generate)
    before = after = None
    if evaluate:
        if not kept_rounds(run):
            check_edit(model, chosen, method, moments, facts_per_round, facts_per_chunk, on_collision)
        before = le.evaluate(model, chosen, settings=asked, checkpoint=run / "before")
    result = le.edit(
        model,
        chosen,
        method,
        moments,
        facts_per_round,
        facts_per_chunk,
        on_collision,
        checkpoint=run,
        validate_every=validate_every,
        log=log,
        callbacks=callbacks,
    )
    if not result.facts:
        remove_runs(run)
        raise RuntimeError(f"no facts are left to save: {result.provenance['stopped']}")
    if before is not None:
        try:
            after = le.evaluate(model, result.facts, settings=asked, checkpoint=run / "after")
        except FloatingPointError as error:
            print(f"the edited model cannot be scored, so the edit is saved without: {error}", file=sys.stderr)
        if len(result.facts) < len(chosen):  # a limit left some unwritten
            result.revert(model)
            before = le.evaluate(model, result.facts, settings=asked)
        result.scores = {"before": before.scores} | ({} if after is None else {"after": after.scores})
        print(before.table() if after is None else after.table(before))
    result.save(out, overwrite, before, after)
    remove_runs(run)
    print(f"saved the edit of {len(result.facts)} facts in {out}")
