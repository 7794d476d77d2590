"""Golden forwards of ComfyUI, for tests and for the rank processes that they start."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tacod.rank.families import detect
from tacod.rank.families.base import DiT
from tacod.rank.ulysses import Ulysses

GOLDEN = Path(os.environ.get("TACOD_GOLDEN") or Path(__file__).parents[3] / "shared" / "golden")


@dataclass(frozen=True)
class Golden:
    """One forward that ComfyUI computed in fp32."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Any]
    out: Tensor

    def model(self, dtype: torch.dtype = torch.float32) -> DiT:
        """The model, built without memory and filled by name, as the daemon does it."""
        family, config = detect({}, self.config)
        with torch.device("meta"):
            model = family(config)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in self.weights.items()}, assign=True)
        return model.eval().requires_grad_(False)

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The forward's arguments: one number per image in fp32, the others in ``dtype``."""

        def cast(value: Any) -> Any:
            return [cast(each) for each in value] if isinstance(value, list) else value.to(dtype)

        return {key: value if key in ("timestep", "guidance") else cast(value) for key, value in self.inputs.items()}

    def error(self, ulysses: Ulysses, dtype: torch.dtype = torch.float32) -> float:
        """How far one forward of ours is from ComfyUI's."""
        with torch.inference_mode():
            out = self.model(dtype)(ulysses, **self.arguments(dtype))
        assert out.dtype == dtype
        return relative_error(out, self.out)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||."""
    assert out.shape == expected.shape
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def read_golden(name: str) -> Golden | None:
    """A golden forward, or None if it isn't at hand."""
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    inputs: dict[str, Any] = {}
    for key, value in sorted(tensors.items()):
        if key.startswith("in.ref_latents."):
            inputs.setdefault("ref_latents", []).append(value)
        elif key.startswith("in."):
            inputs[key.removeprefix("in.")] = value
    return Golden(config, weights, inputs, tensors["out"])


@pytest.fixture(scope="session")
def load_golden() -> Callable[[str], Golden]:
    def load(name: str) -> Golden:
        golden = read_golden(name)
        if golden is None:
            pytest.skip(
                f"no golden data at {GOLDEN}/{name}.safetensors; point TACOD_GOLDEN at the folder that holds it"
            )
        return golden

    return load
