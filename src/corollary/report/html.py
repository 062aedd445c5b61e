"""HTML and SVG as nested calls. Text is escaped unless it is already `Html`, so nothing from a record can become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias
from urllib.parse import urlsplit

_VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta"})


class Html(str):
    """Markup that is already escaped."""

    __slots__ = ()


Child: TypeAlias = "str | int | float | Iterable[Child] | None"
Attribute: TypeAlias = "str | int | float | bool | None"


def compact(value: float) -> str:
    """A coordinate with at most two decimals and no needless zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"


def _write(child: Child, into: list[str]) -> None:
    if child is None:
        return
    if isinstance(child, Html):
        into.append(str(child))
    elif isinstance(child, str):
        into.append(html.escape(child))
    elif isinstance(child, (int, float)):
        into.append(html.escape(str(child)))
    else:
        for item in child:
            _write(item, into)


def join(*children: Child) -> Html:
    """Children one after the other, without an element around them."""
    parts: list[str] = []
    _write(children, parts)
    return Html("".join(parts))


def h(tag: str, *children: Child, **attributes: Attribute) -> Html:
    """One element.

    Args:
        tag: name of the element.
        children: text (escaped), `Html` (kept), numbers, None (nothing), or iterables of these.
        attributes: ``class_`` and ``for_`` lose the underscore, other underscores become hyphens; None and False leave the
            attribute out, True writes its bare name.

    Example:
        >>> print(h("a", "R&D <b>", href="x?a=1&b=2", class_="link", hidden=False))
        <a href="x?a=1&amp;b=2" class="link">R&amp;D &lt;b&gt;</a>
    """
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        spelled = name.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(f" {spelled}")
        else:
            text = compact(value) if isinstance(value, float) else str(value)
            parts.append(f' {spelled}="{html.escape(text)}"')
    parts.append(">")
    if tag in _VOID:
        return Html("".join(parts))
    _write(children, parts)
    parts.append(f"</{tag}>")
    return Html("".join(parts))


def inline(text: str) -> Html:
    """A line of prose; what stands between backticks becomes code, and a small power is not broken at its hyphen.

    Example:
        >>> print(inline("use ``lr < 1`` & :math:`x`, to 1e-6"))
        use <code>lr &lt; 1</code> &amp; <code>x</code>, to <span class="whole">1e-6</span>
    """
    parts: list[Html] = []
    for i, piece in enumerate(re.split(r"(?::\w+:)?(``.+?``|`[^`]+`)", text)):
        if i % 2:
            parts.append(h("code", piece.strip("`")))
        else:
            words = re.split(r"((?<![\w.])[\d.]+e-\d+|\b\w\^-[\d/]+)", piece)
            parts += [h("span", word, class_="whole") if k % 2 else join(word) for k, word in enumerate(words)]
    return join(parts)


def prose(text: str) -> Html:
    """Paragraphs, parted by blank lines."""
    return join(h("p", inline(" ".join(p.split()))) for p in re.split(r"\n\s*\n", text) if p.strip())


def link(text: Child, address: str, **attributes: Attribute) -> Html:
    """A link to a web address; anything that is not http or https stays text, so a record cannot plant a script."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return join(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        return join(text)
    return h("a", text, href=address, rel="noreferrer", **attributes)
