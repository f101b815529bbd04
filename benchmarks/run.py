"""Run benchmarks: `python -m benchmarks.run [row ...]` prints one table and writes benchmarks/results/<row>.json."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    Options,
    Result,
    WrongResultError,
    adaptors,
    covariance,
    evaluation,
    finetuning,
    hypernetworks,
    neurons,
    ops,
    tracing,
    update,
    values,
)
from benchmarks.figure import draw
from lightedit.files import whole_file

ROWS: dict[str, Callable[[Options], Result]] = {
    "values": values.row,
    "covariance": covariance.row,
    "update": update.row,
    "evaluation": evaluation.row,
    **{name: partial(evaluation.single_row, method) for name, method in evaluation.METHODS.items()},
    "single-limit": evaluation.limit_row,
    "ops": ops.row,
    "trace": tracing.row,
    "ft": finetuning.row,
    "ig": neurons.row,
    "grace": adaptors.row,
    "mend": hypernetworks.row,
}
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named rows, or all; returns the exit status, 1 if a row's result was wrong."""
    names, options = _parse(arguments)
    source = source_version()  # what is about to be measured, not what an editor saves meanwhile
    lines, notes, failures = [], [], []
    for number, name in enumerate(names, start=1):
        print(f"row {number} of {len(names)}: {name}", file=sys.stderr, flush=True)
        try:
            result = ROWS[name](options)
        except WrongResultError as error:
            failures.append(f"{name}: {error}")
            continue
        record: dict[str, Any] = {
            "row": name,
            **source,
            **environment(),
            "figures": result.figures,
            "notes": result.notes,
        }
        with whole_file(RESULTS / f"{name}.json") as unfinished:
            unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if "cases" in result.figures:
            machine = result.figures["device"] if result.figures["device"] != "cpu" else record["machine"]["cpu"]
            draw(RESULTS / f"{name}.svg", result.figures["cases"], f"{machine}, torch {record['versions']['torch']}")
        for measure, figure in result.table:  # the table comes when all rows are done, which may take long
            print(f"  {measure}: {figure}", file=sys.stderr, flush=True)
        lines += [(name, measure, figure) for measure, figure in result.table]
        notes += [f"{name}: {note}" for note in result.notes]
    if lines:
        print(_table(lines))
    for note in notes:
        print(f"note: {note}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _parse(arguments: Sequence[str] | None) -> tuple[list[str], Options]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--facts", type=int, default=Options.facts, help="facts to edit (default: %(default)s)")
    parser.add_argument(
        "--reference-facts", type=int, metavar="N", help="run slow references on the first N facts only: a quick look"
    )
    parser.add_argument("--quick", action="store_true", help="run the ops at a few sizes: minutes on two CPU cores")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.rows if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; rows are {', '.join(ROWS)}")
    if args.facts < 1:
        parser.error(f"--facts must be at least 1, got {args.facts}")
    if args.reference_facts is not None and not 1 <= args.reference_facts <= args.facts:
        parser.error(f"--reference-facts must be from 1 to --facts ({args.facts}), got {args.reference_facts}")
    return list(dict.fromkeys(args.rows)) or list(ROWS), Options(args.facts, args.reference_facts, args.quick)


def _table(lines: Sequence[tuple[str, str, str]]) -> str:
    lines = [("row", "measure", "figure"), *lines]
    row, measure = (max(len(line[column]) for line in lines) for column in (0, 1))
    return "\n".join(f"{line[0]:<{row}}  {line[1]:<{measure}}  {line[2]}" for line in lines)


def source_version() -> dict[str, Any]:
    """The commit, and whether the code differs from it; both None outside a git checkout."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("--no-optional-locks", "status", "--porcelain", "--", "lightedit", "benchmarks/*.py", "tests/*.py")
    return {"commit": commit, "uncommitted_changes": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, Any]:
    """The machine and the versions of libraries."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "lightedit")},
        },
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
