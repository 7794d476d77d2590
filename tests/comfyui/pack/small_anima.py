"""Anima's text adapter with few channels and layers: ComfyUI reads none of its sizes off the file."""

from __future__ import annotations

from functools import partialmethod

import comfy.ldm.anima.model as anima

__all__ = ["shrink"]


class SmallAdapter(anima.LLMAdapter):
    """The same, of the sizes of the golden's."""

    __init__ = partialmethod(
        anima.LLMAdapter.__init__, source_dim=20, target_dim=24, model_dim=24, num_layers=2, num_heads=3
    )


def shrink() -> None:
    """From now on networks are made with the small one."""
    anima.LLMAdapter = SmallAdapter
