"""The report as a person sees it: opened in a real headless browser, on a phone's width and on a desktop's."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightedit.reports.page import report
from tests.reports.browser import NAMES, Browser, find
from tests.reports.runs import FACTS, MARKUP, evaluation, save_run

WIDTHS = [390, 1400]

BOXES = """
[...document.querySelectorAll('h1, h2, .scroll, figure > svg, article')]
    .filter(node => !node.closest('details:not([open])'))
    .map(node => { const box = node.getBoundingClientRect();
                   return [node.tagName, box.left, box.right, box.width, box.height]; })
"""
OUTSIDE_FIGURES = """
[...document.querySelectorAll('figure > svg')].flatMap(svg => {
    const page = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text, path')].map(node => [node, node.getBoundingClientRect()])
        .filter(([_, box]) => box.left < page.left - 1 || box.right > page.right + 1
                              || box.top < page.top - 1 || box.bottom > page.bottom + 1)
        .map(([node, _]) => node.outerHTML);
})
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with Browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    return report(save_run(folder / "edit"), folder / "report.html")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    runs = [save_run(folder / "memit", 1.0), save_run(folder / "a method with a long name", 3.0, "ENCORE")]
    return report(runs, folder / "report.html")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few facts, so that all are shown: those with markup, a long word, text from right to left."""
    folder = tmp_path_factory.mktemp("texts")
    evaluation(facts=FACTS[:9]).save(folder / "scores.json")
    return report(folder / "scores.json", folder / "report.html")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("runs", ["one", "two"])
def test_the_page_is_quiet_and_everything_is_in_sight(browser, request, runs, width, dark):
    browser.open(request.getfixturevalue(runs), width, dark=dark)
    assert browser.complaints == []
    assert [address for address in browser.requests if not address.startswith("data:")] == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width

    boxes = browser.evaluate(BOXES)
    kinds = [kind for kind, *_ in boxes]
    assert kinds.count("svg") >= 8 and kinds.count("DIV") >= 2 and kinds.count("ARTICLE") >= 9
    for kind, left, right, wide, high in boxes:
        assert wide > 100 and high > 10, kind
        assert 0 <= left < right <= width, kind
    assert browser.evaluate(OUTSIDE_FIGURES) == []


@pytest.mark.parametrize("runs", ["one", "two", "texts"])
def test_nothing_sticks_out_when_all_is_unfolded(browser, request, runs):
    browser.open(request.getfixturevalue(runs), 390)
    browser.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390


def test_dark_and_light_differ_and_can_be_read(browser, one):
    found = []
    for dark in (False, True):
        browser.open(one, 1400, dark=dark)
        colors = browser.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        text, page = (_luminance(color) for color in colors)
        assert (max(text, page) + 0.05) / (min(text, page) + 0.05) > 7  # WCAG's enhanced contrast
        found.append(page)
    assert found[0] > 0.8 and found[1] < 0.05


def _luminance(color: str) -> float:
    parts = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_texts_stay_texts(browser, texts):
    browser.open(texts, 1400)
    assert browser.complaints == [] and browser.evaluate("document.querySelectorAll('script, img').length") == 0
    shown = browser.evaluate("document.body.innerText")
    for fact in FACTS[:3]:
        assert fact.subject in shown and fact.target_new in shown
    assert MARKUP in shown and "onerror" in shown


def test_these_tests_see_what_they_look_for(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><body><img src='http://example.invalid/a.png'><script>throw 1</script>"
        "<div style='width: 2000px'>wide</div>"
    )
    browser.open(page, 390)
    assert any("Uncaught" in complaint for complaint in browser.complaints)
    assert "http://example.invalid/a.png" in browser.requests
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
