"""Networks of ComfyUI's own through the daemon, on one to all GPUs, beside ComfyUI on one.

    COMFYUI_PATH=… python benchmarks/networks.py [--models auraflow,ernie_image,mochi,…] [--ranks 1,2] [--rounds 5]

These are networks that the daemon has no family of its own for (docs/comfyui-networks.md), in their published sizes,
with random weights, in bf16, for one image of 1024² and for two, or for one video and two: of Mochi 49 frames of 848 ×
480, of Cosmos 1 (7B) 57 frames of 1280 × 704. A process of its own makes the network's file and runs it by ComfyUI;
then a daemon with that ComfyUI loads the file. Where its forwards became no CUDA graph, the table says so, and the
daemon's log why. Differences are relative to ComfyUI's output. On a CPU the networks are cut to one or two blocks, and
the pictures are small.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import times_of
from served import daemon, log_of, write_model
from torch import Tensor

from tacod.group.processes import ON_GPUS
from tacod_client import Client, TacodError


@dataclass(frozen=True)
class Network:
    """One network of ComfyUI's."""

    kind: str
    """Its class: its module under ``comfy.ldm``, and its name."""
    config: Mapping[str, Any]
    """What its class is made with; other arguments are as published by default."""
    x: tuple[int, ...]
    """The latent of one image or video."""
    context: tuple[int, int]
    cut: Mapping[str, Any]
    """What it is cut to on a CPU."""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """What else a call has."""
    mask: bool = False
    """Whether it has a mask of its text."""


NETWORKS = {
    "auraflow": Network(
        "aura.mmdit.MMDiT",
        {"max_seq": 9216, "cond_seq_dim": 2048, "n_double_layers": 4, "n_layers": 36},
        (4, 128, 128),
        (256, 2048),
        {"n_double_layers": 1, "n_layers": 2, "max_seq": 256},
    ),
    "ernie_image": Network(
        "ernie.model.ErnieImageModel",
        {"image_model": "ernie"},
        (128, 64, 64),
        (256, 3072),
        {"num_layers": 1},
    ),
    "omnigen2": Network(
        "omnigen.omnigen2.OmniGen2Transformer2DModel",
        {"image_model": "omnigen2", "axes_dim_rope": [40, 40, 40], "axes_lens": [1024, 1664, 1664]}
        | {"hidden_size": 2520, "num_attention_heads": 21, "num_kv_heads": 7, "num_layers": 32}
        | {"num_refiner_layers": 2, "text_feat_dim": 2048, "timestep_scale": 1000.0},
        (16, 128, 128),
        (256, 2048),
        {"num_layers": 1},
        {"num_tokens": 256},
    ),
    "mochi": Network(
        "genmo.joint_model.asymm_models_joint.AsymmDiTJoint",
        {"depth": 48, "num_heads": 24, "hidden_size_x": 3072, "hidden_size_y": 1536, "mlp_ratio_x": 4.0}
        | {"mlp_ratio_y": 4.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False}
        | {"use_t5": True, "t5_feat_dim": 4096, "t5_token_length": 256, "timestep_scale": 1000.0},
        (12, 9, 60, 106),
        (256, 4096),
        {"depth": 2},
        {"num_tokens": 256},
        mask=True,
    ),
    "cosmos": Network(
        "cosmos.model.GeneralDIT",
        {"image_model": "cosmos", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16}
        | {"out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 4096, "num_blocks": 28}
        | {"num_heads": 32, "pos_emb_cls": "rope3d", "block_x_format": "THWBD", "affline_emb_norm": True}
        | {"use_adaln_lora": True, "adaln_lora_dim": 256, "rope_t_extrapolation_ratio": 2.0}
        | {"extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable"},
        (16, 8, 88, 160),
        (512, 1024),
        {"num_blocks": 2},
    ),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(NETWORKS))
    parser.add_argument("--ranks", default=",".join(str(n + 1) for n in range(torch.cuda.device_count() or 2)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--comfyui", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "COMFYUI_PATH" not in os.environ:
        parser.error("set COMFYUI_PATH to the folder of a ComfyUI")
    if args.comfyui:
        by_comfyui(args.comfyui[0], Path(args.comfyui[1]), args.rounds)
        return
    os.environ.update(ON_GPUS)
    counts = list(map(int, args.ranks.split(",")))
    rows = []
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--rounds", str(args.rounds), "--comfyui", name, folder]
            environment = {
                **os.environ,
                "PYTHONPATH": f"{os.environ['COMFYUI_PATH']}:{os.environ.get('PYTHONPATH', '')}",
            }
            subprocess.run(command, check=True, env=environment)
            rows += measure(name, Path(folder), counts, args.rounds)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"\n{device}, torch {torch.__version__}; ms of a forward, medians of {args.rounds}; ours by daemon and client\n"
    )
    print("| network | images | ComfyUI | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in counts) + " | difference |")
    print("| --- " * (4 + len(counts)) + "|")
    print("\n".join(rows))


def by_comfyui(name: str, folder: Path, rounds: int) -> None:
    """Make a network's file, and run it by ComfyUI; leaves the arguments, outputs and times of one and two images."""
    cuda = torch.cuda.is_available()
    if not cuda:
        importlib.import_module("comfy.cli_args").args.cpu = True
    importlib.import_module("comfy.model_base")
    network, device = NETWORKS[name], torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    config = {**network.config, **({} if cuda else network.cut)}
    module, _, kind = network.kind.rpartition(".")
    maker = getattr(importlib.import_module(f"comfy.ldm.{module}"), kind)
    layers = importlib.import_module("comfy.ops").disable_weight_init
    model = maker(**config, dtype=dtype, device=device, operations=layers).eval()
    generator = torch.Generator(device).manual_seed(0)
    for key, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, device=device)
        scaled = noise / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.2 * noise + key.endswith("weight")
        weight.data = scaled.to(dtype)
    write_model(folder / f"{name}.safetensors", model.state_dict(), {"image_model": name, **config})
    found: list[dict[str, Any]] = []
    for images in (1, 2):
        sides = [side if cuda else max(side // 16 * 2, 2) for side in network.x[1:]]
        x = torch.randn(images, network.x[0], *sides, generator=generator, device=device, dtype=dtype)
        context = torch.randn(images, *network.context, generator=generator, device=device, dtype=dtype)
        timestep = torch.full((images,), 0.7, device=device)
        tensors = {"x": x, "timestep": timestep, "context": context}
        if network.mask:
            tensors["attention_mask"] = torch.ones(images, network.context[0], dtype=torch.int64, device=device)

        def forward(tensors: Mapping[str, Tensor] = tensors) -> Tensor:
            named = dict(tensors)
            with torch.inference_mode():
                out: Tensor = model(
                    named.pop("x"), named.pop("timestep"), transformer_options={}, **named, **network.numbers
                )
            return out

        ms = times_of(forward, rounds)
        given = {**{name: each.cpu() for name, each in tensors.items()}, **network.numbers}
        found.append({"given": given, "out": forward().cpu(), "ms": ms})
    torch.save(found, folder / "comfyui.pt")


def measure(name: str, folder: Path, counts: list[int], rounds: int) -> list[str]:
    """A row for one image and one for two."""
    known = torch.load(folder / "comfyui.pt")
    cells = [[name, str(len(each["out"])), f"{each['ms']:.1f}"] for each in known]
    errors: list[list[str]] = [[] for _ in known]
    comfyui = f'\n[comfyui]\npath = "{os.environ["COMFYUI_PATH"]}"\n'
    for each in known:
        print(f"{name} {len(each['out'])} by ComfyUI: {each['ms']:.1f} ms", flush=True)
    for count in counts:
        gpus = list(map(str, range(count))) if torch.cuda.is_available() else []
        with daemon(gpus, count, str(folder), more=comfyui) as endpoint, Client(endpoint) as client:
            try:
                model = client.load(f"{name}.safetensors")
            except TacodError as error:
                for row in cells:
                    row.append(error.message)
                continue
            graphs = 0
            for each, row, found in zip(known, cells, errors, strict=True):
                ms = times_of(lambda each=each, model=model: model.forward(**each["given"]), rounds)  # type: ignore[misc]
                out = model.forward(**each["given"]).float()
                wanted = each["out"].float()
                found.append(f"{float((out - wanted).norm() / wanted.norm()):.1e}")
                graphs, before = log_of(endpoint).count("is a CUDA graph"), graphs
                how = "" if graphs > before else ", no graph"
                row.append(f"{ms:.1f} ({each['ms'] / ms:.2f}×{how})")
                plan = model.stats.last and model.stats.last.plan
                print(name, len(wanted), f"on {count}: {ms:.1f} ms{how}, {plan}", flush=True)
            print(model.network, flush=True)
    return [f"| {' | '.join([*row, ', '.join(found)])} |" for row, found in zip(cells, errors, strict=True)]


if __name__ == "__main__":
    main()
