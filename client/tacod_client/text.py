"""Texts that travel, and texts that don't."""

from __future__ import annotations

__all__ = ["encodable"]


def encodable(text: str) -> str:
    """A text as UTF-8 can have it: names of files, and in files, may hold what is no Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()
