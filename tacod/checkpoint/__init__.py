"""Model files before any weight is read: where they may lie, what their headers say, who they are.

Nothing here needs torch or the weights, so the supervisor can refuse a bad file at once.
"""

from __future__ import annotations

from tacod.checkpoint.checkpoint import Checkpoint, read_checkpoint
from tacod.checkpoint.gguf import is_gguf
from tacod.checkpoint.header import TensorInfo
from tacod.checkpoint.roots import locate

__all__ = ["Checkpoint", "TensorInfo", "is_gguf", "locate", "read_checkpoint"]
