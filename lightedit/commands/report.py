"""`lightedit report`."""

from pathlib import Path

import lightedit as le


def report(runs: list[Path], out: Path = Path("report.html"), overwrite: bool = False) -> None:
    """Write one HTML file about one run, or about several side by side: lightedit report RUN... --out report.html.

    A run is the folder of an edit (`lightedit edit --out`), of evaluations or of a log, or the JSON file of an
    evaluation (`lightedit evaluate --out`). The HTML file is self-contained.

    Args:
        runs: the runs; a list in brackets, or without --runs, one after the other before all options.
        out: the HTML file; an earlier report is replaced.
        overwrite: also replace a file that is not a report.
    """
    print(f"saved the report in {le.report(runs, out, overwrite=overwrite)}")
