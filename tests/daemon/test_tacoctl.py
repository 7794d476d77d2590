"""Every verb of ``tacoctl`` as a shell sees it: exit codes, one JSON document, plain text in a pipe."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, FP32, SD3, Daemon, relative_error
from safetensors.torch import load_file, save_file

from tacod_client import Client

TACOCTL = [sys.executable, "-c", "import sys; from tacod_client.cli import main; sys.exit(main())"]
VERBS = (
    *("status", "stats", "models", "load", "unload", "sample", "ps", "cancel", "ping", "plan", "bench"),
    *("demo", "version", "completion"),
)

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tacoctl(daemon: Daemon) -> Run:
    """Run ``tacoctl`` on the shared daemon."""

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TACOD_ENDPOINT": daemon.endpoint}
        done = subprocess.run(
            [*TACOCTL, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
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
    plain = tacoctl("status").stdout
    assert all(word in plain for word in ("ready", str(daemon.pid), daemon.endpoint, "cpu:1", SD3.file))


def test_status_is_quick(tacoctl: Run) -> None:
    """Under half a second; of processor time, since other work on this machine is no fault of ours."""

    def measure() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        tacoctl("status")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(measure() for _ in range(3)) < 0.5


def test_status_imports_no_torch(daemon: Daemon) -> None:
    code = (
        "import sys; from tacod_client.cli import main; "
        f"code = main(['--endpoint', {daemon.endpoint!r}, 'status']); sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


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
    assert 0 < told["round_trip_s"] < 1
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
    told = as_json(tacoctl("sample", model.id, inputs, "--output", output, "--sampler", "heun", "--json"))
    assert (told["output"], told["steps"]) == (str(output), 4)
    assert relative_error(load_file(output)["latent"], job.result()) <= FP32


def test_sample_with_noise_of_its_own(tacoctl: Run, tmp_path: Path) -> None:
    given = SD3.inputs()
    inputs, output = tmp_path / "inputs.safetensors", tmp_path / "latent.safetensors"
    save_file({f"positive.{key}": given[key] for key in ("context", "y")}, inputs)
    options = ["--channels", 4, "--size", "128x96", "--steps", 2, "--output", output]
    assert str(output) in tacoctl("sample", SD3.file, inputs, *options).stdout
    latent = load_file(output)["latent"]
    assert latent.shape == (1, 4, 12, 16)
    assert latent.isfinite().all()


def test_plan_needs_no_daemon(tacoctl: Run, models: Path) -> None:
    arguments = ("plan", models / FLUX.file, "--ranks", 3, "--size", "72x112", "--text", 129)
    told = as_json(tacoctl(*arguments, "--json", "--endpoint", "ipc:///nowhere"))
    assert (told["family"], told["batch"], told["ulysses"] * told["ring"]) == ("flux", 1, 3)
    assert told["tokens"] == [43 + 12, 43 + 12, 43 + 11]
    assert told["plan"] in tacoctl(*arguments).stdout


def test_plan_tells_what_a_forward_takes(tacoctl: Run, models: Path) -> None:
    told = as_json(tacoctl("plan", models / FLUX.file, "--ranks", 3, "--json"))["arguments"]
    assert told["x"] == {"shape": ["B", 4, "H", "W"], "required": True}
    assert told["y"] == {"shape": ["B", 6], "required": False}
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
        assert set(row["split"]) == {"queue_s", "wire_s", "compute_s", "collective_s"}
        assert sum(row["split"].values()) == pytest.approx(row["all_s"]["p50"])
        assert row["bound"]
    FLUX.check(model)
    assert model.stats.last is not None
    assert model.stats.last.single_rank_s is not None
    assert [one["id"] for one in client.models()].count(model.id) == 1


def test_bench_takes_a_file_or_the_model_that_was_used_last(tacoctl: Run, client: Client) -> None:
    options = ("--size", "96x64", "--batch", 2, "--rounds", 1)
    plain = tacoctl("bench", SD3.file, *options).stdout
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
        (["plan", "nowhere.safetensors", "--ranks", "2"], 1, "nowhere.safetensors"),
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
