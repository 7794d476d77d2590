"""The image families that came after Flux.1, SD3 and PixArt: the same graphs by ComfyUI alone and through the daemon.

Models are the goldens', but for two: in ComfyUI Z-Image embeds times in 256 channels, and HiDream's experts have widths
that follow from the model's.
"""

from __future__ import annotations

import json
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
WORDS = "llm_adapter.embed.weight"


@dataclass(frozen=True)
class Case:
    """A golden's model in a graph."""

    golden: str
    module: str
    """Of ComfyUI's network, under ``comfy/ldm``; empty if the tests' pack makes up for it where it lacks."""
    channels: int = 16
    size: tuple[int, int] = (13, 10)
    """Height and width of the latent."""
    lora: tuple[str, ...] = ()
    """Layers with a LoRA."""
    method: str = ""
    """How a reference is placed, in the words of ComfyUI's node; empty if the model takes none."""
    frames: int = 0
    """Of a reference's latent; 0 for one that has no such axis."""
    text: dict[str, int] = field(default_factory=dict)
    """What else the test's conditioning takes, or takes in another size than the golden."""
    config: dict[str, Any] = field(default_factory=dict)
    """Of a model that is not the golden's."""

    @property
    def file(self) -> str:
        """The model's, and its LoRA's."""
        return f"{self.golden}.safetensors"

    def model(self) -> Golden:
        """Weights and configuration."""
        golden = read_golden(self.golden)
        if WORDS in golden.weights:
            # ComfyUI's class has a fixed number of words.
            words = torch.randn(32128, golden.weights[WORDS].shape[1], generator=torch.Generator().manual_seed(0))
            golden.weights[WORDS] = words.bfloat16()
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
    Case(
        "qwen_image_21",
        "",
        64,
        (9, 6),
        ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.gate_layer"),
    ),
    Case("qwen_image_21_edit", "", 64, (8, 7), ("transformer_blocks.1.img_mlp.gate_up",)),
    Case(
        "anima",
        "anima",
        lora=("blocks.0.self_attn.q_proj", "llm_adapter.blocks.1.cross_attn.k_proj"),
        text={"width": 20, "t5_ids": 14},
    ),
    Case(
        "hidream",
        "hidream",
        lora=(
            "double_stream_blocks.0.block.attn1.to_q_t",
            "double_stream_blocks.1.block.ff_i.shared_experts.w2",
            "single_stream_blocks.1.block.ff_i.experts.2.w2",
        ),
        text={"llama_layers": 3, "llama_width": 28},
        config={"attention_head_dim": 16, "num_attention_heads": 3, "axes_dims_rope": [8, 4, 4]},
    ),
]


NEWER = {
    "chroma_radiance": ("comfy/ldm/chroma_radiance/model.py", "use_sequential_txt_ids"),
    "cosmos_predict2_t2i": ("comfy/ldm/cosmos/predict2.py", "pad_to_patch_size"),
}
"""What a case needs of ComfyUI's networks that they haven't always had: an option of its config, odd sizes."""


def named(*goldens: str) -> list[Case]:
    """The cases of these goldens."""
    return [case for case in CASES if case.golden in goldens]


def write(case: Case, models: Path) -> None:
    """A model's file where ComfyUI looks for it, with a LoRA; unless it is there."""
    if not Path(PATH, "comfy/ldm", case.module).is_dir():
        pytest.skip(f"this version of ComfyUI has no {case.module}")
    for golden, (file, word) in NEWER.items():
        if case.golden == golden and word not in Path(PATH, file).read_text():
            pytest.skip(f"this version of ComfyUI lacks {word} in {file}")
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
    for name in ("final_layer.linear.weight", "proj_out.weight", "last.linear.weight", "head.head.weight"):
        if name in golden.weights:
            golden.weights[name] = WEAKER * golden.weights[name]
    golden.save(path)


@pytest.fixture
def run(case: Case, endpoints: Callable[[int], Daemon]) -> Pair:
    """A graph with this model, and branches through daemons of 1, 2 and 3 ranks."""
    pair = Pair(Sizes(case), {f"taco{n}": (n, endpoints(n).endpoint) for n in (1, 2)})  # type: ignore[arg-type]
    for name in ("positive", "negative"):
        pair.nodes[name]["inputs"] |= case.text
    return pair


class Sizes:
    """What a graph asks of a `TinyModel`."""

    def __init__(self, case: Case) -> None:
        given = read_golden(case.golden).inputs
        self.tiny, self.width = case, given["context"].shape[-1]
        self.pooled = given["y"].shape[-1] if "y" in given else 0
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


SLOTS = {"_between": "[4, 9]", "_partly": "[3]", "_behind": "[]"}
"""Places in the text, of 11 tokens, before which two references stand; those without one stand behind it."""


@pytest.mark.parametrize(
    "case", named("qwen_image_21", "qwen_image_21_edit"), indirect=True, ids=lambda case: case.golden
)
def test_references_between_words(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    run.add("first", "TestLatent", seed=5, height=6, width=7, channels=case.channels)
    run.add("second", "TestLatent", seed=6, height=9, width=4, channels=case.channels)
    run.add("one", "ReferenceLatent", conditioning="@positive", latent="@first")
    run.add("two", "ReferenceLatent", conditioning="@one", latent="@second")
    run.load()
    for save, slots in SLOTS.items():
        run.add(f"placed{save}", "TestValues", conditioning="@two", values=f'{{"image_slots": {slots}}}')
        run.sample(save=save, positive=f"@placed{save}", cfg=4.0 if save == "_between" else 1.0, steps=2)
    both(run, *SLOTS)
    latents = [comfyui.latent(run.file("taco", save)) for save in SLOTS]
    assert (latents[1] - latents[2]).norm() > 1e-3 * latents[2].norm()


@pytest.mark.parametrize("case", named("qwen_image_21"), indirect=True, ids=lambda case: case.golden)
def test_text_and_references_are_computed_once_a_run(both: Both, run: Pair, endpoints: Callable[[int], Daemon]) -> None:
    """The conditioning travels and is computed at a run's first step; a second run with it computes nothing."""

    def told() -> list[dict[str, int]]:
        found = []
        for ranks in (1, 2, 3):
            with endpoints(ranks).client() as client:
                found.append(client.stats()["prefix"])
        return found

    run.add("picture", "TestLatent", seed=5, height=6, width=7, channels=64)
    run.add("shown", "ReferenceLatent", conditioning="@positive", latent="@picture")
    run.load()
    before = told()
    run.sample(save="_1", positive="@shown", cfg=1.0)
    run.sample(save="_2", positive="@shown", cfg=1.0, seed=4321, sampler_name="dpmpp_2m")
    both(run, "_1", "_2")
    for one, other in zip(before, told(), strict=True):
        assert (other["hits"] - one["hits"], other["misses"] - one["misses"]) == (7, 1)


@pytest.mark.parametrize("case", named("qwen_image_21"), indirect=True, ids=lambda case: case.golden)
def test_a_rounded_prefix_cache_is_refused(comfyui: ComfyUI, run: Pair) -> None:
    run.load()
    run.on_model("TestReplace", what="rounded cache")
    assert "TACO-DiT can't honour a prefix cache in int8: " in refused(comfyui, run)


@pytest.mark.parametrize("case", named("hidream"), indirect=True, ids=lambda case: case.golden)
def test_a_picture_beside_the_image(both: Both, run: Pair) -> None:
    """As HiDream-E1's workflow has it."""
    run.add("picture", "TestLatent", seed=5, height=13, width=10, channels=16)
    run.add("mask", "TestMask", height=104, width=80)
    run.add("shown", "TestConcat", conditioning="@positive", latent="@picture", mask="@mask")
    run.load()
    run.sample(positive="@shown", cfg=1.0)
    both(run)


@pytest.mark.parametrize("case", named("chroma_radiance"), indirect=True, ids=lambda case: case.golden)
@pytest.mark.parametrize("sequential", [False, True], ids=["tiles", "positions"])
def test_options_of_chroma_radiance(comfyui: ComfyUI, both: Both, run: Pair, sequential: bool) -> None:
    """The size of tiles changes no number; what changes the text's positions is refused."""
    if "force_sequential_txt_ids" not in str(comfyui.nodes.get("ChromaRadianceOptions")):
        pytest.skip("this version of ComfyUI has no such options")
    options = {"preserve_wrapper": True, "start_sigma": 1.0, "end_sigma": 0.0, "nerf_tile_size": 4}
    run.load()
    run.on_model("ChromaRadianceOptions", **options, force_sequential_txt_ids=sequential)
    if sequential:
        assert "TACO-DiT can't honour use_sequential_txt_ids of ChromaRadianceOptions: " in refused(comfyui, run)
    else:
        run.sample(cfg=1.0, steps=2)
        both(run)


PATCHED = {
    "z_image": ("ZImageFunControlnet", "'noise_refiner', 'double_block' (ZImageControlPatch", 0),
    "qwen_image": ("QwenImageDiffsynthControlnet", "'double_block' (DiffSynthCnetPatch", 1),
}
"""ComfyUI's nodes that put a ControlNet between a network's blocks, and what they put there."""


@pytest.mark.parametrize("case", named(*PATCHED), indirect=True, ids=lambda case: case.golden)
def test_a_controlnet_between_blocks_is_refused(comfyui: ComfyUI, run: Pair, case: Case) -> None:
    node, what, frames = PATCHED[case.golden]
    if node not in comfyui.nodes:
        pytest.skip(f"this version of ComfyUI has no {node}")
    run.add("patch", "TestModelPatch", sort=case.golden, config=json.dumps(case.model().config))
    run.add("vae", "TestImageVAE", channels=16, frames=bool(frames))
    run.add("image", "TestImage", height=104, width=80)
    run.load()
    run.on_model(node, model_patch="@patch", vae="@vae", image="@image", strength=1.0)
    error = refused(comfyui, run)
    assert f"TACO-DiT can't honour patches of {what}" in error
    assert "take off the node that puts it there" in error


@pytest.mark.parametrize("case", named("qwen_image"), indirect=True, ids=lambda case: case.golden)
def test_a_controlnet_that_runs_layers_of_the_network(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    """Qwen-Image's Fun ControlNet embeds latent, text and time by the network that it controls."""
    if "class QwenFunControlNet" not in Path(PATH, "comfy/controlnet.py").read_text():
        pytest.skip("this version of ComfyUI has no QwenFunControlNet")
    run.add("net", "TestControlNet", sort="qwen_fun", config=json.dumps(case.model().config))
    run.add("vae", "TestVAE")
    run.add("image", "TestImage", height=104, width=80)
    given = {"positive": "@positive", "negative": "@negative", "control_net": "@net", "image": "@image", "vae": "@vae"}
    run.add("led", "ControlNetApplyAdvanced", **given, strength=0.9, start_percent=0.0, end_percent=0.7)
    run.load()
    run.sample(save="_without")
    run.sample(save="_with", positive="@led", negative="@led#1")
    both(run, "_without", "_with")
    without, led = (comfyui.latent(run.file("taco", save)) for save in ("_without", "_with"))
    assert (led - without).norm() > 1e-3 * without.norm()


def refused(comfyui: ComfyUI, run: Pair, **inputs: Any) -> str:
    """What a run through the daemon fails with, before its first step."""
    run.sample(**inputs)
    others = [f"{kind}_{each}" for kind in ("sampler", "save") for each in run.branches if each != "taco"]
    outcome = comfyui.run({name: node for name, node in run.nodes.items() if name not in others})
    assert outcome.kind == "error"
    assert max((event["value"] for event in outcome.of("progress") if event["max"] < 100), default=0) == 0
    return outcome.error


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
