"""``tacoctl doctor``: each check on what is well and on what is not, with and without the daemon's packages."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import read_golden
from made_up_networks import COMFYUI, changed

from tacod import daemon
from tacod.config import Config
from tacod.tools import doctor as engine
from tacod.tools import doctor_gpus as devices
from tacod_client.cli import doctor, main
from tacod_client.curve import make_keys

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="tacod-") as name:
        yield Path(name)


def states(findings: Any) -> list[str]:
    return [found.state for found in findings]


def config(values: dict[str, Any]) -> Config:
    return Config.model_validate({"group": {"device": "cpu"}, **values})


def status(**changes: Any) -> dict[str, Any]:
    group = {"device": "cpu", "world_size": 2, "restarts": 0, "ranks": [{}, {}]}
    return {"state": "ready", "version": "1", "pid": 1, "uptime_s": 1.0, "group": group, **changes}


# --- with the client alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "state", "words"),
    [
        (0o660, "ok", "may use it"),
        (0o666, "warn", "every user"),
        (None, "fail", "No such file"),
        (-1, "fail", "no socket"),
    ],
)
def test_socket(folder: Path, mode: int | None, state: str, words: str) -> None:
    path = folder / "t.sock"
    if mode == -1:
        path.touch()
    elif mode is not None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
        path.chmod(mode)
    (found,) = doctor._socket(f"ipc://{path}")
    assert (found.state, words in found.message) == (state, True), found


def test_socket_of_others_names_the_group_to_join(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "t.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    monkeypatch.setattr(os, "access", lambda *args: False)
    (found,) = doctor._socket(f"ipc://{path}")
    assert found.state == "fail"
    assert re.search(r"`sudo usermod -aG \S+ \S+`, then log in again", found.advice)


@pytest.mark.parametrize(
    ("told", "stats", "expected"),
    [
        (status(), (0, 0), ["ok", "ok"]),
        (status(), (4, 4), ["ok", "ok", "ok"]),
        (status(), (4, 0), ["ok", "ok", "warn"]),
        (status(state="degraded"), (0, 0), ["warn", "ok"]),
        (status(state="starting"), (0, 0), ["warn", "ok"]),
        (status(group={"world_size": 2, "restarts": 3, "ranks": [{}, {}]}), (0, 0), ["ok", "warn"]),
        (status(group={"world_size": 2, "restarts": 0, "ranks": []}), (0, 0), ["ok", "warn"]),
        # Two groups of one rank each have nothing to exchange.
        (status(groups=[{"world_size": 1}, {"world_size": 1}]), (4, 0), ["ok", "ok", "ok"]),
        (status(groups=[{"world_size": 1}, {"world_size": 2}]), (4, 0), ["ok", "ok", "warn"]),
    ],
)
def test_daemon(told: dict[str, Any], stats: tuple[int, int], expected: list[str]) -> None:
    done, parallel = stats
    findings = list(doctor._daemon(told, {"forwards_total": done, "parallel_forwards_total": parallel}))
    assert states(findings) == expected
    assert all(bool(found.advice) == (found.state != "ok") for found in findings)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (["3", "5"], [("0", [3]), ("1", [5])]),
        # One whose ranks are being replaced tells nothing of its GPUs.
        (["3", ""], [("0", [3])]),
        (["", ""], [("0", None)]),
    ],
)
def test_a_running_daemon_tells_its_groups(
    groups: list[str], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [
        {"name": str(at), "device": "cuda", "world_size": 1, "ranks": [{"device": gpu}] if gpu else []}
        for at, gpu in enumerate(groups)
    ]
    monkeypatch.setattr(engine, "DEFAULT_CONFIG", "/nowhere/config.toml")
    monkeypatch.setattr(engine, "_status", lambda endpoint: {"endpoint": endpoint, "groups": told})
    config, _, _ = engine._configuration(None, "ipc:///run/s")
    assert [(group.name, group.gpus) for group in config.groups] == expected


def test_ranks_on_other_hosts_are_on_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [{"device": "0", "host": host} for host in (socket.gethostname(), "elsewhere")]
    told = [{"device": "cuda", "world_size": 2, "ranks": ranks}]
    monkeypatch.setattr(engine, "DEFAULT_CONFIG", "/nowhere/config.toml")
    monkeypatch.setattr(engine, "_status", lambda endpoint: {"endpoint": endpoint, "groups": told})
    config, _, _ = engine._configuration(None, "ipc:///run/s")
    assert (config.launcher, config.groups[0].ranks) == ("ray", 2)


def test_limits_are_the_daemons_if_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = doctor._limits(os.getpid())
    assert limits["Max open files"] > 0
    assert doctor._limits(99999999) == {}
    own = next(found for found in doctor._system(None) if found.check == "open files")
    its = next(found for found in doctor._system(os.getpid()) if found.check == "open files")
    assert ("this shell's" in own.message, "the daemon's" in its.message) == (True, True)
    monkeypatch.setattr(doctor, "_limits", lambda pid=None: {"Max open files": 256.0})
    few = next(found for found in doctor._system(None) if found.check == "open files")
    assert (few.state, "LimitNOFILE" in few.advice) == ("warn", True)


def test_clock_and_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(found for found in doctor._system(None) if found.check == "clock") == ["ok"]
    monkeypatch.setattr("time.time", lambda: 0.0)
    monkeypatch.setattr(doctor, "SHM_BYTES", 1 << 60)
    found = {found.check: found for found in doctor._system(None)}
    assert (found["clock"].state, found["/dev/shm"].state) == ("warn", "warn")


def test_without_the_daemons_packages_it_says_what_it_cannot_check(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["doctor", "--json", "--endpoint", f"ipc://{folder}/none"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == "fail"
    assert told["findings"][0]["state"] == "warn"
    assert "GPUs, models and the configuration were not checked" in told["findings"][0]["message"]
    assert {"check", "state", "message", "advice"} == set(told["findings"][0])


@pytest.mark.parametrize(
    ("code", "words"),
    [("raise SystemExit('why')", "ended with 1: why"), ("import time; time.sleep(60)", "did not end within")],
)
def test_an_engine_part_that_breaks_or_hangs_is_a_line(monkeypatch: pytest.MonkeyPatch, code: str, words: str) -> None:
    monkeypatch.setattr(doctor, "PATIENCE_S", 0.5 if "sleep" in code else 30.0)
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: real([sys.executable, "-c", code], **options))
    endpoint, (found,) = doctor._engine(argparse.Namespace(config=None, no_bandwidth=True))
    assert (endpoint, found.state, words in found.message) == (None, "fail", True), found


def test_whole_look_without_a_daemon_exits_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "config.toml"
    path.write_text(f'endpoint = "ipc://{folder}/none"\n[group]\ndevice = "cpu"\n[models]\nroots = ["{folder}"]\n')
    assert main(["doctor", "--config", str(path)]) == 1
    told = capsys.readouterr().out
    lines = {line.split()[1]: line for line in told.splitlines()[:-1]}
    for check in ("config", "torch", "xfuser", "diffusers", "packages", "groups", "models"):
        assert lines[check].startswith("ok"), lines[check]
    for check in ("socket", "daemon"):
        assert lines[check].startswith("fail"), lines[check]
    assert f"ipc://{folder}/none" in lines["daemon"], "the configured endpoint is the one that is tried"
    assert re.fullmatch(r"\d+ ok, \d+ warn, 2 fail", told.splitlines()[-1])


# --- with the daemon's packages ---------------------------------------------------------------------------------------


def test_a_bad_configuration_is_a_line_a_fault(folder: Path) -> None:
    path = folder / "config.toml"
    path.write_text("colour = 1\nheartbeat_s = 0\n")
    _, known, findings = engine._configuration(str(path), None)
    assert (known, states(findings)) == (False, ["fail", "fail"])
    assert {found.message.split(":")[1] for found in findings} == {"colour", "heartbeat_s"}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[curve]\nlisten = "tcp://127.0.0.1:5555"\nsecret_key = "/none"\nclients = "/none"\n', "curve.secret_key"),
        ('endpoint = "ipc://{folder}/file"\n', "endpoint"),
        ('[metrics]\nlisten = "unix:{folder}/s"\n', "metrics.listen"),
        ('[models]\nuploads = "{folder}/file"\n', "models.uploads"),
        ('[comfyui]\npath = "{folder}/file"\n', "comfyui.path"),
        ('endpoint = "ipc://{folder}/file"\n[models]\nuploads = "{folder}/file"\n', "models.uploads"),
        ("colour = 1\n", "colour"),
    ],
)
def test_its_line_says_what_check_config_says(
    folder: Path, text: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").write_text("years of work")
    path = folder / "config.toml"
    own = "" if "endpoint" in text else f'endpoint = "ipc://{folder}/s"\n'
    path.write_text(own + text.format(folder=folder))
    assert daemon.main(["--config", str(path), "--check-config"]) == 78
    told = capsys.readouterr().err.splitlines()
    assert f"{path}:{key}" in {line.partition(": ")[0] for line in told}
    _, _, findings = engine._configuration(str(path), None)
    assert [(found.state, found.message) for found in findings] == [("fail", line) for line in told]
    assert all("--check-config` looks again" in found.advice for found in findings)


def test_a_key_that_is_not_this_users_to_read_is_no_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_keys(folder, "tacod")
    path = folder / "config.toml"
    path.write_text(
        f'endpoint = "ipc://{folder}/file"\n[curve]\nlisten = "tcp://127.0.0.1:5555"\n'
        f'secret_key = "{folder}/tacod.key_secret"\nclients = "{folder}/tacod.key"\n'
    )
    real = os.open

    def shut(name: Any, *rest: Any, **options: Any) -> int:
        if str(name).endswith(".key_secret"):
            raise PermissionError(13, "Permission denied", name)
        return real(name, *rest, **options)

    monkeypatch.setattr(os, "open", shut)
    config, known, (found,) = engine._configuration(str(path), None)
    assert (known, config.curve is not None) == (True, True)
    assert found.message == f"{path}:curve.secret_key: {folder}/tacod.key_secret: Permission denied"
    assert (found.state, "as tacod's own user" in found.advice) == ("warn", True)
    (folder / "file").write_text("years of work")
    assert states(engine._configuration(str(path), None)[2]) == ["warn", "fail"]


def test_packages_that_are_missing_or_too_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(states(engine._packages())) == {"ok"}
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "xfuser":
            raise importlib.metadata.PackageNotFoundError
        return "1.0" if name == "torch" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {found.check: found for found in engine._packages()}
    assert (found["xfuser"].state, found["xfuser"].message) == ("warn", "not installed")
    assert (found["torch"].state, found["torch"].message) == ("fail", "1.0, but >=2.9 is needed")


def test_a_cluster_that_answers_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "check_installed", lambda: "2.60.0")
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        (found,) = engine._ray([address])
        assert (found.state, found.message.partition(",")[0]) == ("ok", f"2.60.0; {address} answers")
    (found,) = engine._ray([address])
    assert (found.state, found.message) == ("fail", f"no Ray cluster answers at {address}: Connection refused")
    assert states(engine._ray(["auto"])) == ["ok"]


def test_a_ray_that_is_missing_is_named_and_no_gpus_are_looked_at(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "ray":
            raise importlib.metadata.PackageNotFoundError
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    path = folder / "config.toml"
    path.write_text('[group]\nlauncher = "ray"\nranks = 2\n')
    assert engine.main(["--config", str(path), "--endpoint", f"ipc://{folder}/s"]) == 0
    found = {each["check"]: each for each in json.loads(capsys.readouterr().out)["findings"]}
    assert (found["ray"]["state"], found["ray"]["message"]) == ("fail", "group.launcher: Ray is not installed")
    assert found["ray"]["advice"].startswith("`pip install ")
    assert "gpus" not in found


def test_torchs_own_process_groups_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from tacod.rank.comm import process_groups

    def moved(on_gpu: bool) -> None:
        raise ImportError("its modules moved")

    monkeypatch.setattr(process_groups, "_parallel_state", moved)
    (found,) = engine._groups()
    assert (found.check, found.state) == ("groups", "warn")
    assert found.message.startswith("torch's own process groups work")
    assert "ImportError: its modules moved" in found.message


@pytest.mark.parametrize(
    ("capability", "cuda", "installed", "state", "words"),
    [
        ((9, 0), "13.0", False, "ok", "the daemon's own kernels"),
        ((8, 9), "13.0", True, "ok", "comfy-kitchen's kernels"),
        ((8, 9), "13.0", False, "warn", "PyTorch's operations"),
        ((8, 9), "12.8", True, "warn", "PyTorch's operations"),
        ((7, 0), "13.0", True, "warn", "PyTorch's operations"),
    ],
)
def test_what_multiplies_int8_layers(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str, installed: bool, state: str, words: str
) -> None:
    import torch

    from tacod.rank.ops.packed import kitchen

    monkeypatch.setattr(torch.version, "cuda", cuda)
    package = SimpleNamespace(list_backends=lambda: {"cuda": {"available": True}}) if installed else None
    monkeypatch.setitem(sys.modules, "comfy_kitchen", package)
    kitchen._library.cache_clear()
    try:
        found = devices._int8([replace(gpu, capability=capability) for gpu in GPUS])
    finally:
        kitchen._library.cache_clear()
    assert (found.check, found.state, words in found.message) == ("int8", state, True)


def test_no_gpu_is_started_to_say_what_multiplies_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take memory of each, and a driver that is too old for torch would end the doctor."""
    import torch

    def refuse(device: Any) -> tuple[int, int]:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    assert devices._int8(GPUS).state == "ok"


def test_gpus_without_a_driver_fail_with_what_to_do() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    (found,) = devices.look(Config.model_validate({}).groups, None, True)
    assert (found.check, found.state) == ("gpus", "fail")
    assert 'set group.device = "cpu"' in found.message


def test_a_driver_without_gpus_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shown in (("nvmlInit", None), ("nvmlShutdown", None), ("nvmlDeviceGetCount", 0)):
        monkeypatch.setattr(f"pynvml.{name}", lambda shown=shown: shown)
    (found,) = devices.look(Config.model_validate({}).groups, None, True)
    assert (found.check, found.state) == ("gpus", "fail")
    assert found.message.startswith("group.gpus: the driver shows no GPU; ")


GPUS = [devices.Gpu(name, "RTX", 20 << 30, 24 << 30, (9, 0)) for name in ("3", "5")]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, doctor.Finding]]:
    """Look at two GPUs of a machine with six, and at links that were measured so."""
    monkeypatch.setattr(devices, "devices", lambda groups: [["3", "5"]])
    monkeypatch.setattr(devices, "_driver", lambda: iter(()))
    monkeypatch.setattr(devices, "_count", lambda: 6)

    def look(
        told: dict[str, Any] | None = None,
        found: list[devices.Gpu] = GPUS,
        measure: bool = True,
        **link: Any,
    ) -> dict[str, doctor.Finding]:
        links = [{"from": 0, "to": 1, "peer": True, "bytes_per_s": 20e9, "intact": True, **link}]
        code = f"print({json.dumps(links)!r})"
        real = subprocess.run
        monkeypatch.setattr(devices, "_find", lambda wanted: found)
        monkeypatch.setattr(subprocess, "run", lambda command, **options: real([sys.executable, "-c", code], **options))
        findings = devices.look(Config.model_validate({}).groups, told, measure)
        return {finding.check: finding for finding in findings}

    return look


@pytest.mark.parametrize(
    ("link", "state", "words"),
    [
        ({}, "ok", "20.0 GB/s, peer access"),
        ({"peer": False}, "warn", "through host memory"),
        ({"bytes_per_s": 2e9}, "warn", "2.0 GB/s"),
        ({"intact": False}, "fail", "not what was sent"),
    ],
)
def test_links(gpus: Callable[..., dict[str, doctor.Finding]], link: dict[str, Any], state: str, words: str) -> None:
    found = gpus(**link)["link 3 to 5"]
    assert (found.state, words in found.message) == (state, True), found


def test_links_are_not_measured_where_that_would_disturb(gpus: Callable[..., dict[str, doctor.Finding]]) -> None:
    full = [GPUS[0], replace(GPUS[1], free=1 << 30)]
    assert gpus(measure=False)["links"].message == "not measured"
    assert "at work" in gpus({"queue": {"running": 1}})["links"].message
    found = gpus(found=full)
    assert "less than 2 GiB" in found["links"].message
    assert (found["gpu 3"].state, found["gpu 5"].state) == ("ok", "warn")
    assert found["gpus"].message == "6 seen, 2 wanted: 3, 5"


def test_links_that_hang_are_given_up(gpus: Callable[..., dict[str, doctor.Finding]], monkeypatch: Any) -> None:
    monkeypatch.setattr(devices, "LINKS_S", 0.0)
    assert gpus()["links"].state == "fail"


def test_variables_that_slow_down_are_named(gpus: Callable[..., dict[str, doctor.Finding]], monkeypatch: Any) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setenv("NCCL_SHM_DISABLE", "0")
    found = gpus()
    assert found["NCCL_P2P_DISABLE"].state == "warn"
    assert "NCCL_SHM_DISABLE" not in found


def test_models_uploads_and_memory(folder: Path) -> None:
    (folder / "notes.txt").touch()
    bad = config(
        {"models": {"roots": [str(folder), "/none"], "preload": ["notes.txt"], "uploads": str(folder / "new")}}
    )
    findings = list(engine._models(bad))
    assert [(found.check, found.state) for found in findings] == [
        ("models", "ok"),
        ("models", "fail"),
        ("preload", "fail"),
        ("uploads", "ok"),
    ]
    assert states(engine._models(config({}))) == ["warn"]
    assert states(engine._memory(config({}))) == ["ok"]
    assert states(engine._memory(config({"limits": {"store_bytes": 1 << 60}}))) == ["warn"]
    assert states(engine._disk("uploads", folder, 1 << 60)) == ["warn"]
    for below in ("notes.txt", "notes.txt/uploads"):
        (found,) = engine._disk("uploads", folder / below, 0)
        assert (found.state, found.message) == ("fail", f"{folder}/notes.txt is no folder")


def test_a_preloaded_models_file_is_told_of(folder: Path) -> None:
    read_golden("quantised/krea2_int8_convrot").save(folder / "krea.safetensors")
    given = config({"models": {"roots": [str(folder)], "preload": ["krea.safetensors"]}})
    (found,) = [each for each in engine._models(given) if each.check == "preload"]
    assert found.state == "ok"
    assert re.fullmatch(r"krea\.safetensors: \d+ weights in int8_convrot, [0-9.]+ \wi?B on each device", found.message)


def test_the_operators_page_explains_every_line() -> None:
    text = OPERATIONS.read_text()
    table = text[text.index("## Doctor") : text.index("## Troubleshooting")]
    explained = set(re.findall(r"`([^`]+)`", "".join(re.findall(r"^\|(.*?)\|", table, re.MULTILINE))))
    for module in (doctor, engine, devices):
        source = Path(str(module.__file__)).read_text()
        checks = set(re.findall(r"(?:ok|warn|fail|_disk)\(\"([^\"]+)\"", source))
        assert checks <= explained, checks - explained


# --- a ComfyUI whose networks run -------------------------------------------------------------------------------------


def test_a_comfyui_with_all_that_it_needs() -> None:
    assert list(engine._comfyui(config({}))) == []
    (found,) = engine._comfyui(config({"comfyui": {"path": str(COMFYUI)}}))
    assert found.state == "ok"
    assert re.fullmatch(rf"{COMFYUI}: version 0\.0\.1 \([0-9a-f]{{8}}\)", found.message)


def test_a_comfyui_that_lacks_packages(tmp_path: Path) -> None:
    path = changed(tmp_path, "requirements.txt", "einops", "comfy-kitchen==99.1\ntqdm<0.1")
    (found,) = engine._comfyui(config({"comfyui": {"path": str(path)}}))
    assert found.state == "fail"
    assert "its networks need comfy-kitchen==99.1, tqdm<0.1, which the daemon's Python lacks" in found.message
    assert f"`{sys.executable} -m pip install 'comfy-kitchen==99.1' 'tqdm<0.1'`" in found.advice


def test_a_folder_that_is_no_comfyui(tmp_path: Path) -> None:
    (found,) = engine._comfyui(config({"comfyui": {"path": str(tmp_path)}}))
    assert found.state == "fail"
    assert "has no comfy/model_detection.py" in found.message
