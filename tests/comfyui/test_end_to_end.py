"""What a person sees who queues the guide's workflow, and what becomes of it when something is killed or stopped."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_graphs import FLUX, SD3, Pair, TinyModel, save
from comfyui_server import PATH, PYTHON, ComfyUI, Outcome
from helpers import Daemon, Tiny, relative_error

MOST = 1e-5
Both = Callable[..., Outcome]


def guide(model: TinyModel = FLUX, **sampling: Any) -> Pair:
    """The user's guide's basic workflow, with its five nodes of ours, beside the same without them."""
    pair = Pair(model)
    pair.load()
    options = {"seed": 1234, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    pair.sample(**{**options, **sampling})
    pair.nodes["sampler_taco"]["class_type"] = "TACODiTKSampler"
    pair.nodes["sampler_taco"]["inputs"]["enable_taco_dit"] = True
    pair.add("info", "TACODiTInfoDisplay", info="@loader#1")
    pair.add("stats", "TACODiTStatsDisplay", stats="@sampler_taco#1")
    return pair


def agrees(comfyui: ComfyUI, pair: Pair) -> bool:
    stock, taco = (comfyui.latent(pair.file(branch)) for branch in ("stock", "taco"))
    return relative_error(taco, stock) <= MOST


def only(pair: Pair, branch: str) -> dict[str, Any]:
    """The graph without the other branch's sampler."""
    other = "stock" if branch == "taco" else "taco"
    gone = {f"sampler_{other}", f"save_{other}", *(("info", "stats", "loader") if other == "taco" else ())}
    return {name: node for name, node in pair.nodes.items() if name not in gone}


def test_the_guides_workflow(comfyui: ComfyUI) -> None:
    pair = guide(steps=5)
    seen = len(comfyui.log)
    outcome = comfyui.run(pair.nodes)
    assert outcome.kind == "success", outcome.error
    assert agrees(comfyui, pair)
    steps = [event["value"] for event in outcome.of("progress") if event["node"] == "sampler_taco"]
    assert steps == [1, 2, 3, 4, 5]
    assert outcome.previews >= 5
    console = comfyui.log[seen:]
    lines = [
        "TACO-DiT model loaded successfully:",
        "  - Parallel enabled: True",
        "  - Model type: flux",
        "  - xDit wrapper: True",
    ]
    assert "\n".join(lines) in console
    info, stats = outcome.texts["info"], outcome.texts["stats"]
    assert info in console
    assert stats in console
    assert "Ranks: 3 (cpu:0, cpu:1, cpu:2)" in info
    assert "sequence 3 (ulysses" in info
    assert "Steps: 5 in " in stats
    assert "Forwards: 5, 5 of them parallel, on 3 ranks" in stats
    for part in ("compute", "collective", "wire", "queue"):
        assert f"{part} " in stats


def test_switched_off_it_runs_here(comfyui: ComfyUI) -> None:
    for node in ("loader", "sampler_taco"):
        pair = guide(seed=5, sampler_name="heun")
        pair.nodes[node]["inputs"]["enable_taco_dit"] = False
        outcome = comfyui.run(pair.nodes)
        assert outcome.kind == "success", outcome.error
        stock, taco = (comfyui.latent(pair.file(branch)) for branch in ("stock", "taco"))
        assert torch.equal(stock, taco)
        assert outcome.texts["stats"].startswith("TACO-DiT was off: 4 steps in ")


def test_nothing_to_denoise(comfyui: ComfyUI) -> None:
    pair = guide(seed=30, denoise=0.0)
    pair.nodes["latent"]["inputs"] |= {"scale": 1.0, "seed": 9}
    outcome = comfyui.run(pair.nodes)
    assert outcome.kind == "success", outcome.error
    assert agrees(comfyui, pair)
    assert "Forwards: 0, 0 of them parallel" in outcome.texts["stats"]


def test_what_cannot_be_planned_is_told(comfyui: ComfyUI) -> None:
    pair = guide(seed=6)
    pair.nodes["loader"]["inputs"] |= {"auto_detect": False, "cfg_parallel": True}
    outcome = comfyui.run(pair.nodes)
    assert outcome.kind == "success", outcome.error
    assert "sequence 3 × batch 2 (cfg_parallel) takes 6 ranks, and there are 3" in outcome.texts["info"]
    assert "Planned instead" in outcome.texts["info"]
    pair = guide(seed=7)
    asked = {"auto_detect": False, "cfg_parallel": False, "sequence_parallel_degree": 2, "use_flash_attention": False}
    pair.nodes["loader"]["inputs"] |= asked
    outcome = comfyui.run(pair.nodes)
    assert outcome.kind == "success", outcome.error
    assert "Planned instead" not in outcome.texts["info"]
    assert "sequence 2 (ulysses" in outcome.texts["stats"]
    assert "no flash attention" in outcome.texts["stats"]
    assert agrees(comfyui, pair)


def test_the_speed_beside_one_rank_is_told(comfyui: ComfyUI) -> None:
    """Once the daemon has seen the same forwards on one rank; and each run counts."""
    alone = {"auto_detect": False, "sequence_parallel_degree": 1, "cfg_parallel": False}
    for seed, asked in ((23, alone), (24, {}), (25, {})):
        pair = guide(SD3, seed=seed)
        pair.nodes["loader"]["inputs"] |= asked
        outcome = comfyui.run(pair.nodes)
        assert outcome.kind == "success", outcome.error
        assert agrees(comfyui, pair)
        stats = outcome.texts["stats"]
        if asked:
            assert "Forwards: 4, 0 of them parallel, on 1 ranks" in stats
    assert re.search(r"Speed: \d+\.\d\d times one rank, which takes [\d.]+ m?s for these forwards", stats)
    (executions,) = re.findall(r"Executions so far: (\d+), ", stats)
    assert int(executions) >= 3


def test_cancel_in_mid_run(comfyui: ComfyUI) -> None:
    pair = guide(steps=200)
    pair.nodes["latent"]["inputs"] |= {"height": 96, "width": 96}
    clicked: list[float] = []

    def click(event: dict[str, Any]) -> None:
        if event["type"] == "progress" and event["data"]["value"] == 2 and not clicked:
            clicked.append(time.perf_counter())
            comfyui.post("/interrupt", {})

    outcome = comfyui.run(only(pair, "taco"), click)
    assert outcome.kind == "interrupted"
    took_s = time.perf_counter() - clicked[0]
    print(f"from the click on Cancel to execution_interrupted: {1e3 * took_s:.0f} ms")
    # The promise is a second; a busy machine takes longer, and without Cancel the step never ends.
    assert took_s < 5.0
    after = guide(seed=8)
    assert comfyui.run(after.nodes).kind == "success"
    assert agrees(comfyui, after)


def test_cancel_in_mid_step(comfyui: ComfyUI, own: Daemon) -> None:
    """However long the step takes: here it doesn't end at all, until Cancel has been heard."""
    pair = guide(steps=30, seed=17)
    pair.nodes["loader"]["inputs"]["endpoint"] = own.endpoint
    victim = own.rank_pids()[1]
    clicked: list[float] = []

    def click(event: dict[str, Any]) -> None:
        if _step(event) == 3 and not clicked:
            os.kill(victim, signal.SIGSTOP)
            time.sleep(0.2)
            clicked.append(time.perf_counter())
            comfyui.post("/interrupt", {})

    try:
        outcome = comfyui.run(only(pair, "taco"), click)
        took_s = time.perf_counter() - clicked[0]
    finally:
        os.kill(victim, signal.SIGCONT)
    assert outcome.kind == "interrupted"
    print(f"from the click on Cancel in mid-step to execution_interrupted: {1e3 * took_s:.0f} ms")
    # The promise is a second; a busy machine takes longer, and without Cancel the step never ends.
    assert took_s < 5.0
    after = guide(seed=18)
    after.nodes["loader"]["inputs"]["endpoint"] = own.endpoint
    assert comfyui.run(after.nodes).kind == "success"
    assert agrees(comfyui, after)


def test_a_file_out_of_the_daemons_reach_is_sent(comfyui: ComfyUI, tmp_path: Path) -> None:
    """Once: ComfyUI's weights as they were loaded, without the LoRAs that are on them."""
    with Daemon(2, settings={"models.uploads": str(tmp_path)}) as far:
        for seed in (19, 20):
            pair = guide(SD3, seed=seed)
            pair.nodes["loader"]["inputs"]["endpoint"] = far.endpoint
            outcome = comfyui.run(pair.nodes)
            assert outcome.kind == "success", outcome.error
            assert agrees(comfyui, pair)
        assert "Weights: sent to " in outcome.texts["info"]
        assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_comfyui_counts_a_few_bytes(comfyui: ComfyUI) -> None:
    pair = guide(SD3, seed=21)
    pair.add("local", "TestSize", model="@file")
    pair.add("remote", "TestSize", model="@loader")
    outcome = comfyui.run(pair.nodes)
    assert outcome.kind == "success", outcome.error
    assert int(outcome.texts["remote"]) < 100 < 1e6 < int(outcome.texts["local"])


@pytest.fixture
def own(comfyui_models: Path) -> Iterator[Daemon]:
    """A daemon that may be killed."""
    with Daemon(2, [comfyui_models]) as daemon:
        yield daemon


def test_a_killed_rank_changes_nothing(comfyui: ComfyUI, own: Daemon) -> None:
    pair = guide(steps=12, seed=9)
    pair.nodes["loader"]["inputs"]["endpoint"] = own.endpoint
    killed = threading.Event()

    def kill(event: dict[str, Any]) -> None:
        if _step(event) == 3 and not killed.is_set():
            killed.set()
            os.kill(own.rank_pids()[1], signal.SIGKILL)

    outcome = comfyui.run(pair.nodes, kill)
    assert killed.is_set()
    assert outcome.kind == "success", outcome.error
    assert agrees(comfyui, pair)
    with own.client() as client:
        assert client.status()["group"]["restarts"] == 1
        # None, if it died between two steps.
        retried = client.stats()["retried_forwards"]
    assert ("Retries: 1 " in outcome.texts["stats"]) == (retried == 1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "restarted"])
def test_a_daemon_that_comes_again_changes_nothing(comfyui: ComfyUI, own: Daemon, number: int) -> None:
    pair = guide(steps=12, seed=10)
    pair.nodes["loader"]["inputs"]["endpoint"] = own.endpoint
    killed = threading.Event()

    def restart(event: dict[str, Any]) -> None:
        if _step(event) == 3 and not killed.is_set():
            killed.set()
            os.kill(own.pid, number)
            assert own.process is not None
            own.process.wait()
            own.start()

    outcome = comfyui.run(pair.nodes, restart)
    assert killed.is_set()
    assert outcome.kind == "success", outcome.error
    assert agrees(comfyui, pair)


def test_a_stopped_daemon(comfyui: ComfyUI, own: Daemon) -> None:
    """While ComfyUI waits for it Cancel is heard; then the error box says what to do; and it may come back."""

    def run(seed: int, *options: Any) -> tuple[Pair, Outcome]:
        pair = guide(seed=seed)
        pair.nodes["loader"]["inputs"]["endpoint"] = own.endpoint
        return pair, comfyui.run(pair.nodes, *options)

    assert run(26)[1].kind == "success"
    own.stop()
    clicked: list[float] = []

    def click(event: dict[str, Any]) -> None:
        if event["type"] == "executing" and event["data"]["node"] == "sampler_taco":
            time.sleep(0.5)
            clicked.append(time.perf_counter())
            comfyui.post("/interrupt", {})

    assert run(27, click)[1].kind == "interrupted"
    took_s = time.perf_counter() - clicked[0]
    print(f"from the click on Cancel without a daemon to execution_interrupted: {1e3 * took_s:.0f} ms")
    # The promise is a second; a busy machine takes longer, and without Cancel the step never ends.
    assert took_s < 5.0
    _, outcome = run(28)
    assert outcome.kind == "error"
    assert outcome.error.startswith("TACO-DiT not available: ")
    assert "systemctl status tacod" in outcome.error
    own.start()
    pair, outcome = run(29)
    assert outcome.kind == "success", outcome.error
    assert agrees(comfyui, pair)


def _step(event: dict[str, Any]) -> int:
    ours = event["type"] == "progress" and event["data"]["node"] == "sampler_taco"
    return int(event["data"]["value"]) if ours else 0


def test_queued_again_it_loads_nothing(comfyui: ComfyUI, own: Daemon) -> None:
    """The same graph: nothing runs. Another seed: only the sampler. The daemon loads once."""
    pair = guide(seed=11)
    pair.nodes["loader"]["inputs"]["endpoint"] = own.endpoint
    for seed, ran in ((11, True), (11, False), (12, True)):
        for branch in ("stock", "taco"):
            pair.nodes[f"sampler_{branch}"]["inputs"]["seed"] = seed
        outcome = comfyui.run(pair.nodes)
        assert outcome.kind == "success", outcome.error
        cached = {node for event in outcome.of("execution_cached") for node in event["nodes"]}
        assert ("sampler_taco" not in cached) == ran
        if (seed, ran) != (11, True):
            assert "loader" in cached
    with own.client() as client:
        assert client.stats()["jobs_total"]["result"] == 1 + 2 * 4


def test_a_restarted_comfyui_finds_the_model_loaded(comfyui_models: Path, own: Daemon) -> None:
    pair = guide(SD3, seed=13)
    graph = only(pair, "taco")
    with ComfyUI(PATH, PYTHON, own.endpoint, comfyui_models) as comfyui:
        first = comfyui.run(graph)
        comfyui.stop()
        comfyui.start()
        second = comfyui.run(graph)
    assert (first.kind, second.kind) == ("success", "success")
    print(f"first image {first.seconds:.2f} s; after a restart of ComfyUI {second.seconds:.2f} s")
    with own.client() as client:
        assert client.stats()["jobs_total"]["result"] == 1 + 2 * 4, "the model was loaded once"


def test_two_comfyuis_and_a_script_share_a_daemon(
    comfyui: ComfyUI, comfyui_models: Path, endpoints: Callable[[int], Daemon]
) -> None:
    pairs = [guide(seed=14, steps=20), guide(SD3, seed=15, steps=20)]
    outcomes: list[Any] = []
    inputs = Tiny.inputs(Tiny("flux", {**FLUX.tiny.config}), text=9)
    with ComfyUI(PATH, PYTHON, endpoints(3).endpoint, comfyui_models) as other, endpoints(3).client() as client:
        servers = (comfyui, other)
        threads = [
            threading.Thread(target=lambda server=server, pair=pair: outcomes.append(server.run(pair.nodes)))
            for server, pair in zip(servers, pairs, strict=True)
        ]
        for thread in threads:
            thread.start()
        model = client.load(f"diffusion_models/{FLUX.tiny.file}")
        inputs = {
            "x": torch.ones(1, 16, 8, 8),
            "timestep": torch.ones(1),
            "context": torch.ones(1, 9, 32),
            "y": torch.ones(1, 24),
            "guidance": torch.ones(1),
        }
        outs = [model.forward(**inputs)]
        while any(thread.is_alive() for thread in threads):
            outs.append(model.forward(**inputs))
        for thread in threads:
            thread.join()
        assert [outcome.kind for outcome in outcomes] == ["success", "success"]
        for server, pair in zip(servers, pairs, strict=True):
            assert agrees(server, pair)
    assert all(torch.equal(out, outs[0]) for out in outs)


WIDE = TinyModel(
    Tiny(
        "wide",
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "hidden_size": 3072,
            "num_heads": 24,
            "depth": 1,
            "depth_single_blocks": 1,
            "axes_dim": [16, 56, 56],
            "guidance_embed": True,
        },
    ),
    4096,
    768,
)
"""Flux at its full width, with one block of each kind: ComfyUI knows it by its shapes."""


def test_full_width_and_the_memory_that_it_takes_here(both: Both, comfyui_models: Path, own: Daemon) -> None:
    """Equal through both loaders; and the weights, once the daemon has them, are ComfyUI's to free."""
    save(WIDE, comfyui_models / "diffusion_models")
    size = (comfyui_models / "diffusion_models" / WIDE.tiny.file).stat().st_size
    pair = guide(WIDE, steps=2, seed=16)
    pair.ranks["taco"] = 2
    opened = guide(WIDE, steps=2, seed=16)
    loader = opened.nodes["loader"]
    loader["class_type"] = "TACODiTUNETLoader"
    del loader["inputs"]["model"]
    loader["inputs"]["unet_name"] = WIDE.tiny.file
    with ComfyUI(PATH, PYTHON, own.endpoint, comfyui_models) as comfyui:
        idle = comfyui.memory_bytes
        graph = {name: node for name, node in only(opened, "taco").items() if name != "file"}
        assert comfyui.run(graph).kind == "success"
        header_only = comfyui.memory_bytes - idle
        both(pair, server=comfyui)
        ours, stock = comfyui.latent(opened.file("taco")), comfyui.latent(pair.file("stock"))
        assert relative_error(ours, stock) <= MOST
        with_stock = comfyui.memory_bytes - idle
        comfyui.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1)
        assert comfyui.run(graph).kind == "success"
        freed = comfyui.memory_bytes - idle
    print(f"{size >> 20} MiB file: {header_only >> 20} MiB here by header, {with_stock >> 20} with the stock model,")
    print(f"{freed >> 20} after /free, with the daemon's model in use")
    assert header_only < size / 4
    assert freed < size / 2 < with_stock
