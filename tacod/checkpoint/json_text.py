"""JSON that files hold."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parse_json"]


def parse_json(text: str | bytes) -> Any:
    """What a text, or bytes in UTF-8, says as JSON.

    Raises `ValueError` if it is no JSON, and for halves of surrogates, which neither a message nor a path can have;
    `RecursionError` if it is nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode()
    value = json.loads(text)
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value
