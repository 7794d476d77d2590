"""A model in the daemon: loaded by path where it may read the file, else sent once, by content."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tacod_client import Client, Model
from tacod_client.errors import ArgumentError, ModelNotAllowed, ModelNotFound, TacodError

from .errors import Refused
from .source import Source

__all__ = ["DTYPES", "Progress", "Remote"]

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The compute dtypes, and their names on the wire."""
_DEGREE = "sequence_parallel_degree"
Progress = Callable[[str, int, int], None]
"""Hears what is going on, and how many bytes of how many are done."""


class Remote:
    """Which weights, in which daemon, spread how."""

    def __init__(self, client: Client, source: Source, plan: Any) -> None:
        self.client = client
        self.source = source
        self.plan = plan
        self.note = ""
        """What was asked of the plan and can't be, and why."""
        self.remark = ""
        """What else the user should know of these weights."""
        self.family = ""
        """The model's, once it is loaded."""
        self.uploaded: str | None = None
        """Where the daemon keeps the weights, if they had to be sent."""

    @property
    def runs_comfyuis(self) -> bool:
        """Whether the daemon runs ComfyUI's own network of it, for want of one of its own."""
        return self.family == "comfyui"

    def load(self, patches: list[dict[str, Any]], dtype: str | None, progress: Progress | None = None) -> Model:
        """Have it loaded with these patches; nothing to do if it is.

        A plan that can't be becomes the daemon's own, and ``note`` says why. Raises a `TacodError`.
        """
        try:
            return self._load(patches, dtype, progress)
        except ArgumentError as error:
            if error.argument != "plan" or self.plan == "auto" or set(self.plan) == {"flash_attention"}:
                raise
            kept = {"flash_attention": False} if "flash_attention" in self.plan else "auto"
            self.note, self.plan = error.message, kept
            return self._load(patches, dtype, progress)

    def _load(self, patches: list[dict[str, Any]], dtype: str | None, progress: Progress | None) -> Model:
        report = None if progress is None else lambda done, total: progress("loading", done, total)

        def load(path: str) -> Model:
            model = self.client.load(path, patches or None, self.plan, dtype, report)
            self.family = model.family
            return self._without_what_it_lacks(model, load)

        refused: TacodError | None = None
        for path in (self.source.file, self.uploaded):
            if path is not None:
                try:
                    return load(path)
                except (ModelNotFound, ModelNotAllowed) as error:
                    refused = refused or error
        self.uploaded = self._upload(refused, progress)
        return load(self.uploaded)

    def _without_what_it_lacks(self, model: Model, load: Callable[[str], Model]) -> Model:
        """The model under a plan that ComfyUI's own network can follow; ``note`` says what was taken out of it."""
        if not self.runs_comfyuis or not isinstance(self.plan, dict):
            return model
        taken = {name: self.plan[name] for name in ("flash_attention",) if name in self.plan}
        if not model.shares_tokens and self.plan.get(_DEGREE, 1) > 1:
            taken[_DEGREE] = self.plan[_DEGREE]
        if not taken:
            return model
        self.note = f"{', '.join(taken)}: not for ComfyUI's own network ({model.network})"
        self.plan = {name: value for name, value in self.plan.items() if name not in taken} or "auto"
        return load(model.path)

    def _upload(self, refused: TacodError | None, progress: Progress | None) -> str:
        report = None if progress is None else lambda done, total: progress("sending", done, total)
        try:
            return self.client.upload(self.source.upload(), self.source.metadata(), report)
        except (TacodError, Refused) as error:
            if refused is None:
                raise
            raise TacodError(f"{refused.message}. The weights can't be sent instead: {error}") from error
