"""Tasks of EleutherAI's lm-evaluation-harness, which measure abilities besides the edited facts."""

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig

from lightedit.errors import ArgumentError, MissingFileError, MissingPackageError
from lightedit.lm import LanguageModel
from lightedit.lm.tokens import end_tokens

_SHARES = ("exact_match", "em", "f1")  # reported in percent, as is each metric with acc in its name


def check_harness(tasks: Sequence[str], limit: int | None = None) -> None:
    """Check, before work starts, that the tasks can be run.

    Raises:
        MissingPackageError: the harness is not installed.
        MissingFileError: the file of a task does not exist.
        ArgumentError: a task is unknown, its file is not plain YAML, or `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit: got {limit} examples of a task, expected at least 1")
    if find_spec("lm_eval") is None:
        raise MissingPackageError("the harness is not installed; pip install 'lightedit[harness]'")
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    for task in tasks:
        if _is_file(task):
            if not Path(task).is_file():
                raise MissingFileError(f"no task at {task}; give the name of a task of the harness, or its file")
            _read(task)
        elif task not in known:
            raise ArgumentError(f"the harness has no task {task!r}; `lm-eval ls tasks` lists those it has")


def harness_scores(
    lm: LanguageModel, tasks: Sequence[str], limit: int | None = None, batch_size: int = 64
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Run tasks on `lm` with its present weights.

    The tasks' data come from the Hub, or from the source that a task's file names.

    Args:
        lm: the model.
        tasks: names of the harness's tasks, such as "piqa", or `.yaml` files of its format.
        limit: use only this many first examples of each task.
        batch_size: most texts of one forward pass.

    Returns:
        Two dictionaries keyed by "task metric", such as "piqa acc". The first gives the value, in percent if it is a
        share. The second gives the ends of its 95 % confidence interval, from the harness's standard error; NaN if
        the harness gives none.

    Raises:
        ImportError, FileNotFoundError, ValueError: see `check_harness`.
    """
    if not tasks:
        return {}, {}
    check_harness(tasks, limit)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.pad_token_id = lm.pad_id  # one that the embedding has; the harness would keep any, or add one
    model = HFLM(pretrained=lm.model, tokenizer=tokenizer, batch_size=batch_size)
    with _plain_generation(lm), torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []):
        found = simple_evaluate(
            model,
            tasks=[_read(task) if _is_file(task) else task for task in tasks],
            limit=limit,
            log_samples=False,
            random_seed=None,  # do not reseed Python's and NumPy's random numbers
            numpy_random_seed=None,
        )
    return _scores(found["results"])


@contextmanager
def _plain_generation(lm: LanguageModel) -> Iterator[None]:
    """Within the context, transformers generates without the checkpoint's rules, of which only end tokens stay.

    The harness asks for greedy text and leaves other settings out, so that a penalty or beams would come from there.
    """
    kept = lm.model.generation_config
    lm.model.generation_config = GenerationConfig(eos_token_id=end_tokens(lm.tokenizer, lm.model) or None)
    try:
        yield
    finally:
        lm.model.generation_config = kept


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _read(task: str) -> Any:
    try:
        return yaml.safe_load(Path(task).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ArgumentError(
            f"{task} is no task in plain YAML, without tags such as !function ({error}); name a task of the harness"
        ) from error


def _scores(results: dict[str, dict[str, Any]]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    scores, intervals = {}, {}
    for task, found in results.items():
        for key, value in found.items():
            metric, _, kind = key.partition(",")  # such as "acc,none"; its standard error is "acc_stderr,none"
            if metric.endswith("_stderr") or not isinstance(value, float):
                continue
            if not math.isfinite(value):
                warnings.warn(f"{task}: the harness gives {value} as {metric}, which is left out", stacklevel=2)
                continue
            error = found.get(f"{metric}_stderr,{kind}")
            spread = 1.96 * error if isinstance(error, float) else float("nan")
            scale = 100 if metric in _SHARES or "acc" in metric else 1
            name = f"{task} {metric}" if kind in ("", "none") else f"{task} {metric} ({kind})"
            scores[name] = scale * value
            intervals[name] = (scale * (value - spread), scale * (value + spread))
    return scores, intervals
