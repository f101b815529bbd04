"""`lightedit report`."""

from pathlib import Path

import lightedit as le


def report(runs: list[Path], out: Path = Path("report.html"), overwrite: bool = False) -> None:
    """Write one HTML file about one run, or about several side by side: lightedit report RUN... --out report.html.

    A run is the folder of an edit (`lightedit edit --out`), of evaluations or of a log, or the JSON file of an
    evaluation (`lightedit evaluate --out`). The file needs nothing beside it and fetches nothing.

    Args:
        runs: the runs; as a list in brackets, or one after the other before all options, without --runs.
        out: the file; an earlier report is replaced.
        overwrite: replace a file that is no report, too.
    """
    print(f"saved the report in {le.report(runs, out, overwrite=overwrite)}")
