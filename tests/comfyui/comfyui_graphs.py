"""Graphs in ComfyUI's API form: the same run beside itself, once by ComfyUI and once through the daemon."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
import torch
from comfyui_server import ComfyUI, Outcome
from helpers import Tiny
from safetensors.torch import save_file

__all__ = [
    "BROAD",
    "CANNY",
    "FILL",
    "FLUX",
    "MODELS",
    "PIXART",
    "SD3",
    "WEAKER",
    "WHOLE_BLOCKS",
    "AVPair",
    "Pair",
    "TinyModel",
    "cached",
    "differ",
    "refused",
    "save",
    "save_lora",
]

_fresh = itertools.count(1)


@dataclass(frozen=True)
class TinyModel:
    """A tiny model, and the sizes of what ComfyUI gives it."""

    tiny: Tiny
    width: int
    """Channels of the text's tokens."""
    pooled: int
    channels: int = 16
    """Of the latent."""
    size: tuple[int, int] = (14, 16)
    """Height and width of the latent."""


def _flux(name: str, channels: int, **sizes: Any) -> TinyModel:
    """Of this configuration, but for other sizes."""
    config = {
        "image_model": "flux",
        "in_channels": channels,
        "out_channels": 16,
        "vec_in_dim": 24,
        "context_in_dim": 32,
        "hidden_size": 80,
        "num_heads": 5,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [4, 6, 6],
        "guidance_embed": True,
        **sizes,
    }
    return TinyModel(Tiny(name, config), int(config["context_in_dim"]), int(config["vec_in_dim"]))


def _sd3(name: str, depth: int) -> TinyModel:
    """Its width is 64 for each block."""
    config = {
        "image_model": "sd3",
        "in_channels": 16,
        "depth": depth,
        "adm_in_channels": 40,
        "context_size": 48,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 48, "out_features": 64 * depth},
        },
        "num_patches": 400,
        "pos_embed_max_size": 20,
        "qk_norm": "rms",
        "x_block_self_attn_layers": [0, 2],
    }
    return TinyModel(Tiny(name, config), 48, 40)


FLUX = _flux("flux", 16)
CANNY = _flux("canny", 32)
"""Takes a second image beside the latent."""
FILL = _flux("fill", 96)
"""Takes an image and a mask beside the latent."""
BROAD = _flux("broad", 16, vec_in_dim=64, context_in_dim=64)
"""Each of its matrices takes more than 16 KB."""
SD3 = _sd3("sd3", 3)
WHOLE_BLOCKS = (_flux("gguf_flux", 16, hidden_size=256, num_heads=4, axes_dim=[16, 24, 24]), _sd3("gguf_sd3", 4))
"""A Flux and an SD3 whose rows are whole blocks of all of GGUF's kinds, of 256 numbers."""
PIXART = TinyModel(
    Tiny(
        "pixart",
        {
            "image_model": "pixart_sigma",
            "input_size": 64,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 128,
            "depth": 2,
            "num_heads": 16,
            "caption_channels": 48,
            "pred_sigma": True,
            "learn_sigma": True,
            "micro_condition": False,
            "pe_interpolation": 2,
            "model_max_length": 30,
        },
    ),
    48,
    0,
    channels=4,
    size=(36, 40),
)
WEAKER = 0.25
"""The last layer's weights are this much smaller: a run of many steps then doesn't amplify the last bit of fp32."""


def save(model: TinyModel, folder: Path, name: str = "", prefix: str = "") -> None:
    """Write a model's file, by default as ``diffusion_models`` has them."""
    weights = {prefix + key: weight for key, weight in model.tiny.model.state_dict().items()}
    weights[f"{prefix}final_layer.linear.weight"] = WEAKER * weights[f"{prefix}final_layer.linear.weight"]
    save_file(weights, folder / (name or model.tiny.file), metadata={"tacod.config": json.dumps(model.tiny.config)})


def save_lora(tiny: TinyModel, path: Path) -> None:
    """A LoRA of one layer, strong enough to be seen."""
    outputs, inputs = tiny.tiny.model.state_dict()["img_in.weight"].shape
    random = torch.Generator().manual_seed(0)
    tensors = {
        "diffusion_model.img_in.lora_up.weight": torch.randn(outputs, 2, generator=random),
        "diffusion_model.img_in.lora_down.weight": torch.randn(2, inputs, generator=random),
    }
    save_file(tensors, path)


MODELS = {model.tiny.name: model for model in (FLUX, CANNY, FILL, SD3, PIXART)}


class Pair:
    """A graph with a branch ``stock`` and branches through daemons, that differ in nothing but the loader node.

    Nodes that `both` adds exist once in each branch; a link to one is given as its name.

    Args:
        model: The model.
        also: More branches through daemons: their names, ranks and endpoints. The first is ``taco``.
        loader: Other settings of the loader nodes.
    """

    parts: ClassVar[tuple[str, ...]] = ("",)
    """What the names of a sampler's saved latents end in."""

    def __init__(self, model: TinyModel, also: Mapping[str, tuple[int, str]] = MappingProxyType({}), **loader: Any):
        self.model = model
        self.nodes: dict[str, dict[str, Any]] = {}
        self.add("file", "UNETLoader", unet_name=model.tiny.file, weight_dtype="default")
        self.ranks = {"taco": 3, **{branch: ranks for branch, (ranks, _) in also.items()}}
        """The branches through daemons, and how many ranks those have."""
        self._endpoints = {branch: endpoint for branch, (_, endpoint) in also.items()}
        self._head = dict.fromkeys(("stock", *self.ranks), "file")
        self._loader = loader
        self.latent = "latent"
        """The node that gives samplers their latent."""
        self.run = next(_fresh)
        """In the names of what is saved; ComfyUI runs nothing again that it has run."""
        for name, seed in (("positive", 1), ("negative", 2)):
            self.add(name, "TestConditioning", seed=seed, tokens=11, width=model.width, pooled=model.pooled)
        height, width = model.size
        self.add(
            "latent", "TestLatent", seed=0, batch=1, channels=model.channels, height=height, width=width, scale=0.0
        )

    def add(self, name: str, kind: str, **inputs: Any) -> str:
        """A node that all branches share; a string with a leading ``@`` is a link to a node's first output."""
        self.nodes[name] = {"class_type": kind, "inputs": {key: _link(value) for key, value in inputs.items()}}
        return f"@{name}"

    @property
    def branches(self) -> list[str]:
        """The names of all branches."""
        return list(self._head)

    def on_model(self, kind: str, **inputs: Any) -> None:
        """A node that takes a MODEL and gives one, in each branch; before the loader or after it."""
        for branch, head in self._head.items():
            name = f"{kind}_{len(self.nodes)}_{branch}"
            self.add(name, kind, model=f"@{head}", **inputs)
            self._head[branch] = name

    def load(self, kind: str = "TACODiTModelLoader", **inputs: Any) -> None:
        """Put a loader node into each branch that goes through a daemon."""
        settings = {
            "enable_taco_dit": True,
            "auto_detect": True,
            "sequence_parallel_degree": 3,
            "cfg_parallel": True,
            "use_flash_attention": True,
            **self._loader,
            **inputs,
        }
        for branch in self.ranks:
            where = {"endpoint": self._endpoints[branch]} if branch in self._endpoints else {}
            model = {"model": f"@{self._head[branch]}"} if kind == "TACODiTModelLoader" else {}
            name = "loader" if branch == "taco" else f"loader_{branch}"
            self.add(name, kind, **model, **settings, **where)
            self._head[branch] = name

    def sample(self, kind: str = "KSampler", save: str = "", **inputs: Any) -> None:
        """KSampler, or a node like it, in each branch, and its latent saved."""
        defaults: dict[str, Any] = {"positive": "@positive", "negative": "@negative", "latent_image": f"@{self.latent}"}
        if kind == "KSampler":
            defaults |= {"seed": 1234, "steps": 4, "cfg": 4.5, "sampler_name": "euler", "scheduler": "normal"}
            defaults |= {"denoise": 1.0}
        for branch, head in self._head.items():
            mine = {key: _of_branch(value, branch) for key, value in {**defaults, **inputs}.items()}
            name = f"sampler{save}_{branch}"
            self.add(name, kind, **({"model": f"@{head}"} if "guider" not in inputs else {}), **mine)
            self.save(name, branch, save)

    def save(self, name: str, branch: str, save: str = "") -> None:
        """Keep a node's latent."""
        self.add(f"save{save}_{branch}", "SaveLatent", samples=f"@{name}", filename_prefix=self.file(branch, save))

    def file(self, branch: str, save: str = "") -> str:
        """What a branch's latent is saved as."""
        return f"run{self.run}_{branch}{save}"

    def both(self, name: str, kind: str, **inputs: Any) -> str:
        """A node once in each branch, with the branch's MODEL where ``model`` is ``@model``; links as ``@name*``."""
        for branch in self._head:
            mine = {key: _of_branch(value, branch) for key, value in inputs.items()}
            mine = {key: f"@{self._head[branch]}" if value == "@model" else value for key, value in mine.items()}
            self.add(f"{name}_{branch}", kind, **mine)
        return f"@{name}_*"

    def on(self, branch: str, node: str) -> None:
        """The branch's MODEL comes from this node now."""
        self._head[branch] = node

    def head(self, branch: str) -> str:
        """The node whose output is the branch's MODEL."""
        return self._head[branch]

    def saved(self, *saves: str) -> list[str]:
        """The names of what samplers with these names saved, for ``both``."""
        return [f"{save}{part}" for save in saves for part in self.parts]

    def alone(self, branch: str) -> dict[str, dict[str, Any]]:
        """The nodes without those of other branches."""
        others = tuple(f"_{each}" for each in self.branches if each != branch)
        return {name: node for name, node in self.nodes.items() if not name.endswith(others)}


class AVPair(Pair):
    """Its runs are of a video and a sound, which are saved each for itself."""

    parts = ("_video", "_sound")

    def save(self, name: str, branch: str, save: str = "") -> None:
        """Keep both latents of a node."""
        apart = f"apart{save}_{branch}"
        self.add(apart, "LTXVSeparateAVLatent", av_latent=f"@{name}")
        for slot, part in enumerate(self.parts):
            prefix = self.file(branch, f"{save}{part}")
            self.add(f"save{save}{part}_{branch}", "SaveLatent", samples=f"@{apart}#{slot}", filename_prefix=prefix)


def refused(comfyui: ComfyUI, run: Pair, **inputs: Any) -> str:
    """What a sampler through the daemon fails with, before its first step."""
    run.sample(**inputs)
    outcome = comfyui.run(run.alone("taco"))
    assert outcome.kind == "error"
    assert max((event["value"] for event in outcome.of("progress") if event["max"] < 100), default=0) == 0
    return outcome.error


def differ(comfyui: ComfyUI, run: Pair, *saves: str, least: float = 1e-3) -> None:
    """Assert that each of these runs through the daemon differs from the one before, in each of its latents."""
    for one, other in itertools.pairwise(saves):
        for part in run.parts:
            first, second = (comfyui.latent(run.file("taco", f"{save}{part}")) for save in (one, other))
            assert (first - second).norm() > least * first.norm(), (one, other, part)


def cached(comfyui: ComfyUI, both: Callable[..., Outcome], run: Pair, **inputs: Any) -> None:
    """Assert that a run in which EasyCache leaves steps out is stock's too."""
    if "EasyCache" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no EasyCache")
    run.load()
    run.sample(save="_all", cfg=1.0, steps=8, **inputs)
    run.on_model("EasyCache", reuse_threshold=3.0, start_percent=0.1, end_percent=0.95, verbose=False)
    run.sample(save="_some", cfg=1.0, steps=8, **inputs)
    both(run, "_all", "_some")
    differ(comfyui, run, "_all", "_some", least=1e-4)


def _of_branch(value: Any, branch: str) -> Any:
    return value.replace("*", branch) if isinstance(value, str) and value.startswith("@") else value


def _link(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("@"):
        name, _, slot = value[1:].partition("#")
        return [name, int(slot or 0)]
    return value
