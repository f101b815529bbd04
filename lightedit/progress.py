"""Progress of long work on standard error: the share that is done and the time left."""

import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[float, float], None]

_LINE_EVERY = 15.0  # seconds between lines, if standard error is not a terminal


@contextmanager
def progress(description: str, show: bool = True) -> Iterator[Report]:
    """Show progress within the context: a bar in a terminal, elsewhere a line every 15 seconds.

    Yields:
        A function to call with (work done, work in all), in any unit.
    """
    console = Console(stderr=True)
    if not show:
        yield lambda done, total: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(description, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _lines(description)


def _lines(description: str) -> Report:
    started = last = time.monotonic()

    def report(done: float, total: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY and 0 < done <= total:
            last = now
            left = (now - started) * (total - done) / done
            print(f"{description}: {done / total:.0%}, about {left:.0f} s left", file=sys.stderr, flush=True)

    return report


def subprogress(report: Report | None, before: float, size: float, total: float) -> Report:
    """A function that reports the progress of one part of the work.

    Args:
        report: reports the progress of the whole work; None reports nothing.
        before: work before the part, in the unit of `total`.
        size: work of the part, in that unit.
        total: the whole work.
    """
    if report is None:
        return lambda done, of: None
    return lambda done, of: report(before + size * done / of, total)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Within the context, hide the trainer's advice about devices, loaders and services, which does not apply here.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the trainer itself would exit the process.
    """
    logger = logging.getLogger("lightning.pytorch")
    level, interrupt = logger.level, signal.getsignal(signal.SIGINT)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, interrupt or signal.default_int_handler)  # the trainer set it to be ignored
        raise KeyboardInterrupt from stop
    finally:
        logger.setLevel(level)
