"""Texts that travel, texts that are shown, and texts that aren't."""

from __future__ import annotations

import os
import unicodedata

__all__ = ["encodable", "printable", "shortened", "typed"]

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of what a terminal would obey, or not show: controls, formats, lone surrogates, ends of lines."""
_JOINERS = "\u200c\u200d"
"""Formats that words and emoji are spelled with."""


def encodable(text: str) -> str:
    """A text as UTF-8 can have it: names of files, and in files, may hold what is no Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """A text as one line of a terminal can have it: names may hold line ends, and what terminals take for commands."""
    return "".join(
        each.encode("unicode_escape").decode()
        if unicodedata.category(each) in _HIDDEN and each not in _JOINERS
        else each
        for each in text
    )


def shortened(text: str, characters: int) -> str:
    """A text of so many characters at most; one that was longer ends in an ellipsis."""
    return text if len(text) <= characters else text[: characters - 1] + "…"


def typed(text: str) -> str:
    """An argument of a command line as the daemon is to have it.

    Names of files are bytes, which Python reads by the locale's encoding. The daemon reads them as UTF-8.
    """
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text
