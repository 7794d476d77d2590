"""The image families that came after Flux.1, SD3 and PixArt: the same graphs by ComfyUI alone and through the daemon.

Models are the goldens'; Z-Image's embeds times in 256 channels in ComfyUI, so that one is a wider one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_graphs import WEAKER, Pair
from comfyui_server import ComfyUI, Outcome
from conftest import PATH
from helpers import Daemon, Golden, Tiny, read_golden
from safetensors.torch import save_file

Both = Callable[..., Outcome]


@dataclass(frozen=True)
class Case:
    """A golden's model in a graph."""

    golden: str
    module: str
    """Of ComfyUI's network, under ``comfy/ldm``."""
    channels: int = 16
    size: tuple[int, int] = (13, 10)
    """Height and width of the latent."""
    lora: tuple[str, ...] = ()
    """Layers with a LoRA."""
    method: str = ""
    """How a reference is placed, in the words of ComfyUI's node; empty if the model takes none."""
    frames: int = 0
    """Of a reference's latent; 0 for one that has no such axis."""
    config: dict[str, Any] = field(default_factory=dict)
    """Of a model that is not the golden's."""

    @property
    def file(self) -> str:
        """The model's, and its LoRA's."""
        return f"{self.golden}.safetensors"

    def model(self) -> Golden:
        """Weights and configuration."""
        golden = read_golden(self.golden)
        if not self.config:
            return golden
        config = {**golden.config, **self.config}
        return replace(golden, config=config, weights=dict(Tiny(self.golden, config).model.state_dict()))


CASES = [
    Case(
        "z_image",
        "lumina",
        lora=("layers.0.attention.qkv", "context_refiner.0.feed_forward.w2"),
        config={"dim": 256, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 24, 24]},
    ),
    Case("lumina2", "lumina", lora=("layers.1.attention.out", "noise_refiner.0.feed_forward.w1")),
    Case(
        "qwen_image",
        "qwen_image",
        lora=("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2"),
        method="index",
        frames=1,
    ),
    Case("qwen_edit_2511", "qwen_image", lora=("transformer_blocks.0.attn.add_k_proj",), method="index", frames=1),
    Case("flux2_klein", "flux", 128, (5, 8), ("double_blocks.0.img_attn.qkv",), "index"),
    Case("flux2_dev", "flux", 128, (5, 8), ("single_blocks.0.linear1",), "index_timestep_zero"),
    Case("chroma", "chroma", lora=("double_blocks.0.img_attn.qkv", "single_blocks.0.linear2")),
    Case("chroma_radiance", "chroma_radiance", 3, (48, 80), ("double_blocks.0.txt_attn.proj",)),
    Case("krea2", "krea2", lora=("blocks.0.attn.wq", "blocks.1.mlp.down"), method="index_timestep_zero", frames=1),
    Case("cosmos_predict2_t2i", "cosmos", lora=("blocks.0.self_attn.q_proj",)),
]


def write(case: Case, models: Path) -> None:
    """A model's file where ComfyUI looks for it, with a LoRA; unless it is there."""
    if not Path(PATH, "comfy/ldm", case.module).is_dir():
        pytest.skip(f"this version of ComfyUI has no {case.module}")
    path = models / "diffusion_models" / case.file
    if not path.exists():
        golden = case.model()
        _save(golden, path)
        (models / "loras").mkdir(exist_ok=True)
        random = torch.Generator().manual_seed(0)
        tensors = {}
        for layer in case.lora:
            outputs, inputs = golden.weights[f"{layer}.weight"].shape
            tensors[f"diffusion_model.{layer}.lora_B.weight"] = 0.1 * torch.randn(outputs, 4, generator=random)
            tensors[f"diffusion_model.{layer}.lora_A.weight"] = 0.1 * torch.randn(4, inputs, generator=random)
        save_file(tensors, models / "loras" / case.file)


@pytest.fixture(params=CASES, ids=lambda case: case.golden)
def case(request: pytest.FixtureRequest, comfyui_models: Path) -> Case:
    """A model whose file lies where ComfyUI looks for it, with a LoRA."""
    case: Case = request.param
    write(case, comfyui_models)
    return case


def _save(golden: Golden, path: Path) -> None:
    """The last layer's weights are smaller: a run of several steps then doesn't amplify the last bit of fp32."""
    for name in ("final_layer.linear.weight", "proj_out.weight", "last.linear.weight"):
        if name in golden.weights:
            golden.weights[name] = WEAKER * golden.weights[name]
    golden.save(path)


@pytest.fixture
def run(case: Case, endpoints: Callable[[int], Daemon]) -> Pair:
    """A graph with this model, and branches through daemons of 1, 2 and 3 ranks."""
    return Pair(Sizes(case), {f"taco{n}": (n, endpoints(n).endpoint) for n in (1, 2)})  # type: ignore[arg-type]


class Sizes:
    """What a graph asks of a `TinyModel`."""

    def __init__(self, case: Case) -> None:
        self.tiny, self.width, self.pooled = case, read_golden(case.golden).inputs["context"].shape[-1], 0
        self.channels, self.size = case.channels, case.size


def test_with_and_without_guidance_and_a_lora(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    run.load()
    run.sample(save="_1", cfg=1.0)
    run.sample(save="_4", cfg=4.0)
    run.on_model("LoraLoaderModelOnly", lora_name=case.file, strength_model=1.2)
    run.sample(save="_lora", cfg=1.0)
    both(run, "_1", "_4", "_lora")
    plain, merged = (comfyui.latent(run.file("taco", save)) for save in ("_1", "_lora"))
    assert (plain - merged).norm() > 1e-3 * plain.norm()


def test_a_batch_and_a_mask(both: Both, run: Pair) -> None:
    run.nodes["latent"]["inputs"] |= {"batch": 2, "scale": 1.0, "seed": 9}
    run.add("mask", "TestMask", height=64, width=64)
    run.add("masked", "SetLatentNoiseMask", samples="@latent", mask="@mask")
    run.load()
    run.sample(save="_batch", denoise=0.8)
    run.sample(save="_mask", denoise=0.7, latent_image="@masked", sampler_name="dpmpp_2m")
    both(run, "_batch", "_mask")


@pytest.mark.parametrize("case", [case for case in CASES if case.method], indirect=True, ids=lambda case: case.golden)
def test_references(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    how = comfyui.nodes["FluxKontextMultiReferenceLatentMethod"]["input"]["required"]["reference_latents_method"]
    if case.method not in str(how):
        pytest.skip(f"this version of ComfyUI has no {case.method}")
    shape: dict[str, Any] = {"batch": 1, "channels": case.channels, "scale": 1.0, "frames": case.frames}
    run.add("first", "TestLatent", seed=5, height=6, width=7, **shape)
    run.add("second", "TestLatent", seed=6, height=9, width=4, **shape)
    run.add("one", "ReferenceLatent", conditioning="@positive", latent="@first")
    run.add("two", "ReferenceLatent", conditioning="@one", latent="@second")
    run.add("how", "FluxKontextMultiReferenceLatentMethod", conditioning="@two", reference_latents_method=case.method)
    run.load()
    run.sample(save="_1", positive="@how", cfg=1.0)
    run.sample(save="_4", positive="@how", cfg=4.0)
    both(run, "_1", "_4")
