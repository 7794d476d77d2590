"""Stands in for torchvision where none fits the torch that is installed; only for a ComfyUI that tests start."""

from . import transforms

__all__ = ["transforms"]
