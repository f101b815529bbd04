"""Figures: equal ones give equal files, names stay text, lines keep their ends, references fade."""

import itertools
import math
import re

import matplotlib
import pytest

from lightedit.figures import Axis, Level, Line, Panel, line_chart, save, thinned

POINTS = [(1.0, 2.0), (2.0, 30.0), (3.0, 4.0)]


def chart(*lines, x=Axis("x", whole=True), y=Axis("y"), **options):  # noqa: B008
    return line_chart([Panel("t", lines, x, y)], **options)


def texts(path):
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_equal_figures_give_equal_files_whatever_the_users_settings_are(tmp_path, kind):
    save(chart(Line("a", POINTS, 0)), tmp_path / f"a.{kind}")
    with matplotlib.rc_context({"lines.linewidth": 9, "svg.hashsalt": None, "axes.grid": True, "font.size": 30}):
        save(chart(Line("a", POINTS, 0)), tmp_path / f"b.{kind}")
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{kind}", f"b.{kind}"]
    save(chart(Line("a", POINTS[:2], 0)), tmp_path / f"b.{kind}")
    assert (tmp_path / f"a.{kind}").read_bytes() != (tmp_path / f"b.{kind}").read_bytes()


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.pdf: a figure is an \.svg or a \.png file"):
        save(chart(Line("a", POINTS, 0)), tmp_path / "a.pdf")
    assert list(tmp_path.iterdir()) == []


def test_names_stay_text(tmp_path):
    save(chart(Line("$a_1$ < b", POINTS, 0), y=Axis("cost in $, not in $"), legend_columns=1), tmp_path / "a.svg")
    assert {"$a_1$ &lt; b", "cost in $, not in $", "t"} <= set(texts(tmp_path / "a.svg"))


def test_a_vertical_axis_ends_at_round_numbers_and_holds_its_base(tmp_path):
    for axis, ends in ((Axis(), (0, 30)), (Axis(base=1.0), (0, 30)), (Axis(limits=(-3, 103)), (-3, 103))):
        assert chart(Line("a", POINTS, 0), y=axis).figure.axes[0].get_ylim() == ends
    ratios = [(1, 1.05), (2, 1.2)]
    assert chart(Line("a", ratios, 0), y=Axis(base=1.0)).figure.axes[0].get_ylim() == pytest.approx((1, 1.2))
    assert chart(Line("a", [(1, 3.0)], 0)).figure.axes[0].get_xlim() == (0, 2)


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [((1, 99), False), ((1, 100), True), ((0, 1e6), False), ((-1, 1e6), False), ((1e-3, 1e9), True)],
)
def test_an_axis_that_may_choose_is_logarithmic_where_values_span_two_decades(values, logarithmic):
    line = Line("a", list(enumerate(values)), 0)
    assert chart(line, y=Axis(logarithmic=None)).figure.axes[0].get_yscale() == ("log" if logarithmic else "linear")
    assert ("logarithmic" in chart(line, y=Axis(logarithmic=None)).about) == logarithmic
    assert chart(line, y=Axis(logarithmic=None, limits=(0, 1))).figure.axes[0].get_yscale() == "linear"


def test_an_interval_ends_at_the_axis():
    drawn = chart(Line("a", POINTS, 0, half_widths={1.0: 5.0, 2.0: 3.0, 3.0: math.nan}), y=Axis(limits=(0, 32)))
    bars = [line.get_ydata() for line in drawn.figure.axes[0].lines if line.get_marker() == "_"]
    assert [tuple(bar) for bar in bars] == [(0, 7), (27, 32)]


def test_thirty_series_differ_and_references_are_grey_and_fade():
    lines = [Line(str(n), POINTS, n) for n in range(30)] + [Level("u", 5.0, None), Level("v", 6.0, None)]
    drawn = chart(*lines, legend_columns=3)
    handles = drawn.figure.legends[0].legend_handles
    assert len({(handle.get_color(), handle.get_marker()) for handle in handles[:30]}) == 30
    grey, fainter = handles[30:]
    assert grey.get_color() == fainter.get_color() and grey.get_alpha() == 1 > fainter.get_alpha()


def test_a_line_of_many_points_has_a_mark_at_its_end_only():
    for count, marks in ((25, 25), (26, 1)):
        assert [len(titles) for titles in chart(Line("a", [(x, 1.0) for x in range(count)], 0)).titles.values()] == [
            marks
        ]


def test_a_line_of_many_points_is_thinned_to_its_ends_and_what_is_between():
    points = [(float(x), float(x)) for x in range(1000)]
    kept = thinned(points)
    assert len(kept) == 200 and kept[0] == points[0] and kept[-1] == points[-1]
    assert max(b[0] - a[0] for a, b in itertools.pairwise(kept)) <= 6
