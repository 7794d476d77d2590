"""Where a model's weights are in this process: in a MODEL, or in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import safe_open

from .errors import Failed
from .patches import PREFIX

__all__ = ["FileState", "Source", "state_of"]


@dataclass
class Source:
    """Weights that are in a file, in a MODEL, or both. The MODEL is held weakly: its memory is ComfyUI's to free."""

    name: str
    path: str | None
    names: Mapping[str, str]
    """What ComfyUI's names are in the file."""
    config: Mapping[str, Any]
    """ComfyUI's ``unet_config``."""
    model: Callable[[], ModelPatcher | None] = lambda: None

    def __post_init__(self) -> None:
        self._stamp = _stamp(self.path)

    @property
    def file(self) -> str | None:
        """The file, if it is there and still what it was."""
        return self.path if self._stamp is not None and _stamp(self.path) == self._stamp else None

    def state(self) -> Mapping[str, torch.Tensor]:
        """All weights, by ComfyUI's names, without patches. Raises `Failed` if they are gone."""
        model = self.model()
        if model is not None:
            return state_of(model)
        if self.file is not None:
            return FileState(self.file, self.names)
        raise self._gone()

    def metadata(self) -> dict[str, str]:
        """What an upload says of itself: the configuration, so far as it is plain data.

        Nothing for the families that ComfyUI doesn't name there (SD3): the daemon knows those by their tensors.
        """
        if "image_model" not in self.config:
            return {}
        return {"tacod.config": json.dumps({key: value for key, value in self.config.items() if _plain(value)})}

    def local(self) -> ModelPatcher:
        """A MODEL that runs here. Raises `Failed` if the weights are gone."""
        model = self.model()
        if model is not None:
            return model.clone()
        if self.file is not None:
            return comfy.sd.load_diffusion_model(self.file)
        raise self._gone()

    def _gone(self) -> Failed:
        return Failed(
            f"TACO-DiT: the weights of {self.name} are no longer here, or its file has changed; "
            "change a setting of their loader and queue again"
        )


def _stamp(path: str | None) -> tuple[int, int, int] | None:
    """What tells a file's state without reading it; None if there is none."""
    try:
        told = os.stat(path) if path is not None else None
    except OSError:
        return None
    return (told.st_ino, told.st_size, told.st_mtime_ns) if told is not None else None


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def state_of(model: ModelPatcher) -> dict[str, torch.Tensor]:
    """A MODEL's weights as they were loaded: what patches have altered in place is in its backup.

    Of scaled 8-bit weights the 8 bits; the scale is beside them.
    """
    state = dict(model.model.diffusion_model.state_dict())
    for key, kept in model.backup.items():
        state[key.removeprefix(PREFIX)] = kept.weight
    for key, kept in model.hook_backup.items():
        state[key.removeprefix(PREFIX)] = kept[0]
    return {key: getattr(weight, "_qdata", weight) for key, weight in state.items()}


class FileState(Mapping[str, torch.Tensor]):
    """A file's weights by ComfyUI's names, each read when it is asked for."""

    def __init__(self, path: str, names: Mapping[str, str]) -> None:
        self._names = names
        self._file = safe_open(path, framework="pt")

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(self._names[key])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
