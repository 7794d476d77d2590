"""ComfyUI's own networks in the ranks, equal to what ComfyUI computes: with tables, without, and beside our own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_graphs import Pair, TinyModel, differ, refused
from comfyui_server import PATH, PYTHON, ComfyUI, Outcome
from goldens_cpu import INTEL
from helpers import FP32, Daemon, Tiny, relative_error
from network_cases import CASES
from safetensors.torch import load_file, save_file

from tacod.comfyui import lacking

HERE = Path(__file__).parent
Both = Callable[..., Outcome]
Networks = Callable[[int], Daemon]


@pytest.fixture(scope="session")
def packages(_comfyui_at_hand: None) -> dict[str, str]:
    """An environment in which ranks find what ComfyUI's interpreter has, behind what they have themselves."""
    if Path(PATH, "comfy", "ldm", "ernie").is_dir():
        show = "import sysconfig; print(sysconfig.get_path('purelib'))"
        found = subprocess.run([PYTHON, "-c", show], capture_output=True, text=True, check=True).stdout.strip()
        paths = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), found]
        return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    pytest.skip("this version of ComfyUI lacks most of the networks with tables")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, packages: dict[str, str]) -> Path:
    """The tiny networks, and what ComfyUI computes with them."""
    folder = tmp_path_factory.mktemp("networks")
    paths = os.pathsep.join([PATH, str(HERE)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run([PYTHON, str(HERE / "make_networks.py"), str(folder)], check=True, env=environment)
    return folder


@pytest.fixture(scope="module")
def networks(files: Path, packages: dict[str, str], comfyui_models: Path) -> Iterator[Networks]:
    """The daemon with so many ranks, and this ComfyUI's networks."""
    started: dict[int, Daemon] = {}
    with ExitStack() as stack:

        def get(ranks: int) -> Daemon:
            if ranks not in started:
                daemon = Daemon(ranks, [files, comfyui_models], {"comfyui.path": PATH}, packages)
                started[ranks] = stack.enter_context(daemon)
            return started[ranks]

        yield get


def farthest(out: Any, expected: Any) -> float:
    """The largest error of one latent or several."""
    pairs = zip(out, expected, strict=True) if isinstance(expected, list) else [(out, expected)]
    return max(relative_error(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_with_a_table(networks: Networks, files: Path, name: str, ranks: int) -> None:
    known: dict[str, Any] = torch.load(files / f"{name}.pt")
    with networks(ranks).client() as client:
        model = client.load(f"{name}.safetensors")
        assert model.network.endswith(f": {CASES[name].network.rpartition('.')[2]}"), model.network
        out = model.forward(**known["first"])
        assert model.stats.last is not None
        assert (model.stats.last.ranks, model.stats.last.plan.startswith(f"sequence {ranks}")) == (ranks, True)
        same_bits = ranks == 1 and CASES[name].exact and not INTEL
        assert farthest(out, known["alone"]) <= (0 if same_bits else FP32)
        assert farthest(model.forward(**known["inputs"]), known["both"]) <= FP32
        if ranks == 3:
            ring = client.load(f"{name}.safetensors", plan={"ring": ranks})
            assert farthest(ring.forward(**known["first"]), known["alone"]) <= FP32
        client.unload(model.id)


@pytest.mark.parametrize("name", ["mage_flow", "mochi"])
def test_a_text_of_fewer_tokens_than_ranks(networks: Networks, files: Path, name: str) -> None:
    """Their blocks can't compute on no tokens."""
    inputs: dict[str, Any] = torch.load(files / f"{name}.pt")["first"]
    inputs["context"] = inputs["context"][:, :2]
    inputs |= {key: torch.ones(1, 2, dtype=torch.int64) for key in ("attention_mask",) if key in inputs}
    inputs |= {key: 2 for key in ("num_tokens",) if key in inputs}
    with networks(4).client() as client:
        model = client.load(f"{name}.safetensors")
        out = model.forward(**inputs)
        assert model.stats.retries == 0
        assert model.stats.last is not None
        assert model.stats.last.plan == "sequence 1 on each rank, not sequence 4: only 2 tokens of text"
        alone = client.load(f"{name}.safetensors", plan={"sequence_parallel_degree": 1})
        assert torch.equal(out, alone.forward(**inputs))
        client.unload(model.id)


def test_a_changed_comfyui_is_found_out(files: Path, packages: dict[str, str], tmp_path: Path) -> None:
    """AuraFlow's attention no longer gets to see the options of a call, and so can't be exchanged."""
    folder = tmp_path / "ComfyUI"
    ignored = shutil.ignore_patterns("__pycache__", "t5_*", "*tokenizer*")
    shutil.copytree(Path(PATH, "comfy"), folder / "comfy", ignore=ignored)
    for name in ("requirements.txt", "comfyui_version.py"):
        shutil.copy(Path(PATH, name), folder)
    network = folder / "comfy/ldm/aura/mmdit.py"
    text = network.read_text()
    changed = text.replace("skip_reshape=True, transformer_options=transformer_options)", "skip_reshape=True)")
    assert changed != text
    network.write_text(changed)
    known = torch.load(files / "auraflow.pt")
    with Daemon(2, [files], {"comfyui.path": str(folder)}, packages) as daemon, daemon.client() as client:
        model = client.load("auraflow.safetensors")
        reason = r"MMDiT; tokens are not shared out: with sequence 2 \(ulysses\) a small forward differed by"
        assert re.search(reason, model.network)
        assert relative_error(model.forward(**known["inputs"]), known["both"]) <= FP32


def test_it_lacks_nothing_that_it_does_not_name(networks: Networks) -> None:
    """What it needs is in ComfyUI's environment, if not in ours."""
    assert {each.partition("=")[0] for each in lacking(PATH)} <= {"comfy-kitchen", "comfy-aimdo", "einops"}
    log = networks(1).log
    assert "Total VRAM" not in log
    assert "Traceback" not in log


GOLDENS = (
    *(
        "chroma",
        "cosmos_predict2_v2w",
        "flux2_klein",
        "flux_kontext",
        "hidream_edit",
        "hunyuan_video_i2v",
        "kandinsky5",
    ),
    *("krea2", "ltx2_av", "ltxv_guides", "lumina2", "minimax_h3_r2v", "pixart_sigma", "qwen_edit", "sd35_medium"),
    *("wan22_ti2v", "wan_vace"),
    *("quantised/flux_dev_nvfp4", "quantised/krea2_int8_convrot", "quantised/wan21_t2v_mixed"),
)
"""Forwards of our own families, of which ComfyUI's detection makes such small networks too."""


@pytest.fixture(scope="module")
def reports(packages: dict[str, str]) -> dict[str, Any]:
    """What run_goldens.py says of each golden."""
    paths = os.pathsep.join([*filter(None, sys.path), packages["PYTHONPATH"], str(HERE)])
    command = [sys.executable, str(HERE / "run_goldens.py"), PATH, *GOLDENS]
    environment = {**os.environ, **packages, "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", GOLDENS)
def test_our_own_families_compute_what_comfyuis_networks_do(reports: dict[str, Any], name: str) -> None:
    """Other tests hold our own code to the same goldens, to the same bar."""
    assert isinstance(reports[name], dict), reports[name]
    assert reports[name]["error"] <= FP32


@pytest.mark.parametrize("name", GOLDENS)
def test_weights_from_the_host_give_the_same_bits(reports: dict[str, Any], name: str) -> None:
    """Quantized ones too, and patched ones."""
    assert isinstance(reports[name], dict), reports[name]
    assert (reports[name]["fetched"], reports[name]["patched"]) == (True, True)


@pytest.mark.parametrize(("number", "name"), [*enumerate([*CASES][::3])])
def test_weights_that_ranks_fetch(networks: Networks, files: Path, number: int, name: str) -> None:
    """Of these small networks only the larger matrices are stored apart; some have none."""
    where: Any = ("sharded", "host")[number % 2]
    ranks = 2 + number % 2
    given: dict[str, Any] = torch.load(files / f"{name}.pt")["first"]
    with networks(ranks).client() as client:
        whole, apart = (client.load(f"{name}.safetensors", weights=each) for each in ("replicated", where))
        assert apart.network == whole.network
        outs = [model.forward(**given) for model in (whole, apart, apart)]
        for out in outs[1:]:
            assert farthest(out, outs[0]) == 0
        for model in (whole, apart):
            client.unload(model.id)


AURAFLOW = TinyModel(Tiny("auraflow", CASES["auraflow"].config), 2048, 0, channels=4, size=(9, 14))
LAYERS = ("double_layers.0.attn.w2q", "single_layers.1.mlp.c_proj")
"""Layers with a LoRA."""


def test_through_the_nodes(networks: Networks, files: Path, comfyui_models: Path, comfyui: ComfyUI, both: Both) -> None:
    """A model that no family of ours has, with a LoRA, beside ComfyUI itself."""
    shutil.copy(files / "auraflow.safetensors", comfyui_models / "diffusion_models")
    random = torch.Generator().manual_seed(3)
    lora = {}
    state = load_file(files / "auraflow.safetensors")
    for layer in LAYERS:
        outputs, inputs = state[f"{layer}.weight"].shape
        lora[f"diffusion_model.{layer}.lora_up.weight"] = torch.randn(outputs, 2, generator=random)
        lora[f"diffusion_model.{layer}.lora_down.weight"] = torch.randn(2, inputs, generator=random) / inputs
    save_file(lora, comfyui_models / "loras" / "auraflow_lora.safetensors")
    run = Pair(AURAFLOW, {"taco": (3, networks(3).endpoint), "net2": (2, networks(2).endpoint)})
    run.load()
    run.sample()
    run.on_model("LoraLoaderModelOnly", lora_name="auraflow_lora.safetensors", strength_model=0.8)
    run.sample(save="_lora")
    outcome = both(run, "", "_lora")
    assert outcome.kind == "success"
    plain, changed = (comfyui.latent(run.file("stock", save)) for save in ("", "_lora"))
    assert relative_error(changed, plain) > 1e-2
    with networks(3).client() as client:
        (used, *_) = [each for each in client.status()["models"] if each["name"] == "auraflow.safetensors"]
    assert used["family"] == "comfyui"


LENS = TinyModel(Tiny("lens", CASES["lens"].config), 48, 0, channels=128, size=(5, 7))


def test_a_controlnet_through_the_nodes(
    networks: Networks, files: Path, comfyui_models: Path, comfyui: ComfyUI, both: Both
) -> None:
    """Of a network that adds its residuals, and of one that would leave them out: the daemon refuses that by name."""
    shutil.copy(files / "lens.safetensors", comfyui_models / "diffusion_models")
    run = Pair(LENS, {"taco": (3, networks(3).endpoint), "net2": (2, networks(2).endpoint)})
    run.add("led", "TestControl", conditioning="@positive", width=48, tokens=35, only="input")
    run.load()
    run.sample(save="_without", cfg=1.0)
    run.sample(save="_with", cfg=1.0, positive="@led")
    both(run, "_without", "_with")
    differ(comfyui, run, "_without", "_with")
    shutil.copy(files / "auraflow.safetensors", comfyui_models / "diffusion_models")
    run = Pair(AURAFLOW, {"taco": (3, networks(3).endpoint)})
    run.add("led", "TestControl", conditioning="@positive", width=48, tokens=35, only="input")
    run.load()
    assert "takes no ControlNet's residuals" in refused(comfyui, run, cfg=1.0, positive="@led")
