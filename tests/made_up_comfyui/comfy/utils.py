"""What is done with state dicts."""

from __future__ import annotations

import zlib
from typing import Any


def convert_old_quants(state_dict: dict[str, Any], model_prefix: str = "", metadata: Any = None) -> Any:
    """There are no quantized layers here."""
    return state_dict, metadata


def detect_layer_quantization(state_dict: dict[str, Any], prefix: str) -> None:
    """There are no quantized layers here."""


def string_to_seed(text: str) -> int:
    """A number for a text."""
    return zlib.crc32(text.encode())
