"""`lightedit edit`."""

import sys
from pathlib import Path

import lightedit as le
from lightedit.commands.shared import covariance_of, read_served, remove_runs, say_saved
from lightedit.data.prompts import check_facts_fit
from lightedit.data.texts import read_texts
from lightedit.editing.artefact import check_free
from lightedit.editing.run import check_log, prepare, rounds_of
from lightedit.editing.summary import count_held
from lightedit.editing.tuning import tuned_method
from lightedit.errors import RunFailedError
from lightedit.evaluation.scoring import check_scored

_RUN, _EVALUATION, _HEALTH = le.RunSettings(), le.EvaluationSettings(), le.HealthLimits()


def edit(
    lm: str,
    facts: Path,
    out: Path,
    method: le.Method | None = None,
    covariance: Path | None = None,
    format: str | None = None,
    limit: int | None = None,
    run: le.RunSettings = _RUN,
    evaluate: bool = True,
    evaluation: le.EvaluationSettings = _EVALUATION,
    health: le.HealthLimits = _HEALTH,
    health_text: str | None = None,
    log: Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    chat: bool = False,
    end_turn: bool = False,
    separator: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Write facts into a language model and save the edit.

    Finished rounds and scores are stored beside `out`, in a folder whose name ends in .run, until the edit is saved.
    After an interruption, the same command resumes from them. The exit status is 3 if the edit is saved, but a fact
    does not hold, or a limit ended the run early.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        facts: a file of facts: JSON, JSON lines, CSV or YAML, in this package's form or that of a published data set.
        out: folder for the edit.
        method: ROME, MEMIT, EMMET, PMET, AlphaEdit, ENCORE, FT, EWC, Retrain, KN, KE, MEND, GRACE, Defer or Memory, and
            its settings as method.layers, method.lambda_, method.values.lr and so on; KE and MEND take the network that
            train-editor saved as method.folder. By default MEMIT as lightedit tune finds it for the model, or has found
            it.
        covariance: a folder that `lightedit covariance` saved, or one of published .npz files; by default the
            covariance is estimated from self-generated text and kept in the cache.
        format: form of the records in that file, such as fact, counterfact, zsre or easyedit; by default it is
            recognised.
        limit: use only this many first facts.
        run: settings of rounds, chunks and collisions.
        evaluate: score the model before and after; the scores are saved with the edit, for lightedit report.
        evaluation: settings of the scoring.
        health: limits that end the run before the model is ruined; with a limit or health_text, health.csv is written.
        health_text: held-out text for KL and perplexity, a text file or the id of a data set; by default text is
            self-generated.
        log: folder for metrics.csv, retention.csv (with run.validate_every) and health.csv.
        overwrite: replace an earlier edit in the folder.
        restart: delete what an interrupted run has stored.
        chat: serve all facts through the model's chat template: prompts are the user's turn, answers the assistant's.
        end_turn: let targets include the token that ends the turn, so that generation stops after them.
        separator: text between prompts and answers, one space unless the facts say otherwise; '' for none.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    check_free(out, overwrite)
    check_log(log)
    watched = health_text is not None or bool(health.limits())
    callbacks = [le.Health(health_text, limits=health)] if watched else []
    if health_text is not None:
        read_texts(health_text)  # a missing text is reported before the model is loaded
    chosen = read_served(facts, limit, format, chat=chat, end_turn=end_turn, separator=separator)
    data = rounds_of(chosen, method, run)  # and so are wrong facts and sizes
    model = le.LanguageModel.load(lm, dtype, device)
    check_facts_fit(model, chosen)
    if evaluate:
        check_scored(model, chosen, evaluation)
    if method is None:
        method = tuned_method(model)
    method.check_facts(model, data.facts, data.rounds, run)
    moments = covariance_of(model, [method], covariance)
    kept = out.with_name(out.name + ".run")
    if restart:
        remove_runs(kept)
    prepared = prepare(model, chosen, method, covariance=moments, settings=run)
    before = le.evaluate(model, chosen, settings=evaluation, checkpoint=kept / "before") if evaluate else None
    result = le.edit(
        model, chosen, method, settings=run, checkpoint=kept, log=log, callbacks=callbacks, prepared=prepared
    )
    if not result.facts:
        remove_runs(kept)
        raise RunFailedError(f"no facts are left to save: {result.record.stopped}")
    if before is not None:
        _score(model, result, before, evaluation, kept)
    result.save(out, overwrite=overwrite)
    remove_runs(kept)
    print(result)
    if result.before is not None:
        print(result.before.table() if result.after is None else result.after.table(result.before))
    say_saved(model, result, out, "--chat")
    if result.record.stopped is not None or not result.held:
        less = result.record.stopped or count_held(result.outcomes)
        raise RunFailedError(f"the edit is saved, but it does less than was asked: {less}")


def _score(
    model: le.LanguageModel, result: le.Edit, before: le.Evaluation, settings: le.EvaluationSettings, kept: Path
) -> None:
    """Score the edited model; if a limit ended the run early, score the unedited one again on the written facts."""
    try:
        result.after = le.evaluate(model, result.facts, settings=settings, checkpoint=kept / "after")
    except FloatingPointError as error:
        print(f"the edited model cannot be scored, so the edit is saved without: {error}", file=sys.stderr)
    result.before = before
    if len(result.facts) < len(before.records):
        result.revert(model)
        result.before = le.evaluate(model, result.facts, settings=settings)
