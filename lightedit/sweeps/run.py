"""Running a sweep: every run starts from the unedited model, is scored, and is reverted."""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightedit.data.facts import Fact, FactError, check_facts, distinct_facts
from lightedit.data.words import counted
from lightedit.digests import digest
from lightedit.editing.run import edit, prepare, rounds_of
from lightedit.editing.settings import RunSettings
from lightedit.errors import ArgumentError, LightEditError, RunFailedError
from lightedit.evaluation.evaluate import evaluate, summarize
from lightedit.evaluation.kept_scores import KeptScores
from lightedit.evaluation.result import Evaluation
from lightedit.evaluation.scoring import score_and_keep
from lightedit.evaluation.settings import EvaluationSettings
from lightedit.evaluation.single import evaluate_single
from lightedit.files import whole_file
from lightedit.lm import LanguageModel
from lightedit.methods.needs import covariance_for
from lightedit.methods.protocol import Editor, Method, check_model_and_method
from lightedit.progress import progress
from lightedit.runs.folder import ResumeError, locked, remove_run
from lightedit.runs.provenance import computing
from lightedit.statistics.covariance import Covariance, CovarianceError, IndefiniteError
from lightedit.sweeps.figure import draw
from lightedit.sweeps.plan import Counts, RoundLimit, Run, plan, swept_fields
from lightedit.sweeps.table import UNEDITED, Row, Table, best
from lightedit.sweeps.targets import TargetStore


def sweep(
    lm: LanguageModel,
    facts: Sequence[Fact],
    methods: Mapping[str, Method],
    *,
    out: str | Path,
    covariance: Covariance | None = None,
    counts: Counts | None = None,
    facts_per_round: Sequence[RoundLimit] = (None,),
    grid: Mapping[str, Sequence[Any]] | None = None,
    settings: RunSettings | None = None,
    evaluation: EvaluationSettings | None = None,
) -> list[Row]:
    """Run every combination of methods and swept values, and write one table and one figure.

        rows = sweep(lm, facts, {"MEMIT": MEMIT(layers=(4, 5, 6))}, covariance=covariance, out="sweeps/first",
                     counts="log17", grid={"lambda_": [100.0, 1000.0]})

    Each run writes the first facts of the list into the unedited model, scores them, and is reverted. Values at the
    unedited model are found once for all runs with equal settings of step 1. If a sweep is started again with the same
    arguments, it skips the finished runs. `out` then holds runs.csv (see `Table`), sweep.svg, sweep.json with the
    arguments, and the values.

    Args:
        lm: the unedited model; it is unedited afterwards, too.
        facts: the facts to write; at least one must have a `target_true`, which the scores need. Those that repeat an
            earlier one are dropped with a warning.
        methods: name, chosen freely -> method.
        out: a folder of this sweep only.
        covariance: second moments at the `covariance_places` of all methods; by default they are estimated from
            self-generated text and kept in the cache.
        counts: numbers of facts to write; None for all, "log17" for PMET's numbers (see `LOG17`).
        facts_per_round: numbers of facts written together; None for all facts of a run, "single" to edit and score
            each fact alone (see `evaluate_single`).
        grid: field of a method -> values, such as {"lambda_": [100.0, 1000.0], "values.lr": [0.1, 0.5]}. Every
            combination is run; a method that lacks a field is run without it.
        settings: settings of each run, without facts_per_round and validate_every. Outcomes are not asked for. Values
            of merged facts are not shared between runs.
        evaluation: settings of the scoring; with `generate` the table has a column of generation entropy (GE).

    Returns:
        The rows of the table.

    Raises:
        ArgumentError: an argument is wrong, or `out` holds another sweep; raised before work starts.
        ResumeError: another process uses `out`.
        RunFailedError: some runs failed. The table holds the others, and the same call runs only the failed ones again.
    """
    out, grid = Path(out), dict(grid or {})
    settings, evaluation = settings or RunSettings(), evaluation or EvaluationSettings()
    facts = distinct_facts(facts)
    runs = plan(methods, len(facts), counts, facts_per_round, grid)
    facts = facts[: max(run.facts for run in runs)]
    if covariance is None:
        covariance = covariance_for(lm, [run.method for run in runs], progress_bar=settings.progress_bar)
    sweep_ = _Sweep(lm, facts, runs, covariance, out, settings, evaluation, list(grid))
    sweep_.check()
    record = {
        **sweep_.inputs(),
        "methods": {name: repr(method) for name, method in methods.items()},
        "counts": sorted({run.facts for run in runs}),
        "facts_per_round": list(facts_per_round),
        "grid": {field: list(values) for field, values in grid.items()},
    }
    _check_folder(out, record)
    pending = _unfinished(runs, sweep_.table())
    if settings.progress_bar:
        _announce(methods, grid, runs, pending)
    first = sweep_.check_collisions(pending)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        table = sweep_.table()  # read under the lock, so that no other process writes it
        with whole_file(out / "sweep.json") as unfinished:
            unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        sweep_.score_unedited(table)
        failed = sweep_.run_all(table, first)
        if settings.progress_bar:
            print(*best(table.rows), sep="\n", file=sys.stderr)
        draw(out / "sweep.svg", runs, table, list(grid))
    if failed:
        reasons = "\n".join(f"  {run}: {error}" for run, error in failed.items())
        raise RunFailedError(f"{len(failed)} of {len(pending)} runs failed; the others are in {table.path}\n{reasons}")
    return table.rows


@dataclass(frozen=True)
class _Sweep:
    """The arguments of a sweep, and the steps that run it."""

    lm: LanguageModel
    facts: list[Fact]
    runs: list[Run]
    covariance: Covariance | None
    out: Path
    settings: RunSettings
    evaluation: EvaluationSettings
    fields: list[str]

    def table(self) -> Table:
        """The table, read from disk."""
        return Table(self.out / "runs.csv", self.fields, self.evaluation.generate)

    def inputs(self) -> dict[str, Any]:
        """Everything that determines the results besides methods and sizes, as JSON values."""
        places = sorted({place for run in self.runs for place in run.method.covariance_places})
        moments = {} if self.covariance is None else {place.key: self.covariance[place] for place in places}
        return {
            "model": f"{self.lm.name} {self.lm.fingerprint}",
            **computing(self.lm),
            "device": self.lm.device.type,
            "facts": digest(json.dumps([fact.to_dict() for fact in self.facts]), {}),
            "covariance": None if self.covariance is None else asdict(self.covariance.provenance),
            "covariance tensors": digest("", moments),
            "on_collision": self.settings.on_collision,
            "collision_similarity": self.settings.collision_similarity,
            "generate": self.evaluation.generate,
        }

    def check(self) -> None:
        """Refuse arguments with which no run could succeed."""
        check_facts(self.facts)
        if self.lm.weights.edits:
            raise ArgumentError(f"{self.lm.name} carries edits ({', '.join(self.lm.weights.edits)}); revert them first")
        if self.settings.facts_per_round is not None or self.settings.validate_every is not None:
            raise ArgumentError("settings: a sweep has its own facts_per_round and validates nothing; leave both out")
        if all(fact.target_true is None for fact in self.facts):
            raise FactError("target_true: no fact has one, so there is no ES, PS, NS or S to compare runs by")
        if any(run.name == UNEDITED for run in self.runs):
            raise ArgumentError(f"methods: {UNEDITED!r} names the rows of the unedited model; choose another name")
        for run in self.runs:
            check_model_and_method(self.lm, run.method)
            run.method.check(self.lm)
        places = sorted({place for run in self.runs for place in run.method.covariance_places})
        if places and self.covariance is not None:
            self.covariance.check(self.lm, places, factor=False)

    def covariance_of(self, method: Method) -> Covariance | None:
        """The covariance if `method` needs one, else None."""
        return self.covariance if method.covariance_places else None

    def check_collisions(self, pending: Sequence[Run]) -> Editor | None:
        """Raise, before the first run, errors that a later run would raise; mainly facts whose keys collide.

        One run is prepared for each method, set of places and round limit. Other swept fields hardly change keys, and
        runs of fewer facts have the same rounds or parts of them.

        Returns:
            The first editor that was prepared, for later ones to share its work; None if there is none.
        """
        first: Editor | None = None
        groups: dict[Any, Run] = {}
        for run in pending:
            if run.round_limit != "single":
                groups.setdefault((run.name, run.method.places, run.round_limit), run)
        for run in groups.values():
            try:
                editor = prepare(
                    self.lm,
                    self.facts,
                    run.method,
                    covariance=self.covariance_of(run.method),
                    settings=self._settings(run),
                    like=first,
                )
                first = first or editor
            except IndefiniteError:
                raise
            except CovarianceError:  # the group's other settings may be valid
                continue
        return first

    def _settings(self, run: Run) -> RunSettings:
        limit = run.round_limit
        return replace(self.settings, facts_per_round=limit if isinstance(limit, int) else None, outcomes=False)

    def score_unedited(self, table: Table) -> None:
        """Score the unedited model once, and average the first records for every count of facts."""
        missing = sorted({run.facts for run in self.runs if table.unedited(run.facts) is None}, reverse=True)
        if not missing:
            return
        folder, facts = self.out / "unedited", self.facts
        # always all facts, because the scores that an earlier process kept are of all facts
        with progress(f"scoring {counted(len(facts))} before", self.settings.progress_bar) as report:
            records = score_and_keep(self.lm, facts, folder, settings=self.evaluation, report=report)
        seconds = KeptScores(folder).seconds
        for count in missing:
            scores = summarize(facts[:count], records[:count])
            table.add(None, scores, scoring=seconds if count == len(facts) else 0.0)
        remove_run(folder)

    def run_all(self, table: Table, like: Editor | None) -> dict[str, Exception]:
        """Do all runs that have no row in the table, and add their rows; returns failed runs, run -> error."""
        pending = _unfinished(self.runs, table)
        store = TargetStore(self.out / "values", self.lm, self.facts, self.runs, self.settings)
        failed: dict[str, Exception] = {}
        seconds = done = 0.0
        for number, run in enumerate(pending):
            if self.settings.progress_bar:
                left = sum(other.facts for other in pending[number:])
                time_left = (
                    f"; about {seconds * left / done / 60:.1f} min left, without searches for values" if done else ""
                )
                print(f"run {number + 1} of {len(pending)}: {run}{time_left}", file=sys.stderr, flush=True)
            try:
                editor = self._prepare(run, like)
                results, seconds_shared = store.find(run, editor)
                editor.give(results)
                started = time.perf_counter()
                scores, spent, scoring = self._run(run, editor)
            except ResumeError:
                raise
            except LightEditError as error:  # runs with other settings may succeed
                failed[str(run)] = error
                if self.settings.progress_bar:
                    print(f"failed: {error}", file=sys.stderr)
                continue
            like = editor
            seconds, done = seconds + time.perf_counter() - started, done + run.facts
            table.add(run, scores, spent["values"] + seconds_shared, spent["update"], scoring)
            remove_run(self._kept(run))
        return failed

    def _prepare(self, run: Run, like: Editor | None) -> Editor:
        chosen, settings = self.facts[: run.facts], self._settings(run)
        editor = run.method.editor(self.lm, covariance=self.covariance_of(run.method), settings=settings)
        rounds = None if run.round_limit == "single" else rounds_of(chosen, run.method, settings).rounds
        editor.prepare(chosen, rounds, like)
        return editor

    def _run(self, run: Run, editor: Editor) -> tuple[Evaluation, dict[str, float], float]:
        """Edit, score and revert; returns the scores, the edit's seconds by step, and the seconds of the scoring."""
        if run.round_limit == "single":
            scores = evaluate_single(
                self.lm,
                editor.facts,
                run.method,
                settings=self.evaluation,
                facts_per_chunk=self.settings.facts_per_chunk,
                checkpoint=self._kept(run),
                prepared=editor,
            )
            return scores, {"values": 0.0, "update": 0.0}, KeptScores(self._kept(run)).seconds
        written = edit(self.lm, editor.facts, run.method, settings=self._settings(run), prepared=editor)
        started = time.perf_counter()
        try:
            scores = evaluate(self.lm, editor.facts, settings=self.evaluation)
        finally:
            written.revert(self.lm)
        return scores, written.record.seconds, time.perf_counter() - started

    def _kept(self, run: Run) -> Path:
        return self.out / f"single-{digest(json.dumps(run.row, sort_keys=True), {})[:16]}"


def _check_folder(out: Path, record: dict[str, Any]) -> None:
    """Raise ArgumentError if `out` holds another sweep, or no sweep but other files."""
    path = out / "sweep.json"
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(record))
        if other := [name for name in earlier | now if earlier.get(name) != now.get(name)]:
            raise ArgumentError(
                f"{out} holds a sweep with other {', '.join(other)} "
                f"({', '.join(f'{name}: {earlier.get(name)} there, {now.get(name)} here' for name in other)}); "
                "choose another folder, or delete that one"
            )
    check_sweep_folder(out)


def check_sweep_folder(out: Path) -> None:
    """Raise ArgumentError if `out` exists and is neither empty nor the folder of a sweep."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "sweep.json").is_file())):
        raise ArgumentError(f"{out} exists and holds no sweep; choose another folder")


def _unfinished(runs: Iterable[Run], table: Table) -> list[Run]:
    """The runs without a row; of equal runs only the first."""
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
