"""HTML that cannot forget to escape: text becomes markup only as the content of an element."""

from html import escape

_WITHOUT_CONTENT = ("br", "link", "meta")


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def element(tag: str, /, *content: str | None, **attributes: str | float | None) -> Html:
    """An element; content that is not `Html` is escaped, and so are all values of attributes.

    Args:
        tag: its name.
        content: its children; None stands for nothing.
        attributes: a trailing underscore is dropped and others become hyphens (class_, stroke_width); one that is
            None is left out.

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
    """Several pieces one after the other, each escaped unless it is `Html`."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in content if part is not None))


def scrolling_table(caption: str, *rows: Html) -> Html:
    """A table that scrolls within a box of its own where the page is narrow; its caption stands above the box.

    Args:
        caption: what the table shows.
        rows: `tr` elements, the heads first.
    """
    table = element("table", element("caption", caption, class_="unseen"), *rows)
    # a focus that the keyboard can give lets it scroll the box
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)
