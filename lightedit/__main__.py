"""The `lightedit` command: a table of typed functions."""

import logging
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from jsonargparse import auto_cli, set_parsing_settings

import lightedit as le
from lightedit.demo import demo
from lightedit.edit import check_free
from lightedit.lm.architectures import ARCHITECTURES
from lightedit.lm.loading import cache_folder
from lightedit.methods import METHODS
from lightedit.module import OnCollision
from lightedit.run_folder import kept_rounds, remove_run


def covariance(
    lm: str,
    layers: list[int],
    out: Path,
    text: str | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
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
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    model = le.LanguageModel.load(lm, dtype, device)
    found = le.estimate_covariance(model, layers, text, tokens, sequence_length=sequence_length, seed=seed)
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
    overwrite: bool = False,
    restart: bool = False,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Write facts into a language model and save the edit.

    Finished rounds are kept beside the result, in a folder that ends in .run, until it is saved. After the process was
    killed, the same command goes on after the last of them.

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
        evaluate: score the model before and after.
        overwrite: replace an edit that is in the folder already.
        restart: throw away the rounds that an interrupted run has kept.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    check_free(out, overwrite)
    chosen = le.read_facts(facts, limit)
    model = le.LanguageModel.load(lm, dtype, device)
    model.check_layers(method.layers)
    moments = (
        le.estimate_covariance(model, method.layers, cache=True)
        if covariance is None
        else le.Covariance.load(covariance)
    )
    moments.check(model, method.layers)
    run = out.with_name(out.name + ".run")
    if restart:
        remove_run(run)
    before = le.evaluate(model, chosen) if evaluate and not kept_rounds(run) else None
    result = le.edit(model, chosen, method, moments, facts_per_round, facts_per_chunk, on_collision, checkpoint=run)
    if evaluate:
        after = le.evaluate(model, chosen)
        if before is None:  # scored by an earlier process, to find bad facts before the work; the scores died with it
            result.revert(model)
            before = le.evaluate(model, chosen)
        result.scores = {"before": before.scores, "after": after.scores}
        print(after.table(before))
    result.save(out, overwrite)
    remove_run(run)
    print(f"saved the edit of {len(chosen)} facts in {out}")


def evaluate(
    lm: str,
    facts: Path,
    edit: Path | None = None,
    limit: int | None = None,
    out: Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Score a language model, with or without an edit, on facts.

    Args:
        lm: the built-in smollm2, a Hub id, a local folder or a GGUF file.
        facts: a file of facts: CounterFact, zsRE or JSON lines.
        edit: folder of a saved edit to apply first.
        limit: take the first facts only.
        out: JSON file for the scores, their intervals and every record.
        dtype: float32, bfloat16, float16 or auto.
        device: such as cpu or cuda.
    """
    chosen = le.read_facts(facts, limit)
    saved = None if edit is None else le.Edit.load(edit)
    if out is not None and not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: the folder {out.absolute().parent} does not exist")
    model = le.LanguageModel.load(lm, dtype, device)
    if saved is not None:
        saved.apply(model)
    result = le.evaluate(model, chosen)
    print(result.table())
    if out is not None:
        result.save(out)
        print(f"saved the scores in {out}")


def env() -> None:
    """Show versions, devices, known architectures and methods, and where things are kept."""
    packages = ("lightedit", "torch", "lightning", "transformers", "torchmetrics", "datasets", "triton", "gguf")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "gpu": ", ".join(gpus) or "none",
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
    "env": env,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; wrong input ends it with one line and exit status 2."""
    set_parsing_settings(subclasses_enabled=[le.Method])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        auto_cli(COMMANDS, as_positional=False, prog="lightedit", args=given)
    except (ValueError, FileNotFoundError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("LIGHTEDIT_TRACEBACK"):
            raise
        print(f"lightedit: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        state = (
            "the same command goes on after the last finished round" if given[:1] == ["edit"] else "nothing was written"
        )
        print(f"lightedit: interrupted; {state}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
