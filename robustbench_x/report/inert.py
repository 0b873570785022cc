"""Text from outside (names, paths, messages) made harmless for each view: shown as text, never obeyed."""

import html
import re

__all__ = ["html_text", "markdown_text", "plain", "spreadsheet_text"]

_CUT = 300
_MARKDOWN = re.compile(r"([\\`*\[\]~|])")
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def plain(text: str, limit: int | None = _CUT) -> str:
    """`text` on one line, without control, format or direction characters, cut in its middle at `limit` characters.

    >>> plain("a\\x1b[31m\\nb")
    'a [31m b'
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if limit is None or len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def markdown_text(text: str, limit: int = _CUT) -> str:
    """`text` for a Markdown paragraph or table cell: no table break, no HTML, no emphasis, link or mention.

    An underscore inside a word stays as it is: GitHub does not read it as emphasis.
    """
    text = html.escape(plain(text, limit), quote=False)
    text = _MARKDOWN.sub(r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    return re.sub(r"(?<!\w)@", "&#64;", text)


def html_text(text: str) -> str:
    """`text` inside an HTML element, where Markdown is not read."""
    return html.escape(plain(text))


def spreadsheet_text(text: str) -> str:
    """`text` in full that no spreadsheet runs as a formula."""
    text = plain(text, limit=None)
    return f"'{text}" if text.startswith(_FORMULA) else text
