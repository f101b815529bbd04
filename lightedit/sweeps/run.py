"""Doing a sweep: every run starts from the unedited model, is scored, and is taken back."""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightedit.data.facts import Fact, FactError, check_facts
from lightedit.digests import digest
from lightedit.editing.module import OnCollision
from lightedit.editing.run import check_edit, edit
from lightedit.evaluation.evaluate import evaluate, summarize
from lightedit.evaluation.kept_scores import KeptScores
from lightedit.evaluation.scoring import score_and_keep
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.evaluation.single import evaluate_single
from lightedit.files import whole_file
from lightedit.lm import LanguageModel
from lightedit.methods import Method
from lightedit.progress import progress
from lightedit.runs.folder import ResumeError, locked, remove_run
from lightedit.runs.provenance import computing
from lightedit.statistics.covariance import Covariance, CovarianceError
from lightedit.sweeps.figure import draw
from lightedit.sweeps.plan import Counts, RoundLimit, Run, plan, swept_fields
from lightedit.sweeps.table import UNEDITED, Row, Table, best
from lightedit.sweeps.targets import TargetStore


def sweep(
    lm: LanguageModel,
    facts: Sequence[Fact],
    methods: Mapping[str, Method],
    covariance: Covariance,
    out: str | Path,
    counts: Counts | None = None,
    facts_per_round: Sequence[RoundLimit] = (None,),
    grid: Mapping[str, Sequence[Any]] | None = None,
    facts_per_chunk: int = 32,
    on_collision: OnCollision = "error",
    progress_bar: bool = True,
    generate: bool = False,
) -> list[Row]:
    """Run every combination of methods and swept values, and write one table and one figure.

        rows = sweep(lm, facts, {"MEMIT": MEMIT(layers=(4, 5, 6))}, covariance, "sweeps/first",
                     counts="log17", grid={"lambda_": [100.0, 1000.0]})

    Each run writes the first facts of the list into the unedited model, scores them, and is reverted. Value vectors
    at the unedited model are found once for all runs whose settings of step 1 are equal. Started again with the same
    arguments, a sweep skips the runs that are finished. `out` then holds runs.csv (see `Table`), sweep.svg,
    sweep.json with the arguments, and the values.

    Args:
        lm: the model, unedited; so it is left.
        facts: what to write; some must have a `target_true`, which the scores need.
        methods: name of your choice -> method.
        covariance: second moments at all matrices that occur.
        out: the sweep's own folder.
        counts: numbers of facts to write; None for all of them, "log17" for PMET's (see `LOG17`).
        facts_per_round: numbers of facts written together; None for all of a run's, "single" to edit and score each
            fact alone (see `evaluate_single`).
        grid: field of a method -> values, such as {"lambda_": [100.0, 1000.0], "values.lr": [0.1, 0.5]}. Every
            combination is run; a method that lacks a field is run without it.
        facts_per_chunk: facts whose values are optimised together; more is faster and takes more memory.
        on_collision: see `EditModule`. The value of merged facts is found in every run.
        progress_bar: show progress and the time left on standard error.
        generate: let the models write texts, too, for a column of generation entropy (GE); see `evaluate`.

    Returns:
        The rows of the table.

    Raises:
        ValueError: an argument is wrong, or `out` holds another sweep, or another process is at work there; raised
            before work starts.
        RuntimeError: some runs failed, or the figure cannot be drawn. The table holds all others, and starting again
            tries no more than these.
    """
    out, grid = Path(out), dict(grid or {})
    runs = plan(methods, len(facts), counts, facts_per_round, grid)
    facts = list(facts[: max(run.facts for run in runs)])
    _check(lm, facts, covariance, runs)
    matrices = sorted({matrix for run in runs for matrix in run.method.places})
    record = {
        "model": f"{lm.name} {lm.fingerprint}",
        **computing(lm),
        "device": lm.device.type,
        "facts": _digest([fact.to_dict() for fact in facts]),
        "methods": {name: repr(method) for name, method in methods.items()},
        "counts": sorted({run.facts for run in runs}),
        "facts_per_round": list(facts_per_round),
        "grid": {field: list(values) for field, values in grid.items()},
        "covariance": asdict(covariance.provenance),
        "covariance tensors": digest(tensors={matrix.key: covariance[matrix] for matrix in matrices}),
        "on_collision": on_collision,
        **({"generate": True} if generate else {}),
    }
    _check_folder(out, record)
    pending = _unfinished(runs, Table(out / "runs.csv", list(grid), generate))
    if progress_bar:
        _announce(methods, grid, runs, pending)
    _check_collisions(lm, facts, pending, covariance, on_collision)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        table = Table(out / "runs.csv", list(grid), generate)  # from now on, no other process writes it
        with whole_file(out / "sweep.json") as unfinished:
            unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        _score_unedited(lm, facts, runs, table, out / "unedited", progress_bar, generate)
        failed = _run_all(lm, facts, runs, covariance, table, facts_per_chunk, on_collision, progress_bar, generate)
        if progress_bar:
            print(*best(table.rows), sep="\n", file=sys.stderr)
        draw(out / "sweep.svg", runs, table, list(grid))
    if failed:
        reasons = "\n".join(f"  {run}: {error}" for run, error in failed.items())
        raise RuntimeError(f"{len(failed)} of {len(pending)} runs failed; the others are in {table.path}\n{reasons}")
    return table.rows


def _run_all(
    lm: LanguageModel,
    facts: Sequence[Fact],
    runs: Sequence[Run],
    covariance: Covariance,
    table: Table,
    facts_per_chunk: int,
    on_collision: OnCollision,
    progress_bar: bool,
    generate: bool,
) -> dict[str, Exception]:
    """Do all runs without a row in the table, and add it; returns why some failed, run -> error."""
    out, pending = table.path.parent, _unfinished(runs, table)
    store = TargetStore(out / "values", lm, facts, runs)
    failed: dict[str, Exception] = {}
    seconds = done = 0.0
    for number, run in enumerate(pending):
        if progress_bar:
            left = sum(other.facts for other in pending[number:])
            time_left = f"; about {seconds * left / done / 60:.1f} min left, values still to find aside" if done else ""
            print(f"run {number + 1} of {len(pending)}: {run}{time_left}", file=sys.stderr, flush=True)
        kept = out / f"single-{_digest(run.row)}"
        try:
            targets, seconds_shared = store.find(run, facts_per_chunk, progress_bar)
            started = time.perf_counter()
            chosen = facts[: run.facts]
            spent = {"values": 0.0, "update": 0.0}
            if run.round_limit == "single":
                scores = evaluate_single(lm, chosen, run.method, covariance, facts_per_chunk=facts_per_chunk,
                                         progress_bar=progress_bar, generate=generate, targets=targets,
                                         checkpoint=kept)  # fmt: skip
                scoring = KeptScores(kept).seconds
            else:
                written = edit(lm, chosen, run.method, covariance, run.facts_per_round, facts_per_chunk, on_collision,
                               progress_bar, targets=targets)  # fmt: skip
                spent = written.provenance["seconds"]
                before = time.perf_counter()
                try:
                    asked = EvaluationSettings(generate=generate, progress_bar=progress_bar)
                    scores = evaluate(lm, chosen, settings=asked)
                finally:
                    written.revert(lm)
                scoring = time.perf_counter() - before
        except ResumeError:
            raise
        except (FloatingPointError, ValueError) as error:  # other settings may well do
            failed[str(run)] = error
            if progress_bar:
                print(f"failed: {error}", file=sys.stderr)
            continue
        seconds, done = seconds + time.perf_counter() - started, done + run.facts
        table.add(run, scores, spent["values"] + seconds_shared, spent["update"], scoring)
        remove_run(kept)
    return failed


def _check(lm: LanguageModel, facts: Sequence[Fact], covariance: Covariance, runs: Sequence[Run]) -> None:
    check_facts(facts)
    if lm.weights.owners:
        raise ValueError(f"{lm.name} carries edits ({', '.join(lm.weights.owners)}); revert them first")
    if all(fact.target_true is None for fact in facts):
        raise FactError("target_true: no fact has one, so there is no ES, PS, NS or S to compare runs by")
    if any(run.name == UNEDITED for run in runs):
        raise ValueError(f"methods: {UNEDITED!r} names the rows of the unedited model; choose another name")
    for run in runs:
        lm.check_layers(run.method.layers)
    covariance.check(lm, sorted({matrix for run in runs for matrix in run.method.places}))


def _check_folder(out: Path, record: dict[str, Any]) -> None:
    """Refuse a folder that holds something else than this sweep."""
    path = out / "sweep.json"
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(record))
        if other := [name for name in earlier | now if earlier.get(name) != now.get(name)]:
            raise ValueError(
                f"{out} holds a sweep with other {', '.join(other)} "
                f"({', '.join(f'{name}: {earlier.get(name)} there, {now.get(name)} here' for name in other)}); "
                "choose another folder, or delete that one"
            )
    check_sweep_folder(out)


def check_sweep_folder(out: Path) -> None:
    """Raise ValueError if `out` holds something else than a sweep."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "sweep.json").is_file())):
        raise ValueError(f"{out} exists and holds no sweep; choose another folder")


def _digest(value: Any) -> str:
    return digest(json.dumps(value, sort_keys=True))[:16]


def _unfinished(runs: Iterable[Run], table: Table) -> list[Run]:
    """The runs without a row, the first only of those that do the same."""
    found: dict[str, Run] = {}
    for run in runs:
        if table.find(run) is None:
            found.setdefault(json.dumps(run.row), run)
    return list(found.values())


def _announce(
    methods: Mapping[str, Method], grid: Mapping[str, Any], runs: Sequence[Run], pending: Sequence[Run]
) -> None:
    for name, method in methods.items():
        lacking = [field for field in grid if field not in swept_fields(method)]
        if lacking:
            print(f"{name} has no {', '.join(lacking)}: it is run once for all values of it", file=sys.stderr)
        if method.facts_per_solve is not None and any(run.name == name and run.round_limit != "single" for run in runs):
            print(f"{name} writes {method.facts_per_solve} fact a round at most", file=sys.stderr)
    finished = len({json.dumps(run.row) for run in runs}) - len(pending)
    if finished:
        print(f"{finished} runs are finished already", file=sys.stderr)


def _check_collisions(
    lm: LanguageModel, facts: Sequence[Fact], runs: Sequence[Run], covariance: Covariance, on_collision: OnCollision
) -> None:
    """Refuse now what a run would refuse when its turn comes: most of all, facts whose keys collide.

    Rounds of fewer facts are parts of the rounds of all, and swept fields other than the layers hardly move keys.
    """
    checked = {(run.name, run.method.layers, run.round_limit): run.method for run in runs}
    for (_, _, limit), method in checked.items():
        if limit == "single":
            continue
        with suppress(CovarianceError):  # which may well do with the group's other settings
            check_edit(lm, facts, method, covariance, limit, on_collision=on_collision)


def _score_unedited(
    lm: LanguageModel,
    facts: Sequence[Fact],
    runs: Sequence[Run],
    table: Table,
    folder: Path,
    progress_bar: bool,
    generate: bool,
) -> None:
    """Score the unedited model once, and average the first records for every count of facts."""
    missing = sorted({run.facts for run in runs if table.unedited(run.facts) is None}, reverse=True)
    if not missing:
        return
    # all facts, whatever is missing: what an earlier process kept is of all
    with progress(f"scoring {len(facts)} facts before", progress_bar) as report:
        records = score_and_keep(lm, facts, folder, settings=EvaluationSettings(generate=generate), report=report)
    seconds = KeptScores(folder).seconds
    for count in missing:
        table.add(None, summarize(facts[:count], records[:count]), scoring=seconds if count == len(facts) else 0.0)
    remove_run(folder)
