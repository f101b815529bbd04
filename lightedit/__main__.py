"""The `lightedit` command: a table of typed functions."""

import logging
import os
import platform
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from jsonargparse import auto_cli, set_parsing_settings

import lightedit as le
from lightedit.data.facts import check_facts
from lightedit.data.texts import read_texts
from lightedit.demo import demo
from lightedit.edit import check_free
from lightedit.evaluate import check_held_out
from lightedit.export import check_export
from lightedit.harness import check_harness
from lightedit.health import OnLimit
from lightedit.lm.architectures import ARCHITECTURES
from lightedit.lm.loading import cache_folder
from lightedit.methods import METHODS
from lightedit.module import OnCollision
from lightedit.ops import NATIVE_STATUS, implementations
from lightedit.references import read_references, write_references
from lightedit.retention import check_validation
from lightedit.run import check_edit, rounds_of
from lightedit.run_folder import kept_rounds, locked, remove_run
from lightedit.single import check_single
from lightedit.sweep.plan import plan
from lightedit.sweep.run import check_sweep_folder


def covariance(
    lm: str,
    layers: list[int],
    out: Path,
    text: str | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    attention: bool = False,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Estimate the second moments of the keys that an edit preserves, and save them.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        layers: layers whose MLP output matrix will be edited, such as [4,5,6,7,8].
        out: folder for covariance.safetensors.
        text: a text file or the id of a data set; by default the model writes its own text.
        tokens: how many tokens to read; by default 10 per input dimension of the matrix.
        sequence_length: tokens of one window of text; by default 256, or 128 for the model's own writing.
        seed: of the model's own writing.
        attention: also for the attention's output matrices of these layers, which PMET with write_attention writes.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder for covariance.safetensors")
    model = le.LanguageModel.load(lm, dtype, device)
    found = le.estimate_covariance(
        model, layers, text, tokens, sequence_length=sequence_length, seed=seed, attention=attention
    )
    print(f"saved {found.save(out)} ({found.provenance.tokens} tokens of {found.provenance.corpus})")


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
    moments = _covariance(model, [method], covariance)
    run = out.with_name(out.name + ".run")
    if restart:
        _remove_run(run)
    before = after = None
    if evaluate:
        if not kept_rounds(run):
            check_edit(model, chosen, method, moments, facts_per_round, facts_per_chunk, on_collision)
        before = le.evaluate(model, chosen, generate=generate, checkpoint=run / "before")
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
        _remove_run(run)
        raise RuntimeError(f"no facts are left to save: {result.provenance['stopped']}")
    if before is not None:
        try:
            after = le.evaluate(model, result.facts, generate=generate, checkpoint=run / "after")
        except FloatingPointError as error:
            print(f"the edited model cannot be scored, so the edit is saved without: {error}", file=sys.stderr)
        if len(result.facts) < len(chosen):  # a limit left some unwritten
            result.revert(model)
            before = le.evaluate(model, result.facts, generate=generate)
        result.scores = {"before": before.scores} | ({} if after is None else {"after": after.scores})
        print(before.table() if after is None else after.table(before))
    result.save(out, overwrite, before, after)
    _remove_run(run)
    print(f"saved the edit of {len(result.facts)} facts in {out}")


def _remove_run(run: Path) -> None:
    """Delete what a command has kept in its folder: rounds or scores, and scores before and after."""
    for folder in (run / "before", run / "after", run):
        if folder.is_dir():
            with locked(folder):  # another process may be at work there
                remove_run(folder)


def _covariance(model: le.LanguageModel, methods: Sequence[le.Method], folder: Path | None) -> le.Covariance:
    """What `folder` holds, or without one an estimate of all that `methods` need."""
    matrices = {matrix for method in methods for matrix in method.matrices}
    layers = sorted({matrix.layer for matrix in matrices})
    model.check_layers(layers)
    if folder is not None:
        return le.Covariance.load(folder)
    attention = any(matrix.part == "attention" for matrix in matrices)
    return le.estimate_covariance(model, layers, cache=True, attention=attention)


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
    if batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {batch_size}")
    if harness:
        check_harness(harness, harness_limit)
    if text is not None:
        read_texts(text)  # what is missing is found out before the model is loaded
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
        _remove_run(run)
    model = le.LanguageModel.load(lm, dtype, device)
    if saved is not None:
        saved.check_model(model)
    if method is not None:
        check_single(model, chosen, method, batch_size, facts_per_chunk)
        moments = _covariance(model, [method], covariance)
        moments.check(model, method.matrices)
    if references == "own":
        texts = write_references(model, chosen)
    score = partial(
        le.evaluate, model, chosen, batch_size, generate=generate, held_out=others, text=text, references=texts,
        harness=harness or (), harness_limit=harness_limit,
    )  # fmt: skip
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
            _remove_run(run)
        print(f"saved the scores in {out}")


def export(
    lm: str,
    edits: Path | list[Path],
    out: Path,
    form: Literal["model", "lora"] = "model",
    dtype: str = "auto",
    device: str = "cpu",
) -> None:
    """Ship edits: as an edited model that any software loads, or as a LoRA adapter beside the unedited one.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        edits: folder of a saved edit, or of several in brackets, applied in that order.
        out: a new folder.
        form: the whole model with its tokenizer (model), or the change alone in PEFT's format (lora).
        dtype: float32, bfloat16, float16, or auto, as the model is stored.
        device: such as cpu or cuda.
    """
    check_export(out)
    saved = [le.Edit.load(folder) for folder in ([edits] if isinstance(edits, Path) else edits)]
    if not saved:
        raise ValueError("--edits names none, so there is nothing to export; give the folder of an edit")
    model = le.LanguageModel.load(lm, dtype, device)
    for one in saved:
        one.check_model(model)
    for one in saved:
        one.apply(model)
    written = le.export_model(model, out) if form == "model" else le.export_lora(model, out)
    print(f"saved the {'edited model' if form == 'model' else 'LoRA adapter'} in {written}")


def sweep(
    lm: str,
    facts: Path,
    methods: dict[str, le.Method],
    out: Path,
    counts: list[int] | Literal["log17"] | None = None,
    facts_per_round: list[int | Literal["single"] | None] | None = None,
    grid: dict[str, list[Any]] | None = None,
    skip: int = 0,
    limit: int | None = None,
    covariance: Path | None = None,
    facts_per_chunk: int = 32,
    on_collision: OnCollision = "error",
    generate: bool = False,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Run every combination of methods and settings; write one table and one figure. Goes on where it was stopped.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        facts: a file of facts: CounterFact, zsRE or JSON lines.
        methods: name of your choice -> method, with class_path and init_args as in a configuration file.
        out: the sweep's own folder, for runs.csv and sweep.svg.
        counts: numbers of facts to write, or log17 for 17 from 1 to 10,000; by default all.
        facts_per_round: numbers of facts written together; null for all, single to edit and score each fact alone.
        grid: field of a method -> values, such as lambda_ or values.lr; every combination is run.
        skip: leave out the first facts.
        limit: take so many facts after those.
        covariance: what `lightedit covariance` saved, or a folder of published .npz files; by default it is estimated
            from the model's own writing and kept in the cache.
        facts_per_chunk: facts whose values are optimised together; more is faster and takes more memory.
        on_collision: whether facts of one round with nearly equal keys are refused (error), share one value (merge) or
            are written each by itself (keep).
        generate: let the models write texts, too, for a column of generation entropy (GE); scoring then takes several
            times as long.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    if skip < 0:
        raise ValueError(f"skip: {skip} facts cannot be left out; give 0 or more")
    chosen = le.read_facts(facts, None if limit is None else skip + limit)[skip:]
    rounds = [None] if facts_per_round is None else facts_per_round
    runs = plan(methods, len(chosen), counts, rounds, grid)
    check_facts(chosen)
    check_sweep_folder(out)
    model = le.LanguageModel.load(lm, dtype, device)
    moments = _covariance(model, [run.method for run in runs], covariance)
    le.sweep(
        model, chosen, methods, moments, out, counts, rounds, grid, facts_per_chunk, on_collision, generate=generate
    )
    print(f"saved runs.csv and sweep.svg in {out}")


def report(runs: list[Path], out: Path = Path("report.html"), overwrite: bool = False) -> None:
    """Write one HTML file about one run, or about several side by side: lightedit report RUN... --out report.html.

    A run is the folder of an edit (`lightedit edit --out`), of evaluations or of a log, or the JSON file of an
    evaluation (`lightedit evaluate --out`). The file needs nothing beside it and fetches nothing.

    Args:
        runs: the runs; as a list in brackets, or one after the other before all options, without --runs.
        out: the file; an earlier report is replaced.
        overwrite: replace a file that is no report, too.
    """
    print(f"saved the report in {le.report(runs, out, overwrite)}")


def env() -> None:
    """Show versions, devices, what each op runs on, known architectures and methods, and where things are kept."""
    packages = ("lightedit", "torch", "lightning", "transformers", "torchmetrics", "datasets", "triton", "gguf")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "gpu": ", ".join(gpus) or "none",
        "native extension": NATIVE_STATUS,
        **{
            f"op {op}": ", ".join(f"{device} {name}" for device, name in live.items())
            for op, live in implementations().items()
        },
        "cache": str(cache_folder()),
        "methods": ", ".join(METHODS),
        "architectures": ", ".join(sorted(ARCHITECTURES)),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name.ljust(width)}  {value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


COMMANDS: dict[str, Any] = {
    "demo": demo,
    "edit": edit,
    "covariance": covariance,
    "evaluate": evaluate,
    "export": export,
    "sweep": sweep,
    "report": report,
    "env": env,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; wrong input ends it with one line and exit status 2."""
    set_parsing_settings(subclasses_enabled=[le.Method])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["report"]:
        runs = list(takewhile(lambda argument: not argument.startswith("-"), given[1:]))
        given[1 : 1 + len(runs)] = [f"--runs+={run}" for run in runs]
    try:
        auto_cli(COMMANDS, as_positional=False, prog="lightedit", args=given)
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("LIGHTEDIT_TRACEBACK"):
            raise
        print(f"lightedit: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        kept = {
            "edit": "the same command goes on after the rounds and scores that are finished",
            "sweep": "the same command goes on after the runs, values and scores that are finished",
            "evaluate": "with --out the same command goes on after the scores that are finished, else nothing is kept",
        }
        state = kept.get(given[0] if given else "", "nothing was written")
        print(f"lightedit: interrupted; {state}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
