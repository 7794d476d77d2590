"""Stands in for torchaudio where there is none that fits torch; only for a ComfyUI that tests start."""

from . import functional, transforms

__all__ = ["functional", "transforms"]
