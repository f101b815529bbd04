"""Drawings as `svg` elements of an HTML page, without ids, fonts, fixed colours or external files."""

import io
import re
from collections.abc import Iterator, Mapping
from xml.etree import ElementTree

from lightedit.figures import PALETTE, Drawing, style
from lightedit.reports.html import Html

_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_NAMES = {color: name for name, color in PALETTE.items()}


def svg(drawing: Drawing) -> Html:
    """A drawing as an `svg` element.

    The element has no ids, so a page can hold several. Its text uses the page's font, and its colours are the CSS
    variables named in `PALETTE`.
    """
    content = io.StringIO()
    with style():
        drawing.figure.savefig(content, format="svg")
    root = ElementTree.fromstring(content.getvalue())
    shapes = {node.get("id", ""): node.get("d", "") for node in root.iter(f"{_SVG}path")}
    spoken = {"role": "img", "aria-label": drawing.about} if drawing.about else {"aria-hidden": "true"}
    inline = ElementTree.Element("svg", {"viewBox": root.get("viewBox", ""), **spoken})
    inline.extend(_shown(root, shapes, drawing.titles, iter(())))
    return Html(ElementTree.tostring(inline, encoding="unicode"))


def _shown(
    node: ElementTree.Element, shapes: Mapping[str, str], titles: Mapping[str, list[str]], own: Iterator[str]
) -> list[ElementTree.Element]:
    """The visible elements of a node of matplotlib's SVG, without groups and definitions.

    Args:
        node: a group, a path, a reused path, or a text; other nodes are not visible.
        shapes: id of a path -> its outline.
        titles: see `Drawing.titles`.
        own: titles of this node's marks, consumed in order.
    """
    kind = node.tag.removeprefix(_SVG)
    if kind in ("svg", "g"):
        name = node.get("id", "")
        own = iter(titles[name]) if name in titles else own
        return [part for child in node for part in _shown(child, shapes, titles, own)]
    if kind == "path":
        seen = node.get("style") != "fill: none"  # the backgrounds of figure and panels are invisible
        return [ElementTree.Element("path", {"d": _outline(node.get("d", ""))} | _styled(node))] if seen else []
    if kind == "text":
        turned = {} if "rotate(-0 " in node.get("transform", "") else {"transform": _rounded(node.get("transform", ""))}
        place = {"x": _rounded(node.get("x", "0")), "y": _rounded(node.get("y", "0"))}
        text = ElementTree.Element("text", place | turned | _styled(node))
        text.text = node.text
        return [text]
    if kind == "use":
        moved = f"translate({_rounded(node.get('x', '0'))},{_rounded(node.get('y', '0'))})"
        shape = _outline(shapes[node.get(_LINK, "").removeprefix("#")])
        mark = ElementTree.Element("path", {"d": shape, "transform": moved} | _styled(node))
        title = next(own, None)
        if title is not None:
            ElementTree.SubElement(mark, "title").text = title
        return [mark]
    return []


def _styled(node: ElementTree.Element) -> dict[str, str]:
    """A node's style, with CSS variables for colours and without fonts."""
    rules = [rule for rule in node.get("style", "").split("; ") if rule and not rule.startswith("font-family")]
    text = re.sub("#[0-9a-f]{6}", lambda found: f"var(--{_NAMES[found[0]]})", ";".join(rules))
    return {"style": text.replace(": ", ":")} if text else {}


def _outline(path: str) -> str:
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", _rounded(path)).strip()


def _rounded(text: str) -> str:
    """The text with all its numbers rounded to a hundredth of a point."""
    return re.sub(r"-?\d+\.\d+", lambda found: f"{round(float(found[0]), 2):g}", text)
