"""The configuration: checked whole, every error as ``file:key: reason``, and printed so that it can be read back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from tacod.config import I_KNOW, Config, ConfigError, Fault, Group, load_config, to_toml
from tacod.group.processes import devices
from tacod.shares import EQUAL, Shares

Load = Callable[[str], Config]
NO_ZEROS = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
"""What a path may hold."""


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Read a configuration with this text."""
    path = tmp_path / "config.toml"

    def load(text: str) -> Config:
        path.write_text(text)
        return load_config(path)

    return load


def test_empty_file_gives_the_defaults(load: Load) -> None:
    config = load("")
    assert config == Config()
    assert config.endpoint == "ipc:///run/tacod/tacod.sock"
    assert config.socket_path == Path("/run/tacod/tacod.sock")
    assert (config.groups[0].device, config.groups[0].gpus, config.groups[0].retries) == ("cuda", None, 2)
    assert (config.models.roots, config.models.preload) == ([], [])


def test_values_are_taken(load: Load) -> None:
    config = load(
        """
        endpoint = "ipc:///tmp/t.sock"
        heartbeat_s = 2
        [group]
        gpus = [3, 4, "GPU-b5"]
        step_timeout_s = 7.5
        [models]
        roots = ["/models"]
        preload = ["flux.safetensors"]
        [limits]
        queue = 3
        """
    )
    assert config.groups[0].gpus == [3, 4, "GPU-b5"]
    assert (config.heartbeat_s, config.groups[0].step_timeout_s, config.limits.queue) == (2.0, 7.5, 3)
    assert (config.models.roots, config.models.preload) == (["/models"], ["flux.safetensors"])


def test_shares_are_auto_or_one_for_each_rank(load: Load) -> None:
    assert Config().groups[0].asked_shares is None
    group = load("[group]\ngpus = [0, 1, 2]\nshares = [4, 2, 2]\n").groups[0]
    assert group.asked_shares == Shares((2, 1, 1))
    assert load("[group]\ngpus = [0, 1]\nshares = [3, 3]\n").groups[0].asked_shares == EQUAL
    # How many GPUs there are is known at the start.
    assert load("[group]\nshares = [2, 1]\n").groups[0].shares == [2, 1]


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().limits.queue = 1  # type: ignore[misc]


FAULTS = {
    'endpoint = "tcp://127.0.0.1:5555"': "endpoint: TCP needs CURVE keys and an allow-list",
    'endpoint = "/run/tacod.sock"': "endpoint: expected ipc:///absolute/path",
    'endpoint = "ipc://tacod.sock"': "endpoint: expected ipc:///absolute/path",
    'endpoint = "ipc:///"': "endpoint: expected ipc:///absolute/path",
    'endpoint = "ipc:///run/"': "endpoint: expected ipc:///absolute/path",
    'endpoint = "ipc:///run/a\\u0000b"': "endpoint: expected ipc:///absolute/path",
    'endpoint = "inproc://tacod"': "endpoint: expected ipc:///absolute/path",
    f'endpoint = "ipc:///{"x" * 107}"': "endpoint: the socket's path is longer than the 107 bytes",
    f'endpoint = "ipc:///{"ä" * 54}"': "endpoint: the socket's path is longer than the 107 bytes",
    "endpoint = 3": "endpoint: Input should be a valid string",
    'heartbeat_s = "5"': "heartbeat_s: Input should be a valid number",
    "heartbeat_s = 0": "heartbeat_s: Input should be greater than or equal to 0.01",
    "heartbeat_s = inf": "heartbeat_s: Input should be",
    "heartbeat_s = 1e300": "heartbeat_s: Input should be less than or equal to 3600",
    "drain_timeout_s = -1": "drain_timeout_s: Input should be greater than 0",
    "drain_timeout_s = inf": "drain_timeout_s: Input should be a finite number",
    "drain_timeout_s = nan": "drain_timeout_s: Input should be",
    'log_level = "INFO"': "log_level: Input should be 'debug', 'info', 'warning' or 'error'",
    f'[testing]\ni_know = "{I_KNOW}"\n[[testing.faults]]\nkind = "exit"\ngroup = "b"': (
        "testing.faults: no group is named 'b'; there are 0"
    ),
    "group = []": "group: expected a table, [group], or several",
    "group = [3]": "group.0: Input should be a valid dictionary",
    "[[group]]\ngpus = [0]\n[[group]]": "group: group '1' has no gpus; with several groups, each must name its own",
    "[[group]]\ngpus = [0, 1]\n[[group]]\ngpus = [2, 1]": "group: group '1': GPU 1 is in group '0' too; leave it",
    '[[group]]\ngpus = [0]\n[[group]]\ndevice = "cpu"': "group: all groups must have the same device",
    '[[group]]\ngpus = [0]\n[[group]]\nname = "0"\ngpus = [1]': "group: 2 groups are named '0'",
    '[[group]]\nname = "a"\ngpus = [0]\n[[group]]\ngpus = [1]\ncolour = 1': "group.1.colour: unknown key",
    '[[group]]\nname = "a"\ngpus = [-1]\n[[group]]\ngpus = [1]': "group.a.gpus.0: Input should be greater than",
    '[group]\nname = ""': "group.name: expected 1 to 32 letters, digits, - and _, got ''",
    '[group]\nname = "a.b"': "group.name: expected 1 to 32 letters, digits, - and _, got 'a.b'",
    '[group]\nname = "a\\n"': "group.name: expected 1 to 32 letters, digits, - and _",
    "group = 3": "group: expected a table, [group], or several, [[group]]",
    '[group]\ndevice = "tpu"': "group.device: Input should be 'cuda' or 'cpu'",
    "[group]\ngpus = []": "group: gpus must name each device once, and at least one",
    "[group]\ngpus = [3, 3]": "group: gpus must name each device once, and at least one",
    "[group]\ngpus = 3": "group.gpus: Input should be a valid list",
    "[group]\ngpus = [-1]": "group.gpus.0: Input should be greater than or equal to 0",
    "[group]\ngpus = [0, true]": "group.gpus.1: Input should be a valid integer",
    '[group]\ndevice = "cpu"\ngpus = [0]': 'group: gpus is for device = "cuda"; on "cpu" set ranks',
    "[group]\nranks = 3": 'group: ranks is for device = "cpu"',
    '[group]\ndevice = "cpu"\nranks = 0': "group.ranks: Input should be greater than 0",
    '[group]\ndevice = "cpu"\nranks = 65': "group.ranks: Input should be less than or equal to 64",
    '[group]\ndevice = "cpu"\nranks = true': "group.ranks: Input should be a valid integer",
    '[group]\nshares = "fast"': 'group.shares: expected "auto" or a whole number from 1 to 1000 for each rank',
    "[group]\nshares = []": "group.shares: expected",
    "[group]\nshares = 2": "group.shares: expected",
    "[group]\nshares = [2, 0]": "group.shares: expected",
    "[group]\nshares = [2, 1001]": "group.shares: expected",
    "[group]\nshares = [true, 1]": "group.shares: expected",
    "[group]\nshares = [1.5, 1]": "group.shares: expected",
    "[group]\ngpus = [0, 1, 2]\nshares = [2, 1]": "group: shares: expected a number for each of 3 ranks, got 2",
    '[group]\ndevice = "cpu"\nshares = [2, 1]': "group: shares: expected a number for each of 1 ranks",
    "[group]\nretries = -1": "group.retries: Input should be greater than or equal to 0",
    "[group]\nstep_timeout_s = 0": "group.step_timeout_s: Input should be greater than 0",
    '[models]\nroots = ["models"]': "models.roots.0: expected an absolute path, got 'models'",
    '[models]\nroots = ["/a\\u0000b"]': "models.roots.0: expected an absolute path",
    '[models]\nuploads = "/a\\u0000b"': "models.uploads: expected an absolute path",
    '[models]\nroots = "/models"': "models.roots: Input should be a valid list",
    '[curve]\nlisten = "tcp://0.0.0.0:5555"': "curve.secret_key: required: TCP is for clients with CURVE keys",
    '[curve]\nlisten = "tcp://0.0.0.0:5555"\nsecret_key = "/k"': "curve.clients: required: TCP is for clients",
    '[curve]\nlisten = "0.0.0.0:5555"': 'curve.listen: expected "tcp://0.0.0.0:5555"',
    '[curve]\nlisten = "tcp://*:5555"': 'curve.listen: expected "tcp://0.0.0.0:5555"',
    '[curve]\nlisten = "tcp://localhost:5555"': 'curve.listen: expected "tcp://0.0.0.0:5555"',
    '[curve]\nlisten = "tcp://127.0.0.1:0"': "curve.listen: port 0",
    '[curve]\nlisten = "tcp://[::1]:5555"\nsecret_key = "key"': "curve.secret_key: expected an absolute path",
    "[limits]\nqueue = 0": "limits.queue: Input should be greater than 0",
    "[limits]\nqueue = 1.5": "limits.queue: Input should be a valid integer",
    "[limits]\nstore_bytes = 9223372036854775808": "limits.store_bytes: Input should be less than",
    "[limits]\nmessage_bytes = 0": "limits.message_bytes: Input should be greater than 0",
    '[metrics]\nlisten = "0.0.0.0:9464"': "metrics: 0.0.0.0:9464 can be reached from other machines",
    '[metrics]\nlisten = "[::]:9464"': "metrics: [::]:9464 can be reached from other machines",
    '[metrics]\nlisten = "localhost:9464"': 'metrics.listen: expected "127.0.0.1:9464"',
    '[metrics]\nlisten = "::1:9464"': 'metrics.listen: expected "127.0.0.1:9464"',
    '[metrics]\nlisten = "[::1%lo]:9464"': 'metrics.listen: expected "127.0.0.1:9464"',
    '[metrics]\nlisten = "9464"': 'metrics.listen: expected "127.0.0.1:9464"',
    '[metrics]\nlisten = "127.0.0.1:"': 'metrics.listen: expected "127.0.0.1:9464"',
    '[metrics]\nlisten = "127.0.0.1:65536"': "metrics.listen: port 65536 is none of 0 to 65535",
    '[metrics]\nlisten = "unix:metrics.sock"': "metrics.listen: expected unix:/absolute/path",
    f'[metrics]\nlisten = "unix:/{"x" * 107}"': "metrics.listen: expected unix:/absolute/path",
    '[comfyui]\npath = "ComfyUI"': "comfyui.path: expected an absolute path, got 'ComfyUI'",
    "[comfyui]\nfolder = 3": "comfyui.folder: unknown key",
    "colour = 1": "colour: unknown key; `tacod --print-config` shows the known ones",
    "[group]\ncolour = 1": "group.colour: unknown key",
    "[colours]\nred = 1": "colours: unknown key",
}


@pytest.mark.parametrize("text", FAULTS)
def test_every_fault_is_told_by_file_key_and_reason(load: Load, tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{tmp_path}/config.toml:{FAULTS[text]}")


@pytest.mark.parametrize(
    "text",
    [
        'listen = "127.0.0.1:9464"',
        'listen = "127.9.9.9:0"',
        'listen = "[::1]:9464"',
        'listen = "unix:/run/tacod/metrics.sock"',
        'listen = "0.0.0.0:9464"\nallow_remote = true',
    ],
)
def test_metrics_listen_on_loopback_a_unix_socket_or_where_it_is_allowed(load: Load, text: str) -> None:
    listen = load("[metrics]\n" + text).metrics.listen
    assert f'listen = "{listen}"' in text


def test_metrics_are_off_by_default(load: Load) -> None:
    assert load("").metrics.listen is None


def test_all_faults_are_told_at_once(load: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load("colour = 1\nheartbeat_s = 0\n[limits]\nqueue = 0\n")
    keys = [line.split(": ")[0].split("config.toml:")[1] for line in str(caught.value).splitlines()]
    assert sorted(keys) == ["colour", "heartbeat_s", "limits.queue"]


@pytest.mark.parametrize("text", ["endpoint = ", "[group", "a = 1\na = 2", "endpoint = 'ipc:///x"])
def test_what_is_no_toml_is_told_with_its_place(load: Load, text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml: not TOML: .*(line|end of document)"):
        load(text)


def test_binary_file_is_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"config\.toml: not TOML"):
        load_config(path)


def test_missing_file_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file or directory; pass --config FILE"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = " + "9" * 5000, r"not TOML: .*4300 digits.*"),
        ("a = " + "[" * 100_000, "its arrays or tables are nested too deep; no key needs that"),
        ("a = " + "{a = " * 100_000, "its arrays or tables are nested too deep; no key needs that"),
        ("# " * (1 << 20), r"Larger than 1\.0 MiB; pass --config FILE"),
    ],
    ids=["number", "arrays", "tables", "size"],
)
def test_what_python_cannot_read_is_a_fault_as_any_other(load: Load, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.toml: {reason}$"):
        load(text)


@pytest.mark.timeout(30)
def test_a_pipe_and_a_device_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ConfigError, match=f"^{path}: Not a regular file; pass --config FILE$"):
            load_config(path)


def numbers(section: type[BaseModel]) -> list[str]:
    """The keys of a section that a whole number may be given for."""
    return [name for name, known in section.model_fields.items() if "int" in str(known.annotation)]


def test_a_number_of_any_length_is_a_fault_as_any_other(load: Load) -> None:
    known = {"": Config, "group": Group, **{name: type(getattr(Config(), name)) for name in ("models", "limits")}}
    long = "0x" + "F" * 5000
    keys = [(name, key) for name, section in known.items() for key in numbers(section)]
    assert len(keys) > 10
    for name, key in keys:
        for value in (long, f"[{long}]"):
            with pytest.raises(ConfigError, match=rf"config\.toml:{name}"):
                load(f"[{name}]\n{key} = {value}\n" if name else f"{key} = {value}\n")


def test_defaults_come_back_from_their_toml(load: Load) -> None:
    assert load(to_toml(Config())) == Config()


def test_cpu_configuration_comes_back_from_its_toml(load: Load) -> None:
    config = load('[group]\ndevice = "cpu"\nranks = 3\n')
    assert load(to_toml(config)) == config


TABLES = ("models", "limits", "comfyui", "metrics")


def test_toml_shows_every_key() -> None:
    text = to_toml(Config.model_validate({"group": {"device": "cpu"}}))
    shown = {line.removeprefix("# ").split()[0] for line in text.splitlines() if line and line[0] != "["}
    sections = [Config, Group, *(type(getattr(Config(), name)) for name in TABLES)]
    keys = {key for section in sections for key in section.model_fields}
    assert keys - shown == {"groups", *TABLES, "gpus"}


SEVERAL = """
[[group]]
name = "large"
gpus = [0, 1, 2]
max_restarts = 1
[[group]]
gpus = [3, "GPU-b5"]
step_timeout_s = 7.5
"""


def test_several_groups_have_names_and_settings_of_their_own(load: Load) -> None:
    config = load(SEVERAL)
    assert [(group.name, group.gpus) for group in config.groups] == [("large", [0, 1, 2]), ("1", [3, "GPU-b5"])]
    assert [(group.max_restarts, group.step_timeout_s) for group in config.groups] == [(1, 120.0), (5, 7.5)]
    assert config.group("1") is config.groups[1]
    assert load(to_toml(config)) == config


def test_one_group_of_an_array_is_a_group(load: Load) -> None:
    one = load('[[group]]\ndevice = "cpu"\nranks = 2\n')
    assert one == load('[group]\ndevice = "cpu"\nranks = 2\n')
    assert "[group]\n" in to_toml(one)


def test_groups_on_cpus_have_ranks_of_their_own(load: Load) -> None:
    config = load('[[group]]\ndevice = "cpu"\nranks = 2\n[[group]]\ndevice = "cpu"\n')
    assert devices(config.groups) == [["cpu:0", "cpu:1"], ["cpu:2"]]
    assert load(to_toml(config)) == config


UUIDS = ["GPU-a0", "GPU-b1", "GPU-c2"]


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a driver that shows three GPUs."""
    pynvml = pytest.importorskip("pynvml")
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(UUIDS))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", UUIDS.__getitem__)


@pytest.mark.usefixtures("three_gpus")
def test_gpus_are_found_by_index_and_by_uuid() -> None:
    def of(*gpus: list[int | str]) -> list[list[str]]:
        return devices(Config.model_validate({"group": [{"gpus": each} for each in gpus]}).groups)

    assert devices(Config().groups) == [["0", "1", "2"]]
    assert of([2, 0], ["GPU-b1"]) == [["2", "0"], ["GPU-b1"]]
    with pytest.raises(ConfigError, match=r"group '1': GPU 'GPU-c2' is in group '0' too .there 2.; leave it to one"):
        of([2, 0], ["GPU-c2"])
    with pytest.raises(ConfigError, match=r"group\.1\.gpus: no GPU 7; nvidia-smi shows 0 to 2"):
        of([0], [7])
    with pytest.raises(ConfigError, match=r"group: group '0' has GPU 'GPU-a0' twice .also as 0.; name it once"):
        of([0, "GPU-a0"])


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize("gpus", [None, [3, 4, 5], ["GPU-a0"]])
def test_a_driver_without_gpus_is_refused(gpus: list[int | str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pynvml.nvmlDeviceGetCount", lambda: 0)
    with pytest.raises(ConfigError, match=r'^group\.gpus: the driver shows no GPU; .* set group\.device = "cpu"$'):
        devices(Config.model_validate({"group": {"gpus": gpus}}).groups)


@pytest.mark.usefixtures("three_gpus")
def test_a_gpu_that_is_not_there_is_told_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pynvml.nvmlDeviceGetCount", lambda: 1)
    with pytest.raises(ConfigError, match=r"^group\.gpus: no GPU 3; nvidia-smi shows 0 alone$"):
        devices(Config.model_validate({"group": {"gpus": [0, 3]}}).groups)


@pytest.mark.usefixtures("three_gpus")
def test_a_gpu_that_is_lost_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def lost(handle: int) -> str:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lost)
    with pytest.raises(ConfigError, match=r"^group\.gpus: the driver can't tell which GPUs there are .GPU is lost"):
        devices(Config().groups)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    roots=st.lists(st.text(NO_ZEROS, max_size=20).map(lambda text: f"/{text}"), max_size=3), gpu=st.text(max_size=10)
)
def test_any_text_comes_back_from_its_toml(tmp_path: Path, roots: list[str], gpu: str) -> None:
    config = Config.model_validate({"models": {"roots": roots}, "group": {"gpus": [0, gpu]}})
    path = tmp_path / "config.toml"
    path.write_bytes(to_toml(config).encode())
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"kind": "slow", "block": 2}, 'block is for when = "block" alone'),
        ({"kind": "slow", "when": "block", "at": "load"}, "there are none in load"),
        ({"kind": "slow", "when": "block", "at": "call"}, "there are none in call"),
    ],
)
def test_a_fault_that_would_never_happen_is_refused(fault: dict[str, Any], told: str) -> None:
    Fault.model_validate({"kind": "slow", "when": "block", "block": 2})
    with pytest.raises(ValidationError, match=told):
        Fault.model_validate(fault)
