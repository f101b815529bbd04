"""`lightedit evaluate`."""

from functools import partial
from pathlib import Path
from typing import Literal

import lightedit as le
from lightedit.commands.shared import covariance_of, read_served, remove_runs
from lightedit.errors import ArgumentError, MissingFileError
from lightedit.evaluation.evaluate import check_held_out
from lightedit.evaluation.references import read_references, write_references
from lightedit.evaluation.scoring import check_scored
from lightedit.evaluation.single import check_single, evaluate_single

_EVALUATION = le.EvaluationSettings()


def evaluate(
    lm: str,
    facts: Path,
    edit: Path | None = None,
    format: str | None = None,
    limit: int | None = None,
    out: Path | None = None,
    evaluation: le.EvaluationSettings = _EVALUATION,
    compare: bool = False,
    held_out: Path | None = None,
    references: str | None = None,
    protocol: Literal["model", "single"] = "model",
    method: le.Method | None = None,
    covariance: Path | None = None,
    facts_per_chunk: int = 32,
    restart: bool = False,
    chat: bool = False,
    end_turn: bool = False,
    separator: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Score a language model, with or without an edit, on facts; or a method on edits of one fact each.

    Scores of finished facts are stored beside `out`, in a folder whose name ends in .run, until all are saved. After an
    interruption, the same command resumes from them.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        facts: a file of facts: JSON, JSON lines, CSV or YAML, in this package's form or that of a published data set.
        edit: folder of a saved edit to apply first.
        format: form of the records in that file, such as fact, counterfact, zsre or easyedit; by default it is
            recognised.
        limit: use only this many first facts.
        out: JSON file for the scores, their intervals and every record; includes the unedited model if it is scored.
        evaluation: settings of the scoring.
        compare: also score the unedited model, for a column of its own and for metrics that compare with it, such as
            retain accuracy.
        held_out: a file of other facts, in the same format, which were not edited, for TRR and ERR.
        references: CounterFact's attribute_snippets.json, for RS; or own, for texts that the unedited model generates
            (RS_own). Needs evaluation.generate.
        protocol: model scores the model on all facts; single scores each fact after method has edited it alone into
            the model.
        method: for single: ROME, MEMIT, EMMET, PMET, AlphaEdit, ENCORE, FT, EWC, Retrain, KN, GRACE, Defer or Memory,
            with its settings as method.layers and so on.
        covariance: for single: a folder that `lightedit covariance` saved, or one of published .npz files; by default
            the covariance is estimated from self-generated text and kept in the cache.
        facts_per_chunk: for single: facts whose values are optimised together; more is faster and takes more memory.
        restart: delete what an interrupted run has stored.
        chat: serve all facts through the model's chat template: prompts are the user's turn, answers the assistant's.
        end_turn: let targets include the token that ends the turn, so that generation stops after them.
        separator: text between prompts and answers, one space unless the facts say otherwise; '' for none.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    _check_flags(edit, compare, held_out, references, protocol, method, evaluation)
    _check_out(out)
    read = partial(read_served, chat=chat, end_turn=end_turn, separator=separator)
    chosen = read(facts, limit, format)
    others = [] if held_out is None else read(held_out, None, format)
    check_held_out(chosen, others)
    evaluation.check()
    texts = None if references in (None, "own") else read_references(references, chosen)
    saved = None if edit is None else le.Edit.load(edit)
    run = None if out is None else out.with_name(f"{out.name}.run")
    kept_before = None if run is None else run / "before"
    if restart and run is not None:
        remove_runs(run)
    model = le.LanguageModel.load(lm, dtype, device)
    if saved is not None:
        saved.check_model(model)
    check_scored(model, chosen, evaluation)
    moments = _moments(model, chosen, method, covariance, facts_per_chunk)
    if references == "own":
        texts = write_references(model, chosen)
    score = partial(le.evaluate, model, chosen, settings=evaluation, held_out=others, references=texts)
    before = score(checkpoint=kept_before) if compare or method is not None else None
    if saved is not None:
        saved.apply(model)
    if method is None:
        result = score(before=before, checkpoint=run)
    else:
        alone = partial(evaluate_single, covariance=moments, settings=evaluation, facts_per_chunk=facts_per_chunk)
        result = alone(model, chosen, method, before=before, references=texts, checkpoint=run)
    if out is not None and run is not None:
        result.save(out, before)
        remove_runs(run)
    print(result.table(before))
    if out is not None:
        print(f"saved the scores in {out}")


def _moments(
    model: le.LanguageModel,
    facts: list[le.Fact],
    method: le.Method | None,
    covariance: Path | None,
    facts_per_chunk: int,
) -> le.Covariance | None:
    """The covariance that single edits by `method` need, checked; None if they need none."""
    if method is None:
        return None
    check_single(model, facts, method, facts_per_chunk)
    moments = covariance_of(model, [method], covariance)
    if moments is not None:
        moments.check(model, method.covariance_places, factor=False)
    return moments


def _check_flags(
    edit: Path | None,
    compare: bool,
    held_out: Path | None,
    references: str | None,
    protocol: str,
    method: le.Method | None,
    evaluation: le.EvaluationSettings,
) -> None:
    """Refuse flags that contradict each other."""
    if references is not None and not evaluation.generate:
        raise ArgumentError("--references are compared with what the model writes; give --evaluation.generate too")
    if compare and edit is None:
        raise ArgumentError("--compare sets an edit beside the unedited model; give --edit too")
    if (protocol == "single") != (method is not None):
        raise ArgumentError("--protocol single and --method go together: the method that edits each fact alone")
    of_one_model = compare or held_out is not None or evaluation.text is not None or evaluation.harness
    if protocol == "single" and of_one_model:
        raise ArgumentError(
            "--compare, --held_out, --evaluation.text and --evaluation.harness score one edited model; --protocol "
            "single edits the model anew for each fact, and always compares with the unedited model"
        )


def _check_out(out: Path | None) -> None:
    if out is not None and not out.absolute().parent.is_dir():
        raise MissingFileError(f"--out {out}: the folder {out.absolute().parent} does not exist")
    if out is not None and out.is_dir():
        raise ArgumentError(f"--out {out} is a folder; name a file for the scores")
