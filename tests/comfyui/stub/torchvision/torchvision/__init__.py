"""Stands in for torchvision where there is none that fits torch; only for a ComfyUI that tests start."""

from . import ops, transforms

__all__ = ["ops", "transforms"]
