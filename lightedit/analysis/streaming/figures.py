"""The figure of a stream: scores by number of edits."""

from pathlib import Path

from lightedit.analysis.streaming.result import SCORES, Stream
from lightedit.figures import Axis, Drawing, Line, Panel, line_chart, save


def stream_figure(found: Stream) -> Drawing:
    """TRR, ERR, ES and generalization by number of edits, one line each."""
    lines = []
    for number, name in enumerate(SCORES):
        points = [(float(step.edits), value) for step in found.steps if (value := getattr(step, name)) is not None]
        if points:
            lines.append(Line(name, points, number))
    score = {"f1": "F1 of words", "accuracy": "accuracy", "perplexity": "perplexity"}[found.settings.score]
    limits = None if found.settings.score == "perplexity" else (0.0, 1.0)
    title = f"{found.method.get('name', 'Edits')} in {found.model}"
    panel = Panel(title, lines, Axis("edits", whole=True), Axis(score, limits, None))
    return line_chart([panel], (420, 280), legend_columns=len(lines))


def save_stream_figure(found: Stream, folder: Path) -> list[Path]:
    """Write the figure as stream.svg and stream.png, and return the files; none if there is no score."""
    if not any(getattr(step, name) is not None for step in found.steps for name in SCORES):
        return []
    drawing = stream_figure(found)
    files = [folder / f"stream.{suffix}" for suffix in ("svg", "png")]
    for file in files:
        save(drawing, file)
    return files
