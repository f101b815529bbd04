"""Reports: one self-contained HTML file about one run, or about several side by side."""

from lightedit.report.page import report

__all__ = ["report"]
