"""A model of two latents, video and sound, with ComfyUI's nodes for such: by ComfyUI alone and through the daemon.

ComfyUI packs the latents into one tensor for its samplers, and unpacks them for the network; so it is with masks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from comfyui_graphs import WEAKER, AVPair
from comfyui_server import ComfyUI, Outcome, has
from helpers import Daemon, package_with
from safetensors.torch import save_file

ENGINE = Path(__file__).parents[1] / "engine"
sys.path.append(str(ENGINE))
from made_up import CONFIG, model  # noqa: E402

Both = Callable[..., Outcome]
FILE = "pair.safetensors"
SIZES = SimpleNamespace(tiny=SimpleNamespace(file=FILE), width=6, pooled=0, channels=4, size=(6, 8))


@pytest.fixture(scope="module")
def daemons(comfyui_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Daemon]]:
    """Daemons of 2 and 3 ranks that know the family."""
    weights = dict(model("pair").state_dict())
    for part in ("video", "sound"):
        weights[f"{part}_out.weight"] = WEAKER * weights[f"{part}_out.weight"]
    config = {**CONFIG, "image_model": "made_up_pair"}
    save_file(weights, comfyui_models / "diffusion_models" / FILE, metadata={"tacod.config": json.dumps(config)})
    package = package_with(ENGINE / "made_up_pair.py", tmp_path_factory.mktemp("package"))
    started = {ranks: Daemon(ranks, [comfyui_models]) for ranks in (2, 3)}
    with ExitStack() as stack:
        for daemon in started.values():
            daemon.start_folder = package
            stack.enter_context(daemon)
        yield started


@pytest.fixture
def run(comfyui: ComfyUI, daemons: dict[int, Daemon]) -> AVPair:
    """A graph with this model, an empty video of 3 frames and sound, and a random one of both."""
    if "LTXVConcatAVLatent" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no latents of several parts")
    endpoints = {"taco": (3, daemons[3].endpoint), "taco2": (2, daemons[2].endpoint)}
    run = AVPair(SIZES, endpoints)  # type: ignore[arg-type]
    run.nodes["latent"]["inputs"]["frames"] = 3
    sound = {"seed": 5, "batch": 1, "channels": 3, "height": 7, "width": 4}
    run.add("quiet", "TestLatent", **sound, scale=0.0)
    run.add("empty", "LTXVConcatAVLatent", video_latent="@latent", audio_latent="@quiet")
    run.add("moving", "TestLatent", seed=4, batch=2, channels=4, height=6, width=8, frames=3, scale=1.0)
    run.add("loud", "TestLatent", **{**sound, "batch": 2}, scale=1.0)
    run.latent = "empty"
    return run


def masked(run: AVPair, video: bool, sound: bool) -> str:
    """The random latents, with a mask for the left half of the frames, and for the first half of the sound."""
    run.add("mask", "TestMask", height=48, width=64)
    run.add("mask_moving", "SetLatentNoiseMask", samples="@moving", mask="@mask")
    run.add("mask_loud", "SetLatentNoiseMask", samples="@loud", mask="@mask")
    parts = {"video_latent": "@mask_moving" if video else "@moving", "audio_latent": "@mask_loud" if sound else "@loud"}
    return run.add(f"masked_{video}_{sound}", "LTXVConcatAVLatent", **parts)


def test_equals_stock(comfyui: ComfyUI, both: Both, run: AVPair) -> None:
    """Also with guidance, in a batch, and by samplers that add noise to both."""
    run.add("random", "LTXVConcatAVLatent", video_latent="@moving", audio_latent="@loud")
    run.load()
    run.sample(save="_1", cfg=1.0)
    run.sample(save="_4", cfg=4.0, sampler_name="dpmpp_2m")
    run.sample(save="_noise", cfg=2.0, sampler_name="euler_ancestral")
    run.sample(save="_batch", cfg=4.0, latent_image="@random", denoise=0.7, sampler_name="res_multistep")
    both(run, "_1", "_4", "_noise", "_batch")
    video, sound = (comfyui.latent(run.file("taco", f"_batch{part}")) for part in run.parts)
    assert video.shape == (2, 4, 3, 6, 8)
    assert sound.shape == (2, 3, 7, 4)


def test_masks_of_each_latent(comfyui: ComfyUI, both: Both, run: AVPair) -> None:
    """With one each token has a time of its own; a latent without a mask gets one that hides nothing."""
    which = {"_both": (True, True), "_video": (True, False), "_sound": (False, True)}
    run.load()
    for save, parts in which.items():
        run.sample(save=save, cfg=3.0, denoise=0.8, latent_image=masked(run, *parts))
    both(run, *which)
    given = comfyui.latent(run.file("taco", "_video_video"))
    assert not given.equal(comfyui.latent(run.file("taco", "_sound_video")))


def test_other_sampler_nodes_and_the_one_of_ours(both: Both, run: AVPair) -> None:
    run.load()
    advanced = {"noise_seed": 7, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}
    first = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 2, "return_with_leftover_noise": "enable"}
    last = {"add_noise": "disable", "start_at_step": 2, "end_at_step": 10, "return_with_leftover_noise": "disable"}
    run.sample("KSamplerAdvanced", save="_first", **advanced, **first)
    saves = ["_first", "_ours"]
    if has("nodes.py", "prepare_empty_noise"):
        # Before, the noise that isn't added was that of the first latent alone.
        run.sample("KSamplerAdvanced", save="_last", **advanced, **last, latent_image="@sampler_first_*")
        saves.append("_last")
    for branch in run.branches:
        kind = "KSampler" if branch == "stock" else "TACODiTKSampler"
        settings = {"seed": 3, "steps": 3, "cfg": 2.0, "sampler_name": "heun", "scheduler": "normal", "denoise": 1.0}
        conditions = {"positive": "@positive", "negative": "@negative", "latent_image": "@empty"}
        run.add(f"ours_{branch}", kind, model=f"@{run.head(branch)}", **settings, **conditions)
        run.save(f"ours_{branch}", branch, "_ours")
    run.add("stats", "TACODiTStatsDisplay", stats="@ours_taco#1")
    outcome = both(run, *saves)
    assert "Steps: 3 " in outcome.texts["stats"]
    if has("comfy/samplers.py", "x0 = comfy.nested_tensor"):
        assert outcome.previews >= 3 * (2 + 2 + 3), "each step of each branch shows the video"


def test_a_wrapper_around_the_network_gets_the_list(comfyui: ComfyUI, both: Both, run: AVPair) -> None:
    run.load()
    run.on_model("TestHalves")
    run.sample(cfg=1.0, steps=3)
    both(run)
