"""Model files for the made-up ComfyUI, and what its networks give for them: computed by these alone, in a process.

Run as a script, it reads weights and cases of inputs from a folder, and leaves the outputs there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

COMFYUI = Path(__file__).parent / "made_up_comfyui"
AURA: dict[str, Any] = {"dim": 80, "cond_seq_dim": 24, "blocks": [2, 2]}
WAVES: dict[str, Any] = {"dim": 64, "channels": 6, "blocks": 3}
CLASSES = {"aura": ("comfy.ldm.aura.mmdit", "MMDiT", AURA), "waves": ("comfy.ldm.waves.model", "Waves", WAVES)}


def weights(kind: str) -> dict[str, Tensor]:
    """Random ones, by the network's own names."""
    generator = torch.Generator().manual_seed(1)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    if kind == "waves":
        dim, channels, blocks = WAVES.values()
        layers = {f"layers.{i}.weight": matrix(dim, dim) for i in range(blocks)}
        return {"embed.weight": matrix(dim, channels), **layers, "out.weight": matrix(channels, dim)}
    dim, text, (doubles, singles) = AURA.values()
    found = {"init_x_linear.weight": matrix(dim, 16), "cond_seq_linear.weight": matrix(dim, text)}
    found |= {"t_embedder.weight": matrix(dim, 1), "final_linear.weight": matrix(16, dim)}
    for name, count in (("double_layers", doubles), ("single_layers", singles)):
        for i in range(count):
            found |= {
                f"{name}.{i}.attn.qkv.weight": matrix(3 * dim, dim),
                f"{name}.{i}.attn.out.weight": matrix(dim, dim),
            }
    for i in range(doubles):
        found |= {f"double_layers.{i}.{name}.weight": matrix(dim, dim) for name in ("text", "image")}
    return found


def save(kind: str, folder: Path) -> str:
    """Write the model's file, whose names are behind a prefix, and not all the network's own; returns its name."""
    named = {
        name.replace("embed.weight", "wave_in.weight") if kind == "waves" else name: w
        for name, w in weights(kind).items()
    }
    for name in [each for each in named if each.endswith(".text.weight")]:
        both = [named.pop(name), named.pop(name.replace("text", "image"))]
        named[name.replace("text", "both")] = torch.cat(both)
    save_file({f"model.diffusion_model.{name}": each for name, each in named.items()}, folder / f"{kind}.safetensors")
    return f"{kind}.safetensors"


def inputs(kind: str, images: int) -> dict[str, Any]:
    """A call's arguments."""
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> Tensor:
        return torch.randn(3, *shape, generator=generator)[:images]

    timestep = torch.tensor([0.3, 0.9, 0.6])[:images]
    if kind == "aura":
        return {"x": noise(4, 10, 14), "timestep": timestep, "context": noise(7, AURA["cond_seq_dim"])}
    given = {"x": noise(WAVES["channels"], 19), "timestep": timestep, "lyrics": noise(5, WAVES["dim"])}
    options = {"factors": {"tone": 0.5}}
    return {**given, "strength": 0.7, "refs": [noise(WAVES["dim"])] * 2, "transformer_options": options}


def image(given: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The arguments for one of several images."""
    one = slice(index, index + 1)
    parts = {name: each[one] if isinstance(each, Tensor) else each for name, each in given.items()}
    return {**parts, **({"refs": [each[one] for each in given["refs"]]} if "refs" in given else {})}


@dataclass(frozen=True)
class Calls:
    """Calls of a network, with some weights in place of its own."""

    kind: str
    inputs: Sequence[Mapping[str, Any]]
    patched: Mapping[str, Tensor] = field(default_factory=dict)


def expected(calls: Mapping[str, Calls], folder: Path) -> dict[str, list[Tensor]]:
    """What the networks themselves give, all in one process, as its imports take seconds."""
    for name, each in calls.items():
        work = folder / name
        work.mkdir()
        save_file({**weights(each.kind), **each.patched}, work / "weights.safetensors")
        torch.save((each.kind, list(map(dict, each.inputs))), work / "calls.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(COMFYUI), *filter(None, sys.path)])}
    subprocess.run([sys.executable, __file__, *(str(folder / name) for name in calls)], check=True, env=environment)
    return {name: [*load_file(folder / name / "out.safetensors").values()] for name in calls}


def compute(folder: Path) -> None:
    """Compute the calls of a folder."""
    import importlib

    kind, calls = torch.load(folder / "calls.pt")
    module, name, config = CLASSES[kind]
    network = getattr(importlib.import_module(module), name)(**config, dtype=torch.float32)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    outs = {}
    with torch.inference_mode():
        for index, call in enumerate(calls):
            given = {"context": None, **call}
            outs[f"{index:03}"] = network(given.pop("x"), given.pop("timestep"), **given).contiguous()
    save_file(outs, folder / "out.safetensors")


def main(folders: Sequence[str]) -> None:
    """Compute the calls of these folders."""
    from comfy.cli_args import args

    args.cpu = True
    for folder in folders:
        compute(Path(folder))


def changed(folder: Path, file: str, before: str, after: str) -> Path:
    """A copy of the made-up ComfyUI in which somebody has changed a file."""
    copy = folder / "ComfyUI"
    shutil.copytree(COMFYUI, copy)
    path = copy / file
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    return copy


if __name__ == "__main__":
    main(sys.argv[1:])
