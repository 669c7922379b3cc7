"""The parts an HTML page is made of. Whatever is not `Html` already is escaped, so that no name becomes markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

# What neither HTML nor XML may hold: controls but tab and line ends, surrogates and the two non-characters.
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Markup, to be taken as it is."""

    __slots__ = ()


def printable(text: str) -> str:
    """The text with a replacement character for each that a page cannot hold."""
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def escape(text: str) -> Html:
    """Text as markup; markup as it is."""
    return text if isinstance(text, Html) else Html(html.escape(printable(text)))


def join(*parts: str) -> Html:
    """Parts one after the other."""
    return Html("".join(map(escape, parts)))


def element(name: str, *children: str, **attributes: str | None) -> Html:
    """An element with its children; `class_` is written `class`, an attribute that is None is left out."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(printable(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{told}>{join(*children)}</{name}>")


def paragraph(text: str, kind: str | None = None) -> Html:
    """A paragraph, `note` for what explains."""
    return element("p", text, class_=kind)


def section(title: str, *children: str) -> Html:
    """A section under its title; nothing where no child says anything."""
    return element("section", element("h2", title), *children) if any(children) else Html()


def table(
    columns: Sequence[tuple[str, str]],
    rows: Iterable[Sequence[str]],
    label: str,
    marked: Sequence[tuple[int, str]] = (),
) -> Html:
    """A table that scrolls in its own box.

    Args:
        columns: title and kind of each: `n` for numbers, `name` for what may break anywhere, `short` for what may
            not break, else empty.
        rows: cells of each row.
        label: what it shows, for those who hear the page.
        marked: rows by index with a class of their own.
    """
    kinds = [kind or None for _, kind in columns]
    head = (element("th", title, scope="col", class_="n" if kind == "n" else None) for title, kind in columns)
    own = dict(marked)
    body = (
        element(
            "tr",
            *(element("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)),
            class_=own.get(index),
        )
        for index, row in enumerate(rows)
    )
    whole = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    return element("div", whole, class_="scroll", role="region", aria_label=label, tabindex="0")


def folded(title: str, *children: str) -> Html:
    """What opens at a click."""
    return element("details", element("summary", title), *children)


def figure(drawing: str, caption: str = "") -> Html:
    """A drawing (SVG) and what to say about it."""
    return element("figure", Html(drawing), element("figcaption", caption) if caption else Html())


def legend(entries: Iterable[tuple[str, str, str]], kind: str = "legend") -> Html:
    """What the marks of a drawing mean: the mark as a letter, its colour by name, its meaning; no letter, a swatch.

    `legend row` stands in a row above a drawing.
    """
    return element(
        "ul",
        *(
            element(
                "li",
                element("span", mark, class_="key", style=f"color:var(--{colour})", aria_hidden="true")
                if mark
                else element("span", class_="swatch", style=f"background:var(--{colour})", aria_hidden="true"),
                element("span", words),
            )
            for mark, colour, words in entries
        ),
        class_=kind,
    )
