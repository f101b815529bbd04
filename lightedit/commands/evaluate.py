"""`lightedit evaluate`."""

from functools import partial
from pathlib import Path
from typing import Literal

import lightedit as le
from lightedit.commands.shared import covariance_of, remove_runs
from lightedit.evaluation.evaluate import check_held_out
from lightedit.evaluation.references import read_references, write_references
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.evaluation.single import check_single


def evaluate(
    lm: str,
    facts: Path,
    edit: Path | None = None,
    limit: int | None = None,
    out: Path | None = None,
    generate: bool = False,
    compare: bool = False,
    held_out: Path | None = None,
    text: str | None = None,
    references: str | None = None,
    harness: list[str] | None = None,
    harness_limit: int | None = None,
    batch_size: int = 64,
    protocol: Literal["model", "single"] = "model",
    method: le.Method | None = None,
    covariance: Path | None = None,
    facts_per_chunk: int = 32,
    restart: bool = False,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Score a language model, with or without an edit, on facts; or a method on edits of one fact each.

    Scores of finished facts are kept beside out, in a folder that ends in .run, until all are saved. After the process
    was killed, the same command goes on after them.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        facts: a file of facts: CounterFact, zsRE or JSON lines.
        edit: folder of a saved edit to apply first.
        limit: take the first facts only.
        out: JSON file for the scores, their intervals and every record; for those before, too, where there are such.
        generate: let the model write texts, too, for generation entropy (GE) and success; takes several times as long.
        compare: score the unedited model first, for a column of its own and the metrics that need it, such as retain
            accuracy.
        held_out: a file of other facts, which were not edited, for TRR and ERR.
        text: a text file or the id of a data set, for perplexity and KL to the unedited model.
        references: CounterFact's attribute_snippets.json, for RS; or own, to let the unedited model write such texts
            (RS_own). Needs generate.
        harness: tasks of the lm-evaluation-harness to run too, such as [piqa,arc_easy], or .yaml files of its format.
        harness_limit: take the first examples of each such task only.
        batch_size: texts of one forward pass at most, when scoring; bounds memory, and does not change a score.
        protocol: whether the model is scored as it is (model), or every fact right after method has edited it alone
            into the model (single).
        method: for single: ROME, MEMIT, EMMET, PMET, AlphaEdit or ENCORE, with its settings as method.layers and so on.
        covariance: for single: what `lightedit covariance` saved, or a folder of published .npz files; by default it
            is estimated from the model's own writing and kept in the cache.
        facts_per_chunk: for single: facts whose values are optimised together; more is faster and takes more memory.
        restart: throw away what an interrupted run has kept.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    if compare and edit is None:
        raise ValueError("--compare sets an edit beside the unedited model; give --edit too")
    if references is not None and not generate:
        raise ValueError("--references are compared with what the model writes; give --generate true too")
    chosen = le.read_facts(facts, limit)
    others = [] if held_out is None else le.read_facts(held_out)
    check_held_out(chosen, others)
    settings = EvaluationSettings(batch_size, generate, text, harness or (), harness_limit)
    settings.check()
    texts = None if references in (None, "own") else read_references(references, chosen)
    saved = None if edit is None else le.Edit.load(edit)
    if out is not None and not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: the folder {out.absolute().parent} does not exist")
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file for the scores")
    if (protocol == "single") != (method is not None):
        raise ValueError("--protocol single and --method go together: the method that edits each fact alone")
    if protocol == "single" and (compare or held_out is not None or text is not None or harness):
        raise ValueError(
            "--compare, --held_out, --text and --harness score one edited model; --protocol single makes one a fact, "
            "and compares each with the unedited model anyway"
        )
    run = None if out is None else out.with_name(f"{out.name}.run")
    kept_before = None if run is None else run / "before"
    if restart and run is not None:
        remove_runs(run)
    model = le.LanguageModel.load(lm, dtype, device)
    if saved is not None:
        saved.check_model(model)
    if method is not None:
        check_single(model, chosen, method, batch_size, facts_per_chunk)
        moments = covariance_of(model, [method], covariance)
        moments.check(model, method.places)
    if references == "own":
        texts = write_references(model, chosen)
    score = partial(le.evaluate, model, chosen, settings=settings, held_out=others, references=texts)
    before = score(checkpoint=kept_before) if compare else None
    if saved is not None:
        saved.apply(model)
    if method is None:
        result = score(before=before, checkpoint=run)
    else:
        before = score(checkpoint=kept_before)
        single = partial(le.evaluate_single, model, chosen, method, moments, batch_size, facts_per_chunk)
        result = single(generate=generate, before=before, references=texts, checkpoint=run)
    print(result.table(before))
    if out is not None:
        result.save(out, before)
        if run is not None:
            remove_runs(run)
        print(f"saved the scores in {out}")
