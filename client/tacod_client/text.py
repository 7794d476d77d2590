"""Texts that travel, and texts that don't."""

from __future__ import annotations

__all__ = ["encodable", "shortened"]


def encodable(text: str) -> str:
    """A text as UTF-8 can have it: names of files, and in files, may hold what is no Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


def shortened(text: str, characters: int) -> str:
    """A text of so many characters at most; one that was longer ends in an ellipsis."""
    return text if len(text) <= characters else text[: characters - 1] + "…"
