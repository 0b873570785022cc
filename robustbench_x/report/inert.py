"""Text from outside (names, paths, messages) made harmless for each view: shown as text, never obeyed."""

import html
import re

__all__ = ["html_text", "markdown_text", "plain", "spreadsheet_text"]

_CUT = 300
_MARKDOWN = re.compile(r"[\\`*~|]|\](?=[(\[:])")
_HTML = re.compile(r"<(?=[A-Za-z/!?])|&(?=[A-Za-z#])")
_MENTION = re.compile(r"(?<!\w)@(?=\w)")
_NO_MENTION = "@&#8203;"  # a space of no width: GitHub decodes entities before it looks for people to tell
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

    Only what would be obeyed is escaped, so that figures such as `[0.1, 0.2]` and `<= 0.3` stay readable as source.
    """
    text = _HTML.sub(lambda match: html.escape(match[0]), plain(text, limit))
    text = _MARKDOWN.sub(lambda match: f"\\{match[0]}", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    return _MENTION.sub(_NO_MENTION, text)


def html_text(text: str) -> str:
    """`text` inside an HTML element, where Markdown is not read."""
    return _MENTION.sub(_NO_MENTION, html.escape(plain(text)))


def spreadsheet_text(text: str) -> str:
    """`text` in full that no spreadsheet runs as a formula."""
    text = plain(text, limit=None)
    return f"'{text}" if text.startswith(_FORMULA) else text
