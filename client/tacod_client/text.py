"""Texts for the wire and for terminals, whatever characters they hold."""

from __future__ import annotations

import os
import unicodedata

__all__ = ["encodable", "printable", "shortened", "typed"]

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of what a terminal would obey, or not show: controls, formats, lone surrogates, ends of lines."""
_JOINERS = "\u200c\u200d"
"""Formats that words and emoji are spelled with."""


def encodable(text: str) -> str:
    """A text that UTF-8 can encode; names of files, and in files, may be no valid Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """A text as one line for a terminal: names may have line ends, and characters that terminals take for commands."""
    return "".join(
        each.encode("unicode_escape").decode()
        if unicodedata.category(each) in _HIDDEN and each not in _JOINERS
        else each
        for each in text
    )


def shortened(text: str, characters: int) -> str:
    """A text of at most this many characters; a longer one ends in an ellipsis."""
    return text if len(text) <= characters else text[: characters - 1] + "…"


def typed(text: str) -> str:
    """A command-line argument as the daemon needs it.

    Names of files are bytes, which Python decodes by the locale's encoding. The daemon decodes them as UTF-8.
    """
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text
