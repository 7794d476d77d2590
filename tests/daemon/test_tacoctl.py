"""Every verb of ``tacoctl`` as a shell sees it: exit codes, one JSON document, plain text in a pipe.

Most are run in processes that are forked from one that has imported torch; some as a shell starts them.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, FP32, PIXART, SD3, Daemon, Tiny, read_golden, relative_error
from safetensors.torch import load, load_file, save, save_file
from warm_tacoctl import WarmTacoctl

from tacod.rank.families.krea2 import Krea2
from tacod_client import ArgumentError, Client, ModelNotFound, units
from tacod_client.cli.loaded import find_or_load
from tacod_client.cli.sample import noise_levels

TACOCTL = [sys.executable, "-c", "import sys; from tacod_client.cli import main; sys.exit(main())"]
VERBS = (
    *("status", "stats", "models", "load", "unload", "sample", "ps", "cancel", "ping", "plan", "bench"),
    *("demo", "version", "completion"),
)

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmTacoctl]:
    """A process that has imported what ``tacoctl`` needs."""
    started = WarmTacoctl()
    yield started
    started.close()


@pytest.fixture
def tacoctl(daemon: Daemon, warm: WarmTacoctl) -> Run:
    """Run ``tacoctl`` on the shared daemon; ``cold`` starts it as a shell does."""

    def run(*arguments: object, code: int = 0, cold: bool = False) -> subprocess.CompletedProcess[str]:
        environment, texts = {**os.environ, "TACOD_ENDPOINT": daemon.endpoint}, list(map(str, arguments))
        if cold:
            done = subprocess.run(
                [*TACOCTL, *texts], env=environment, capture_output=True, text=True, check=False, timeout=120
            )
        else:
            done = warm.run(texts, environment)
        assert done.returncode == code, done.stderr
        assert "\x1b" not in done.stdout
        assert "Traceback" not in done.stderr
        if code:
            assert done.stderr.strip()
            assert not done.stdout
        return done

    return run


def as_json(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout)


def test_status(tacoctl: Run, daemon: Daemon, client: Client) -> None:
    client.load(SD3.file)
    told = as_json(tacoctl("status", "--json"))
    assert set(told) == set(client.status())
    assert set(told["group"]) == set(client.status()["group"])
    plain = tacoctl("status", cold=True).stdout
    assert all(word in plain for word in ("ready", str(daemon.pid), daemon.endpoint, "cpu:1", SD3.file))


def test_status_is_quick(daemon: Daemon) -> None:
    """What makes it quick: one question after the greeting, and none of the large libraries."""
    code = f"""
import sys
from tacod_client import wire
from tacod_client.cli import main

encode, sent = wire.encode, []
wire.encode = lambda message: sent.append(message.type) or encode(message)
code = main(["--endpoint", {daemon.endpoint!r}, "status", "--json"])
large = [name for name in ("numpy", "torch", "xfuser", "diffusers", "tacod") if name in sys.modules]
print(*sent, *large, file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr.split() == ["hello", "status", "bye"]


def test_stats(tacoctl: Run, client: Client) -> None:
    SD3.check(client.load(SD3.file))
    told = as_json(tacoctl("stats", "--json"))
    assert set(told) == set(client.stats())
    plain = tacoctl("stats").stdout
    assert all(word in plain for word in ("forwards", "p95", "queue", "wire", "compute", "collective", "hits"))


@pytest.mark.parametrize("verb", ["status", "stats"])
def test_watch(daemon: Daemon, verb: str) -> None:
    command = [*TACOCTL, "--endpoint", daemon.endpoint, verb, "--json", "--watch", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            documents = [json.loads(process.stdout.readline()) for _ in range(3)]
        finally:
            process.terminate()
    key = "uptime_s" if verb == "status" else "tx_bytes"
    assert documents[0][key] < documents[1][key] < documents[2][key]


def test_load_models_unload(tacoctl: Run, client: Client) -> None:
    told = as_json(tacoctl("load", FLUX.file, "--dtype", "fp16", "--json"))
    assert (told["name"], told["family"], told["dtype"]) == (FLUX.file, "flux", "fp16")
    assert told["id"] in tacoctl("load", FLUX.file, "--dtype", "fp16").stdout
    assert told in as_json(tacoctl("models", "--json"))
    assert told["id"] in tacoctl("models").stdout
    assert as_json(tacoctl("unload", told["id"][:12], "--json")) == {"model": told["id"]}
    assert told["id"] not in [one["id"] for one in client.models()]


def test_ps_and_cancel(tacoctl: Run, client: Client) -> None:
    model = client.load(SD3.file)
    running, queued = SD3.sample(model, 20000), SD3.sample(model, 20000)
    assert [one["job"] for one in as_json(tacoctl("ps", "--json"))] == [running.id, queued.id]
    assert running.id in tacoctl("ps").stdout
    assert as_json(tacoctl("cancel", queued.id, "--json")) == {"job": queued.id, "state": "cancelled"}
    assert running.id in tacoctl("cancel", running.id).stdout
    for job in (running, queued):
        with pytest.raises(Exception, match="cancelled"):
            job.result()
    tacoctl("cancel", running.id, code=4)
    assert as_json(tacoctl("ps", "--json")) == []
    assert "nothing" in tacoctl("ps").stdout


def test_ping_and_version(tacoctl: Run, daemon: Daemon) -> None:
    told = as_json(tacoctl("ping", "--json"))
    assert told["endpoint"] == daemon.endpoint
    assert told["round_trip_s"] > 0
    assert daemon.endpoint in tacoctl("ping").stdout
    told = as_json(tacoctl("version", "--json"))
    assert told["tacoctl"] == told["tacod"]
    assert "tacod" in tacoctl("version").stdout


def test_sample(tacoctl: Run, client: Client, tmp_path: Path) -> None:
    given = SD3.inputs()
    sigmas = torch.linspace(1, 0, 5)
    model = client.load(SD3.file)
    conditions = {key: given[key] for key in ("context", "y")}
    job = model.sample(
        noise=given["x"], latent=torch.zeros_like(given["x"]), sigmas=sigmas, positive=conditions, sampler="heun"
    )
    inputs, output = tmp_path / "inputs.safetensors", tmp_path / "latent.safetensors"
    save_file(
        {"noise": given["x"], "sigmas": sigmas, **{f"positive.{key}": value for key, value in conditions.items()}},
        inputs,
    )
    told = as_json(tacoctl("sample", model.id, inputs, "--output", output, "--sampler", "heun", "--json", cold=True))
    assert (told["output"], told["steps"]) == (str(output), 4)
    assert relative_error(load_file(output)["latent"], job.result()) <= FP32


def test_sample_with_noise_of_its_own(tacoctl: Run, tmp_path: Path) -> None:
    given = SD3.inputs()
    inputs, output = tmp_path / "inputs.safetensors", tmp_path / "latent.safetensors"
    save_file({f"positive.{key}": given[key] for key in ("context", "y")}, inputs)
    options = ["--size", "128x96", "--steps", 2, "--output", output]
    assert str(output) in tacoctl("sample", SD3.file, inputs, *options).stdout
    latent = load_file(output)["latent"]
    assert latent.shape == (1, 4, 12, 16)
    assert latent.isfinite().all()


@pytest.fixture
def conditions(tmp_path: Path) -> Path:
    """A file with what SD3 takes, and no noise."""
    path = tmp_path / "conditions.safetensors"
    given = SD3.inputs()
    save_file({f"positive.{key}": given[key] for key in ("context", "y")}, path)
    return path


def test_sample_of_an_id_is_of_the_model_with_its_patches_and_dtype(
    tacoctl: Run, client: Client, models: Path, conditions: Path, tmp_path: Path
) -> None:
    weights = SD3.model.state_dict()
    weight = next(name for name in weights if name.endswith("attn.qkv.weight"))
    height, width = weights[weight].shape
    torch.manual_seed(0)
    layer = f"diffusion_model.{weight.removesuffix('.weight')}"
    save_file(
        {f"{layer}.lora_down.weight": torch.randn(2, width), f"{layer}.lora_up.weight": torch.randn(height, 2)},
        models / "style.safetensors",
    )
    told = [
        as_json(tacoctl("load", SD3.file, *options, "--json"))
        for options in ([], ["--lora", "style.safetensors"], ["--lora", "style.safetensors=0.5"], ["--dtype", "bf16"])
    ]
    given = SD3.inputs()
    noise = torch.randn(given["x"].shape[0], 4, 12, 12, generator=torch.Generator().manual_seed(5))
    latents = []
    for each in told:
        output = tmp_path / f"{each['id']}.safetensors"
        # By a start of the id too, as everywhere.
        arguments = (each["id"][:14], conditions, "--size", "96x96", "--steps", 2, "--seed", 5, "--output", output)
        tacoctl("sample", *arguments)
        latents.append(load_file(output)["latent"])
        even = torch.linspace(1, 0, 3)
        direct = client.model(each["id"]).sample(
            noise=noise,
            latent=torch.zeros_like(noise),
            sigmas=3 * even / (1 + 2 * even),
            positive={key: given[key] for key in ("context", "y")},
            seed=5,
        )
        assert relative_error(latents[-1], direct.result()) <= FP32
    for index, latent in enumerate(latents):
        for other in latents[:index]:
            assert relative_error(latent, other) > FP32


def test_a_model_from_a_file_outlasts_its_unload_and_one_by_its_id_can_not(client: Client) -> None:
    """What `sample` and `bench` work with: what its id was made of, patches and dtype, nobody tells them."""
    from_file = find_or_load(client, FLUX.file, quiet=True)
    from_id = find_or_load(client, from_file.id[:14], quiet=True)
    assert (from_id.id, from_id.sampling) == (from_file.id, from_file.sampling)
    assert from_file.sampling["prediction"] == "flow"
    alone = from_file.with_plan({"sequence_parallel_degree": 1, "cfg_parallel": False})
    FLUX.check(alone)
    assert [each.stats.forwards for each in (alone, from_file)] == [1, 0]
    for model in (alone, from_file):
        client.unload(from_file.id)
        with pytest.raises(ModelNotFound, match="load its file again"):
            FLUX.check(from_id)
        FLUX.check(model)
    assert alone.stats.last is not None
    assert from_file.stats.last is not None
    assert (alone.stats.last.ranks, from_file.stats.last.ranks) == (1, 2)


@pytest.mark.parametrize("output", ["no/such/latent.safetensors", ".", "conditions.safetensors/latent"])
def test_an_output_that_can_not_be_is_known_before_the_run(
    tacoctl: Run, client: Client, conditions: Path, output: str, tmp_path: Path
) -> None:
    client.load(SD3.file)
    before = client.stats()["forwards_total"]
    done = tacoctl("sample", SD3.file, conditions, "--size", "64x64", "--output", tmp_path / output, code=1)
    assert done.stderr.count("\n") == 1
    assert client.stats()["forwards_total"] == before


def test_a_latent_that_can_not_be_written_is_kept(
    daemon: Daemon, warm: WarmTacoctl, conditions: Path, tmp_path: Path
) -> None:
    """Neither a full disk at its end, nor a stderr that nobody reads, loses a run."""
    sample = ["sample", SD3.file, str(conditions), "--size", "64x64", "--steps", "1", "--output"]
    environment = {**os.environ, "TACOD_ENDPOINT": daemon.endpoint, "TMPDIR": str(tmp_path)}
    done = warm.run([*sample, "/dev/full"], environment)
    (kept,) = tmp_path.glob("tacoctl-*")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"it was kept as {kept}" in done.stderr
    latent = kept.read_bytes()

    def check(name: str, run: Callable[[list[str]], subprocess.CompletedProcess[str]], code: int) -> None:
        output = tmp_path / name
        assert run([*sample, str(output)]).returncode == code, name
        assert output.read_bytes() == latent, name

    read, unread = os.pipe()
    os.close(read)
    full = os.open("/dev/full", os.O_WRONLY)
    for name, streams, code in (("full", {2: full}, 0), ("unread", {2: unread}, 0), ("full output", {1: full}, 1)):
        check(name, lambda arguments, streams=streams: warm.run(arguments, environment, streams), code)
    for number in (unread, full):
        os.close(number)

    def without_streams(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        # Python looks at its streams when it starts.
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *TACOCTL, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)

    check("closed", without_streams, 0)


def test_a_failed_run_leaves_the_output_as_it_was(tacoctl: Run, conditions: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.safetensors"
    old.write_bytes(b"an older latent")
    for output in (old, tmp_path / "new.safetensors"):
        arguments = ("sample", SD3.file, conditions, "--size", "64x64", "--sampler", "none", "--output", output)
        assert "sampler" in tacoctl(*arguments, code=1).stderr
    assert old.read_bytes() == b"an older latent"
    assert not (tmp_path / "new.safetensors").exists()


BLANK = {"positive.context": torch.zeros(1, 7, 8), "positive.y": torch.zeros(1, 6)}
"""What SD3 needs at the least."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no safetensors file"),
        (b"no tensors at all", "no safetensors file"),
        (b"\xff" * 4096, "no safetensors file"),
        ({}, "no positive"),
        ({"noise": torch.zeros(1, 4, 8, 8)}, "no positive"),
        ({"context": torch.zeros(1, 7, 8)}, "'context' is none of"),
        ({"positive.context": torch.zeros(())}, "positive.context"),
        ({"positive.context": torch.zeros(0, 7, 8)}, ""),
        ({"positive.context": torch.zeros(1, 7, 8, dtype=torch.int64)}, "positive.context"),
        ({"positive.context": torch.zeros(1, 7, 8), "sigmas": torch.zeros(())}, "sigmas"),
        ({**BLANK, "sigmas": torch.tensor([float("nan"), 0])}, "sigmas"),
        ({"positive.context": torch.zeros(1, 7, 8), "noise": torch.zeros(3)}, "noise"),
        ({"positive.context": torch.zeros(1, 7, 8), "latent": torch.zeros(1, 4, 2, 2)}, "latent"),
        ({"positive.nothing": torch.zeros(1)}, "nothing"),
    ],
    ids=lambda value: "",
)
def test_inputs_that_can_not_be_are_one_line(tacoctl: Run, tmp_path: Path, content: Any, said: str) -> None:
    inputs = tmp_path / "caf\udce9.safetensors"
    if isinstance(content, bytes):
        inputs.write_bytes(content)
    else:
        inputs.write_bytes(save(content))
    output = tmp_path / "latent.safetensors"
    done = tacoctl("sample", SD3.file, inputs, "--size", "64x64", "--steps", 1, "--output", output, code=1)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not output.exists()


def test_a_name_that_utf_8_lacks_is_no_obstacle_here(tacoctl: Run, conditions: Path, tmp_path: Path) -> None:
    """Files of one's own may have any name."""
    inputs, output = tmp_path / "in\udce9[x]", tmp_path / "out\udce9\n"
    conditions.rename(inputs)
    told = as_json(tacoctl("sample", SD3.file, inputs, "--size", "64x64", "--steps", 1, "--output", output, "--json"))
    assert told["output"] == str(output)
    assert set(load(output.read_bytes())) == {"latent"}


def trained_level(step: float) -> float:
    """The noise level of a step of PixArt's training, between two of them on a log scale."""

    def at(step: int) -> float:
        signal = math.prod(1 - (1e-4 + (2e-2 - 1e-4) * each / 999) for each in range(step + 1))
        return ((1 - signal) / signal) ** 0.5

    low, part = int(step), step - int(step)
    return at(low) ** (1 - part) * at(min(low + 1, 999)) ** part


def test_sample_takes_its_noise_from_the_family(
    tacoctl: Run, client: Client, models: Path, tmp_path: Path, daemon: Daemon
) -> None:
    """PixArt's levels go down from 157 as ComfyUI's "normal" ones do, and a flow's from 1."""
    PIXART.save(models)
    context = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(1))
    inputs, output = tmp_path / "inputs.safetensors", tmp_path / "latent.safetensors"
    save_file({"positive.context": context}, inputs)
    arguments = ("sample", PIXART.file, inputs, "--size", "320x384", "--steps", 5, "--seed", 3, "--output", output)
    tacoctl(*arguments)
    sampling = next(one["sampling"] for one in client.models() if one["name"] == PIXART.file)
    assert sampling == {
        "channels": 4,
        "latent": ["B", 4, "H", "W"],
        "downscale": 8,
        "prediction": "epsilon",
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 2e-2,
        "num_train_timesteps": 1000,
    }
    noise = torch.randn(1, 4, 48, 40, generator=torch.Generator().manual_seed(3))
    job = client.load(PIXART.file).sample(
        noise=noise,
        latent=torch.zeros_like(noise),
        sigmas=torch.tensor([*map(trained_level, (999, 749.25, 499.5, 249.75, 0)), 0.0]),
        positive={"context": context},
    )
    assert relative_error(load_file(output)["latent"], job.result()) <= 1e-4
    assert "--shift is for flows" in tacoctl(*arguments, "--shift", 3, code=1).stderr
    assert "--frames is for videos, and pixart makes none" in tacoctl(*arguments, "--frames", 3, code=1).stderr
    assert client.load(SD3.file).id
    told = next(one["sampling"] for one in client.models() if one["name"] == SD3.file)
    latent = {"latent": ["B", 4, "H", "W"], "downscale": 8}
    assert told == {"channels": 4, **latent, "prediction": "flow"}


LATENTS = {"qwen_image": ((16, 1), 8), "flux2_klein": ((128,), 16), "chroma_radiance": ((3,), 1)}
"""Channels, and frames where the latent has them, and pixels per cell, of goldens' models: one of each kind."""


@pytest.mark.parametrize("name", LATENTS)
def test_sample_and_bench_know_a_familys_latents(
    tacoctl: Run, client: Client, models: Path, tmp_path: Path, name: str
) -> None:
    sides, downscale = LATENTS[name]
    golden, file = read_golden(name), f"sampled_{name}.safetensors"
    golden.save(models / file)
    needed = golden.model().arguments()
    given = {key: value for key, value in golden.inputs.items() if key in needed and needed[key].required}
    noise = torch.randn(len(given.pop("x")), *sides, 16, 32, generator=torch.Generator().manual_seed(0))
    del given["timestep"]
    inputs, output = tmp_path / "inputs.safetensors", tmp_path / "latent.safetensors"
    save_file({f"positive.{key}": value for key, value in given.items()}, inputs)
    size = f"{32 * downscale}x{16 * downscale}"
    tacoctl("sample", file, inputs, "--size", size, "--steps", 2, "--output", output)
    model = client.load(file)
    job = model.sample(noise=noise, latent=torch.zeros_like(noise), sigmas=noise_levels(model, 2), positive=given)
    assert relative_error(load_file(output)["latent"], job.result()) <= FP32
    row = as_json(tacoctl("bench", file, "--size", size, "--text", 7, "--rounds", 1, "--json"))["sizes"][0]
    assert row["error"] <= 10 * FP32
    client.unload(model.id)


def test_latents_of_other_channels_than_the_familys_are_refused(client: Client, models: Path) -> None:
    """They are known by their means, one for each channel."""
    tiny = Tiny("few_channels", dict(Krea2.tiny))
    tiny.save(models)
    noise = torch.randn(1, 4, 1, 8, 8)
    text = torch.randn(1, 7, tiny.model.arguments()["context"].shape[-1])
    model = client.load(tiny.file)
    with pytest.raises(ArgumentError, match="model: its latents have 4 channels, and those of krea2 16"):
        model.sample(noise=noise, latent=noise, sigmas=torch.tensor([1.0, 0.0]), positive={"context": text}).result()
    client.unload(model.id)


def test_names_are_shown_as_they_are(tacoctl: Run, client: Client, models: Path) -> None:
    name = "[v2] flux[bf16] :x: 模型 [].safetensors"
    (models / name).write_bytes((models / FLUX.file).read_bytes())
    assert name in tacoctl("load", name).stdout
    for verb in (["models"], ["status"], ["top", "--once"]):
        assert name in tacoctl(*verb).stdout
    assert name in [one["name"] for one in as_json(tacoctl("models", "--json"))]
    assert name in tacoctl("bench", name, "--size", "64x64", "--rounds", 1).stdout


def test_plan_needs_no_daemon(tacoctl: Run, models: Path) -> None:
    arguments = ("plan", models / FLUX.file, "--ranks", 3, "--size", "72x112", "--text", 129)
    told = as_json(tacoctl(*arguments, "--json", "--endpoint", "ipc:///nowhere"))
    assert (told["family"], told["batch"], told["ulysses"] * told["ring"]) == ("flux", 1, 3)
    assert told["tokens"] == [43 + 12, 43 + 12, 43 + 11]
    text = tacoctl(*arguments).stdout
    assert told["plan"] in text
    # As `tacoctl models` says it.
    assert f", {units.short(told['parameters'])} parameters, " in text
    assert told["shares"] == []


def test_plan_says_what_unequal_ranks_take(tacoctl: Run, models: Path) -> None:
    arguments = ("plan", models / FLUX.file, "--ranks", 3, "--size", "72x112", "--text", 129, "--json")
    told = as_json(tacoctl(*arguments, "--shares", "2,1,1"))
    assert told["shares"] == [2, 1, 1]
    assert told["tokens"] == [65 + 18, 32 + 9, 32 + 8]
    refused = tacoctl(*arguments, "--shares", "2,1", code=1)
    assert "--shares 2,1: expected 3 whole numbers" in refused.stderr


def test_plan_tells_what_a_file_is(tacoctl: Run, models: Path) -> None:
    read_golden("quantised/krea2_asym_w4a8_int8").save(models / "w4a8.safetensors")
    told = as_json(tacoctl("plan", models / "w4a8.safetensors", "--ranks", 1, "--json"))
    assert set(told["quantization"]) == {"asym_w4a8_int8"}
    assert 0 < told["weight_bytes"] < 2 * told["parameters"]
    count = told["quantization"]["asym_w4a8_int8"]
    assert f"{count} weights in asym_w4a8_int8" in tacoctl("plan", models / "w4a8.safetensors", "--ranks", 1).stdout


def test_plan_tells_what_a_forward_takes(tacoctl: Run, models: Path) -> None:
    plan = as_json(tacoctl("plan", models / FLUX.file, "--ranks", 3, "--json"))
    told = plan["arguments"]
    assert plan["downscale"] == 8
    assert told["x"] == {"shape": ["B", 4, "H", "W"], "required": True, "usual": True}
    assert told["y"] == {"shape": ["B", 6], "required": False, "usual": True}
    assert told["timestep"] == {"shape": ["B"], "required": True, "usual": True, "value": pytest.approx(0.7)}
    assert told["guidance"] == {"shape": ["B"], "required": False, "usual": True, "value": 3.5}
    assert not {"ref_latents", "attention_mask", "control", "rope_options"} & set(told)


def test_bench_compares_one_rank_with_all_and_the_daemon_remembers(tacoctl: Run, client: Client) -> None:
    model = client.load(FLUX.file)
    sizes = ("--size", "112x72", "--size", "64x64")
    told = as_json(tacoctl("bench", model.id[:12], *sizes, "--text", 129, "--rounds", 3, "--json"))
    assert told["model"] == {"id": model.id, "name": FLUX.file, "family": "flux", "dtype": "fp32"}
    assert (told["ranks"], told["batch"], told["text"], told["rounds"]) == (2, 1, 129, 3)
    assert [row["size"] for row in told["sizes"]] == ["112x72", "64x64"]
    for row in told["sizes"]:
        assert row["plan"].startswith("sequence 2 (ulysses; ")
        assert (row["ranks"], row["error"] <= FP32) == (2, True)
        assert 0 < row["all_s"]["p10"] <= row["all_s"]["p50"] <= row["all_s"]["p90"]
        assert row["speedup"] == row["one_s"]["p50"] / row["all_s"]["p50"]
        assert set(row["split"]) == {"queue_s", "wire_s", "compute_s", "collective_s", "client_s"}
        assert sum(row["split"].values()) == pytest.approx(row["all_s"]["p50"])
        assert row["bound"]
    FLUX.check(model)
    assert model.stats.last is not None
    assert model.stats.last.single_rank_s is not None
    assert [one["id"] for one in client.models()].count(model.id) == 1


def test_bench_takes_a_file_or_the_model_that_was_used_last(tacoctl: Run, client: Client) -> None:
    options = ("--size", "96x64", "--batch", 2, "--rounds", 1)
    plain = tacoctl("bench", SD3.file, *options, cold=True).stdout
    assert all(word in plain for word in (SD3.file, "96x64", "154 text tokens", "batch 2 × sequence 1", "2 ranks"))
    SD3.check(client.load(SD3.file))
    assert as_json(tacoctl("bench", *options, "--json"))["model"]["name"] == SD3.file


def test_bench_says_what_a_model_can_not_take(tacoctl: Run) -> None:
    assert "at most 24 by 24" in tacoctl("bench", SD3.file, "--size", "1024x1024", code=1).stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(tacoctl: Run, shell: str) -> None:
    script = tacoctl("completion", shell).stdout
    assert all(verb in script for verb in VERBS)


def test_help_names_the_exit_codes(tacoctl: Run) -> None:
    text = tacoctl("--help").stdout
    assert all(verb in text for verb in VERBS)
    assert "75 queue full" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["load", "zeros.safetensors"], 1, "no whole safetensors"),
        (["load", "model.ckpt"], 1, "pickle"),
        (["sample", FLUX.file, "nowhere.safetensors"], 1, "nowhere.safetensors"),
        (["plan", "nowhere.safetensors", "--ranks", "2"], 4, "nowhere.safetensors"),
        (["plan", "--ranks", "2", "--", "-nowhere"], 4, "-nowhere"),
        ([], 2, "VERB"),
        (["frobnicate"], 2, "frobnicate"),
        (["load"], 2, "path"),
        (["load", "x", "--dtype", "int4"], 2, "int4"),
        (["status", "--watch", "-1"], 2, "watch"),
        (["plan", "x", "--ranks", "0"], 2, "ranks"),
        (["status", "--endpoint", "ipc:///nowhere/tacod.sock"], 3, "no tacod listens at ipc:///nowhere"),
        (["--endpoint", "ipc:///nowhere/tacod.sock", "ping"], 3, "systemctl start tacod"),
        (["load", "missing.safetensors"], 4, "missing.safetensors"),
        (["bench", "missing.safetensors"], 4, "missing.safetensors"),
        (["bench", "--endpoint", "ipc:///nowhere/tacod.sock"], 3, "no tacod listens at ipc:///nowhere"),
        (["unload", "nope"], 4, "nope"),
        (["cancel", "nope"], 4, "nope"),
        (["unload", ""], 2, "empty"),
        (["bench", ""], 2, "empty"),
        (["sample", "", "inputs.safetensors"], 2, "empty"),
        (["cancel", ""], 2, "empty"),
        (["load", ""], 2, "empty"),
        (["load", FLUX.file, "--lora", ""], 2, "empty"),
        (["status", "--endpoint", ""], 2, "empty"),
        (["load", "caf\udce9.safetensors"], 4, "caf\\udce9.safetensors"),
        (["load", FLUX.file, "--lora", "caf\udce9.safetensors=0.5"], 4, "caf\\udce9.safetensors"),
        (["unload", "caf\udce9"], 4, "caf\\udce9"),
        (["cancel", "caf\udce9"], 4, "caf\\udce9"),
        (["bench", "caf\udce9"], 4, "caf\\udce9"),
        (["plan", "caf\udce9", "--ranks", "2"], 4, "caf\\udce9"),
        (["load", "a\nb\x1b[2J"], 4, "a\\nb\\x1b[2J"),
        (["bench", SD3.file, "--batch", "2000000000", "--size", "64x64", "--rounds", "1"], 1, "limits.message_bytes"),
        (["bench", SD3.file, "--text", "2000000000", "--size", "64x64", "--rounds", "1"], 1, "limits.message_bytes"),
        (["bench", SD3.file, "--attention", "int8", "--size", "64x64", "--rounds", "1"], 1, "bf16 and fp16 only"),
        (["bench", SD3.file, "--attention", "quick"], 2, "exact"),
        (["load", "/etc/passwd"], 77, "models.roots"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_exit_codes(tacoctl: Run, models: Path, arguments: list[str], code: int, words: str) -> None:
    (models / "zeros.safetensors").write_bytes(bytes(4096))
    (models / "model.ckpt").write_bytes(b"\x80\x04.")
    assert words in tacoctl(*arguments, code=code).stderr


def test_a_reader_that_goes_away_is_no_traceback(daemon: Daemon) -> None:
    command = " ".join(["exec", *(f"'{part}'" for part in TACOCTL), "completion", "bash"])
    done = subprocess.run(["/bin/sh", "-c", f"({command}) | true"], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
