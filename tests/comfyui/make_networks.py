"""Makes the tiny networks of network_cases.py, and runs them, by ComfyUI alone.

    PYTHONPATH=COMFYUI:tests/comfyui python tests/comfyui/make_networks.py FOLDER

leaves for each a model's file, ``NAME.safetensors``, and ``NAME.pt`` with arguments and outputs of two images together
(``inputs`` and ``both``), and of the first one alone (``first`` and ``alone``).
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comfy.cli_args import args
from network_cases import CASES, NetworkCase
from safetensors.torch import save_file


def main(folder: Path) -> None:
    """Make all of them."""
    for name, case in CASES.items():
        network = make(case)
        given = arguments(case)
        alone = first(given)
        if case.conditions:
            given["transformer_options"] = {"cond_or_uncond": [1, 0]}
            alone["transformer_options"] = {"cond_or_uncond": [0]}
        outs = [call(network, each) for each in (given, alone)]
        torch.save({"inputs": given, "first": alone, "both": outs[0], "alone": outs[1]}, folder / f"{name}.pt")
        state = {case.prefix + key: value.contiguous().clone() for key, value in network.state_dict().items()}
        state |= {key: torch.zeros(shape) for key, shape in case.beside.items()}
        said = {"image_model": name, **case.config}
        save_file(state, folder / f"{name}.safetensors", metadata={"tacod.config": json.dumps(said)})


def make(case: NetworkCase) -> Any:
    """The network with random weights."""
    importlib.import_module("comfy.model_base")
    module, _, kind = case.network.rpartition(".")
    layers = importlib.import_module("comfy.ops").disable_weight_init
    maker = getattr(importlib.import_module(f"comfy.ldm.{module}"), kind)
    network = maker(**case.config, dtype=torch.float32, device="cpu", operations=layers)
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.data = noise / weight[0].numel() ** 0.5
        else:
            weight.data = 1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise
    for name, buffer in network.named_buffers():
        if name.endswith("inv_freq") and name in network.state_dict():
            buffer.data = torch.rand(buffer.shape, generator=generator)
    return network.eval()


def arguments(case: NetworkCase) -> dict[str, Any]:
    """Those of a call for two images."""
    generator = torch.Generator().manual_seed(1)

    def noise(shape: Any) -> Any:
        if shape is None:
            return None
        return [noise(each) for each in shape] if isinstance(shape, list) else torch.randn(shape, generator=generator)

    made = {name: noise(shape) for name, shape in case.inputs.items()}
    for name, (length, hidden) in case.masks.items():
        made[name] = torch.ones(2, length, dtype=torch.int64)
        made[name][:, length - hidden :] = 0
    if case.control:
        made["control"] = {name: noise(shapes) for name, shapes in case.control.items()}
    made |= {name: torch.tensor(values) for name, values in case.whole.items()}
    return {**made, **case.numbers, "timestep": torch.tensor([0.3, 0.8])}


def first(value: Any) -> Any:
    """The first image's arguments."""
    return changed(value, lambda each: each[:1])


def changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Arguments with every tensor changed."""
    if isinstance(value, dict):
        return {name: changed(each, change) for name, each in value.items()}
    if isinstance(value, list):
        return [changed(each, change) for each in value]
    return change(value) if isinstance(value, torch.Tensor) else value


def call(network: Any, given: dict[str, Any]) -> Any:
    """One forward, as ComfyUI's models call their networks; on copies, for some write to what they are given."""
    copies = changed(given, torch.clone)
    x, timestep, context = copies.pop("x"), copies.pop("timestep"), copies.pop("context", None)
    control = copies.pop("control", None)
    options = copies.pop("transformer_options", {})
    with torch.inference_mode():
        out = network(x, timestep, context=context, control=control, transformer_options=options, **copies)
    return out.contiguous() if isinstance(out, torch.Tensor) else [each.contiguous() for each in out]


if __name__ == "__main__":
    args.cpu = True
    main(Path(sys.argv[1]))
