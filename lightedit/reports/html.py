"""HTML with automatic escaping: a string becomes markup only through `element` and `group`."""

from html import escape

_WITHOUT_CONTENT = ("br", "link", "meta")


class Html(str):
    """A string that is markup, and is not escaped again."""

    __slots__ = ()


def element(tag: str, /, *content: str | None, **attributes: str | float | None) -> Html:
    """An element. Content that is not `Html` is escaped, and so are all values of attributes.

    Args:
        tag: the element's name.
        content: its children; None is left out.
        attributes: its attributes. In names, a trailing underscore is dropped and others become hyphens (class_,
            stroke_width). An attribute that is None is left out.

    >>> element("td", "a < b", class_="number")
    '<td class="number">a &lt; b</td>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in _WITHOUT_CONTENT:
        return Html(f"<{tag}{given}>")
    return Html(f"<{tag}{given}>{group(*content)}</{tag}>")


def group(*content: str | None) -> Html:
    """Concatenate pieces, each escaped unless it is `Html`."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in content if part is not None))


def scrolling_table(caption: str, *rows: Html) -> Html:
    """A table in a box that scrolls if the page is narrow.

    Args:
        caption: the table's name, for screen readers only.
        rows: `tr` elements, the heads first.
    """
    table = element("table", element("caption", caption, class_="unseen"), *rows)
    # tabindex lets the keyboard focus the box and scroll it
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)
