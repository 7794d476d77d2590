"""What the tests share: a tacod of one's own, tiny models, and ComfyUI's golden forwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
import zmq
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from warm_tacod import WarmTacod, daemon_environment, warm_tacods

import tacod
from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.group.fork_server import MODULE
from tacod.rank.arguments import check_arguments, load_arguments
from tacod.rank.families import detect
from tacod.rank.families.base import DiT, Output
from tacod.rank.families.control import Control
from tacod.rank.families.inputs import Inputs
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.load import load_model
from tacod.rank.weights.unfilled import Unfilled
from tacod_client import Client, Job, Model, ModelNotFound, wire
from tacod_client.errors import ConnectionFailed
from tacod_client.exchange import pack
from tacod_client.tensors import to_wire

GOLDEN = Path(__file__).parent / "data" / "golden"
"""What a real ComfyUI computed; its README says how."""
FP32 = 2e-6
"""How far a fp32 forward may be from the exact one, at any number of ranks."""
SOON_S = 2.0
"""What is at once, on a busy machine too."""
START_S = 90.0
"""Ranks start in about 5 s; a busy machine may take longer."""
OFTEN = {"group.max_restarts": 1000, "group.restart_window_s": 0.001}
"""Settings with which ranks that are lost are replaced at once, each time.

Many restarts in a short time would be spaced out more and more; with these, each is the first of its window.
"""


def eventually(condition: Callable[[], Any], timeout_s: float, what: str, every_s: float = 0.02) -> Any:
    """Poll until the condition holds, and return what it came to."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(every_s)
    return value


def answered(socket: zmq.Socket[bytes], timeout_s: float) -> wire.Message:
    """The next answer to a client that has no library, past the daemon's signs of life."""
    while socket.poll(int(timeout_s * 1000)):
        message = wire.decode(socket.recv_multipart())
        if message.type != "alive":
            return message
    raise AssertionError(f"no answer within {timeout_s:g} s")


# --- the daemon -------------------------------------------------------------------------------------------------------


class Daemon:
    """A tacod of one's own, in a folder of its own; at its end it must have left nothing behind.

    Settings are configuration keys such as ``{"limits.queue": 2}``; ``sections`` is TOML that comes after them. With
    ``gpus`` the ranks are on as many of the GPUs that CUDA_VISIBLE_DEVICES shows. Several numbers of ``ranks`` are of
    as many groups, ``gpus`` too, and settings of ``group`` are then of each. It is forked from a process that has
    imported what it needs (`warm_tacod`), unless it is started in an environment, in a folder or by a command of its
    own, or on GPUs; or is to be ``cold``.
    """

    def __init__(
        self,
        ranks: int | Sequence[int] = 1,
        roots: Sequence[Path] = (),
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        gpus: int | Sequence[int] = 0,
        sections: str = "",
        wait: bool = True,
        cold: bool = False,
    ) -> None:
        # A unix socket's path may have about 100 bytes: pytest's own folders are too deep.
        self.folder = Path(tempfile.mkdtemp(prefix="tacod-"))
        self.socket = self.folder / "tacod.sock"
        self.endpoint = f"ipc://{self.socket}"
        self.log_path = self.folder / "log"
        self.config = self.folder / "config.toml"
        values = {"endpoint": self.endpoint, "models.roots": [str(root) for root in roots], **(settings or {})}
        groups = _on_gpus(gpus) if gpus else _on_cpu(ranks)
        self._groups, self._cold = len(groups), cold or bool(gpus)
        if len(groups) == 1:
            values = {**groups[0], **values}
        else:
            of_each = {key: values.pop(key) for key in list(values) if key.startswith("group.")}
            sections = "".join(f"[[group]]\n{_lines({**group, **of_each}, 'group.')}" for group in groups) + sections
        self.config.write_text(_lines(values) + sections)
        self.waits = wait
        self.environment = daemon_environment(environment)
        self.wrapper: Sequence[str] = ()
        """A command that runs the daemon's, which comes behind it."""
        self.start_folder: Path | None = None
        """Where it is started; where the tests run, if it isn't said."""
        self.process: subprocess.Popen[bytes] | WarmTacod | None = None
        self._shared_memory = shared_memory()

    def __enter__(self) -> Daemon:
        try:
            return self.start(self.waits)
        except BaseException:
            self._clean_up()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None and self.running:
                self.stop()
        finally:
            self._clean_up()

    def start(self, wait: bool = True) -> Daemon:
        """Start it, again if need be, and wait until it is ready."""
        assert not self.running
        arguments = ["--config", str(self.config)]
        cold = self._cold or self.wrapper or self.start_folder is not None
        with self.log_path.open("ab") as log:
            if not cold and (warm := warm_tacods()).serves(self.environment):
                self.process = warm.start(arguments, self.environment, log.fileno(), self._groups)
            else:
                self.process = subprocess.Popen(
                    [*self.wrapper, sys.executable, "-m", "tacod.daemon", *arguments],
                    cwd=self.start_folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self.environment,
                )
        if wait:
            # Each look is a client of its own, whose work the start would have to wait for.
            eventually(self._is_ready, START_S, "tacod is ready", every_s=0.1)
        return self

    def _is_ready(self) -> bool:
        assert self.running, f"tacod ended with {self.code}:\n{self.log}"
        if self.socket.exists():
            with suppress(ConnectionFailed), self.client(timeout_s=1.0) as client:
                return bool(client.status()["state"] == "ready")
        return False

    @contextmanager
    def changed(self, settings: Mapping[str, Any], sections: str = "") -> Iterator[None]:
        """Within, some settings are others, by a reload: far quicker than a daemon of one's own."""
        text = self.config.read_text()
        rest = [line for line in text.splitlines(keepends=True) if line.partition(" = ")[0] not in settings]
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
        self._reload("".join(lines + rest) + sections)
        try:
            yield
        finally:
            if self.running:
                self._reload(text)

    def empty(self) -> None:
        """Unload all models, and see that what clients sent for them is gone from the store, too."""
        # It shrinks when something new comes: a context that no test has.
        with self.changed({"limits.store_bytes": 5000}), self.client() as client:
            FLUX.check(client.load(FLUX.file), seed=time.time_ns())
            for told in client.models():
                with suppress(ModelNotFound):  # patched models go with the one that they are made of
                    client.unload(told["id"])

    def _reload(self, config: str) -> None:
        self.config.write_text(config)
        with self.client() as admin:
            admin.reload()

    def client(self, **options: Any) -> Client:
        """A client of it."""
        return Client(self.endpoint, **options)

    @property
    def pid(self) -> int:
        """The supervisor's."""
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        """What it and its ranks have printed so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether the supervisor lives."""
        return self.process is not None and self.process.poll() is None

    @property
    def code(self) -> int | None:
        """The supervisor's exit code, once it has ended."""
        return self.process.returncode if self.process is not None else None

    def rank_pids(self) -> list[int]:
        """The ranks' processes, in the order of ranks."""
        with self.client() as client:
            return [rank["pid"] for rank in client.status()["group"]["ranks"]]

    def fork_server(self) -> psutil.Process | None:
        """What its ranks are forked from, if it runs now."""
        return next((each for each in self.processes() if MODULE in each.cmdline()), None)

    def processes(self) -> list[psutil.Process]:
        """Everything that runs and has this folder on its command line: supervisor, fork server, ranks of any age."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                mine = any(str(self.folder) in argument for argument in process.cmdline())
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def signal(self, number: int) -> None:
        """Send the supervisor a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for its end; returns the exit code."""
        assert self.process is not None
        return self.process.wait(timeout_s)

    def stop(self) -> None:
        """End it as systemd would, and see what it leaves."""
        self.signal(signal.SIGTERM)
        assert self.wait() == 0, self.log
        self.check_leavings()

    def check_leavings(self) -> None:
        """After its end: no process, no socket, no lock, no folder, no shared memory."""
        assert not self.running
        left = [f"{process.pid}: {' '.join(process.cmdline())}" for process in self.processes()]
        assert not left, f"processes left: {left}"
        files = sorted(path.name for path in self.folder.iterdir() if path not in (self.config, self.log_path))
        assert not files, f"files left: {files}"
        # What other programs make there while this runs goes away again; what this one leaves doesn't.
        eventually(lambda: shared_memory() <= self._shared_memory, 10, "its shared memory is gone")

    def _clean_up(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.folder)


def package_with(family: Path, folder: Path) -> Path:
    """A folder with a package `tacod` that has one more family, in this file: a `Daemon.start_folder`."""
    shutil.copytree(Path(tacod.__file__).parent, folder / "tacod", copy_function=os.symlink)
    (folder / "tacod" / "rank" / "families" / family.name).symlink_to(family)
    return folder


def _lines(values: Mapping[str, Any], within: str = "") -> str:
    """Settings as TOML, within a table of this name."""
    return "".join(f"{key.removeprefix(within)} = {json.dumps(value)}\n" for key, value in values.items())


def _on_gpus(counts: int | Sequence[int]) -> list[dict[str, Any]]:
    """Groups on so many GPUs each; paces are not measured, as other tests use the GPUs at the same time."""
    gpus = iter(_visible_gpus())
    counts = [counts] if isinstance(counts, int) else counts
    return [
        {"group.device": "cuda", "group.gpus": [next(gpus) for _ in range(count)], "group.shares": [1] * count}
        for count in counts
    ]


def _on_cpu(ranks: int | Sequence[int]) -> list[dict[str, Any]]:
    counts = [ranks] if isinstance(ranks, int) else ranks
    return [{"group.device": "cpu", "group.ranks": count} for count in counts]


def _visible_gpus() -> list[int]:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [int(gpu) for gpu in shown.split(",")] if shown else list(range(torch.cuda.device_count()))


def shared_memory(users: Sequence[psutil.Process] = ()) -> set[str]:
    """Names under /dev/shm of what PyTorch, NCCL and Python make there, and only these processes use, or none.

    Other programs make and use such, too.
    """
    made = ("torch_", "nccl-", "psm_", "sem.")
    names = {}
    for path in Path("/dev/shm").iterdir():
        with suppress(FileNotFoundError):
            if path.name.startswith(made):
                names[path.stat().st_ino] = path.name
    mine = {user.pid for user in users}
    for folder in Path("/proc").glob("[0-9]*") if names else ():
        if int(folder.name) not in mine:
            with suppress(OSError):
                # By number: a semaphore is mapped before it gets its name.
                for line in (folder / "maps").read_text().splitlines():
                    if "/dev/shm/" in line:
                        names.pop(int(line.split()[4]), None)
    return set(names.values())


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Within, a process stands still."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


# --- models -----------------------------------------------------------------------------------------------------------


def relative_error(out: Output, expected: Output) -> float:
    """||out - expected|| / ||expected||; of several tensors the largest."""
    if isinstance(out, list):
        return max(relative_error(*each) for each in zip(out, expected, strict=True))
    if isinstance(expected, list):
        # A client gives one tensor for a list of one latent.
        (expected,) = expected
    assert out.shape == expected.shape
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def assert_same_model(loaded: torch.nn.Module, model: torch.nn.Module, out: Output, expected: Output) -> None:
    """Two models have the same parameters to the bit, and forwards of them are the same.

    Their weights lie at other addresses, by which a CPU's sums may have another order.
    """
    weights, others = dict(loaded.named_parameters()), dict(model.named_parameters())
    assert weights.keys() == others.keys()
    assert [key for key, each in weights.items() if not torch.equal(each, others[key])] == []
    assert relative_error(out, expected) <= FP32


@dataclass(frozen=True)
class Tiny:
    """A small model with random weights, whose one-process output is what the daemon must give."""

    name: str
    config: dict[str, Any]
    seed: int = 0

    @property
    def file(self) -> str:
        """Its name under the models' root."""
        return f"{self.name}.safetensors"

    @cached_property
    def model(self) -> DiT:
        """The module, always with the same weights."""
        family, config = detect({}, self.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return family(config).eval().requires_grad_(False)

    def save(self, folder: Path) -> Path:
        """Write it as a file that describes itself."""
        path = folder / self.file
        save_file(self.model.state_dict(), path, metadata={"tacod.config": json.dumps(self.config)})
        return path

    def inputs(self, seed: int = 0, batch: int = 1, text: int = 129, size: tuple[int, int] = (9, 14)) -> dict[str, Any]:
        """A forward's arguments; the text is long enough to travel by content."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        flux = self.config["image_model"] == "flux"
        inputs = {
            "x": randn(batch, self.config["in_channels"], *size),
            "timestep": torch.full((batch,), 0.7373 if flux else 737.3),
            "context": randn(batch, text, 8),
            "y": randn(batch, 6),
            "guidance": torch.full((batch,), 3.5),
        }
        return {name: inputs[name] for name in self.model.arguments() if name in inputs}

    def forward(self, **inputs: Any) -> Tensor:
        """One forward in this process; a ``control`` may be ComfyUI's map."""
        if isinstance(inputs.get("control"), dict):
            inputs["control"] = Control(pack(inputs["control"], "control", {}, None))
        with torch.inference_mode():
            out: Tensor = self.model(SequenceParallel(), **inputs)
        return out

    def check(self, model: Model, seed: int = 0) -> None:
        """The daemon's forward is right."""
        inputs = self.inputs(seed)
        assert relative_error(model.forward(**inputs), self.forward(**inputs)) <= FP32

    def sample(self, model: Model, steps: int, seed: int = 0, **options: Any) -> Job:
        """Start a run of so many steps."""
        inputs = self.inputs(seed)
        noise = inputs.pop("x")
        del inputs["timestep"]
        sigmas = torch.linspace(1, 0, steps + 1)
        return model.sample(noise=noise, latent=torch.zeros_like(noise), sigmas=sigmas, positive=inputs, **options)


def in_diffusers(model: DiT) -> dict[str, Tensor]:
    """A model's weights as diffusers would save them; its table of names read backwards."""
    weights, tensors = model.state_dict(), {}
    for name, place in model.names.layout({key: tensor.shape for key, tensor in weights.items()}).items():
        tensor = weights[place.key]
        if place.rows is not None:
            tensor = tensor[place.rows[0] : sum(place.rows)]
        tensors[name] = torch.cat(tensor.chunk(2)[::-1]) if place.swap else tensor.clone()
    return tensors


@contextmanager
def unharmed(client: Client) -> Iterator[Model]:
    """Within, something is refused at once; afterwards the next forward is right, and no model came or went."""
    model = client.load(FLUX.file)
    before = [told["id"] for told in client.models()]
    started = time.monotonic()
    yield model
    assert time.monotonic() - started < SOON_S
    assert [told["id"] for told in client.models()] == before
    FLUX.check(model)


FLUX = Tiny(
    "tiny_flux",
    {
        "image_model": "flux",
        "in_channels": 4,
        "out_channels": 4,
        "vec_in_dim": 6,
        "context_in_dim": 8,
        "hidden_size": 80,
        "num_heads": 5,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [4, 6, 6],
        "guidance_embed": True,
    },
)
SD3 = Tiny(
    "tiny_sd3",
    {
        "image_model": "sd3",
        "in_channels": 4,
        "depth": 3,
        "adm_in_channels": 6,
        "context_embedder_config": {"params": {"in_features": 8, "out_features": 192}},
        "pos_embed_max_size": 12,
        "qk_norm": "rms",
        "x_block_self_attn_layers": [0, 2],
    },
)


PIXART = Tiny(
    "tiny_pixart",
    {
        "image_model": "pixart_sigma",
        "in_channels": 4,
        "hidden_size": 32,
        "num_heads": 2,
        "depth": 2,
        "caption_channels": 8,
        "pe_interpolation": 1,
        "micro_condition": False,
        "model_max_length": 12,
    },
)
FILL = Tiny("tiny_fill", {**FLUX.config, "in_channels": 9})
"""Of the kind of Flux Fill: what it gives has fewer channels than its ``x``."""


@dataclass(frozen=True)
class Golden:
    """One forward that ComfyUI computed in fp32."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Any]
    out: Output
    bf16: float
    """The error that a bf16 forward may have: 1e-2, or a tenth more than ComfyUI's own has if that is more."""
    fp32: float = 2e-6
    """The error that an fp32 forward may have."""

    @property
    def batch(self) -> int:
        """How many images it is of."""
        x = self.inputs["x"]
        return len(x[0] if isinstance(x, list) else x)

    @property
    def packed(self) -> bool:
        """Whether its weights are quantized."""
        return any(name.endswith(".comfy_quant") for name in self.weights)

    def model(self, dtype: torch.dtype = torch.float32) -> DiT:
        """The model, built without memory and filled by name, as the daemon does it."""
        if self.packed:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.safetensors"
                self.save(path)
                return load_model(read_checkpoint(str(path)), dtype, torch.device("cpu"))
        shapes = {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in self.weights.items()}
        family, config = detect(shapes, self.config)
        with torch.device("meta"), Unfilled():
            model = family(config)
        weights = {family.canonical(name): tensor for name, tensor in self.weights.items()}
        weights = {name: tensor.to(model.dtype_of(name, dtype)) for name, tensor in weights.items()}
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(family.beside)}
        lacking, unknown = model.load_state_dict(weights, strict=False, assign=True)
        assert not unknown
        assert set(lacking) <= {name for name, _ in model.named_buffers()}, "no forward looks at buffers"
        return model.eval().requires_grad_(False)

    def arguments(self, model: DiT) -> Inputs:
        """The forward's arguments, as a client sends them and a rank of this model reads them."""

        def sent(value: Any) -> Any:
            if isinstance(value, list):
                return list(map(sent, value))
            if isinstance(value, dict):
                return {name: sent(each) for name, each in value.items()}
            return to_wire(value, "argument") if isinstance(value, Tensor) else value

        given, specs = {key: sent(value) for key, value in self.inputs.items()}, model.arguments()
        check_arguments(given, specs, model.family)
        return model.prepare(load_arguments(given, specs, model.dtype, torch.device("cpu")))

    def error(self, sequence: SequenceParallel, dtype: torch.dtype = torch.float32) -> float:
        """How far one forward of ours is from ComfyUI's."""
        model = self.model(dtype)
        with torch.inference_mode():
            out = model.run(sequence, self.arguments(model))
        assert {each.dtype for each in (out if isinstance(out, list) else [out])} == {dtype}
        return relative_error(out, self.out)

    def save(self, path: Path) -> None:
        """Write the model as a file that describes itself."""
        save_file(self.weights, path, metadata={"tacod.config": json.dumps(self.config)})


def golden_names() -> list[str]:
    """The golden forwards that there are, of every family."""
    return sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


def quantized_golden_names() -> list[str]:
    """The golden forwards of whole quantized models."""
    return sorted(f"quantised/{path.stem}" for path in (GOLDEN / "quantised").glob("[!q]*.safetensors"))


def read_golden(name: str) -> Golden:
    """A golden forward. Weights that are stored in 8 bits come in bf16, which holds them, but for packed ones."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {key.removeprefix("weights."): each for key, each in tensors.items() if key.startswith("weights.")}
    fp32 = 2e-6
    if "quantised" in metadata:
        # A last bit may move an activation by a step of int8, and what follows with it.
        jumps = float(metadata["rounding"])
        fp32 = 1e-5 if jumps < 1e-5 else min(1.5 * jumps, 0.7 * float(metadata["error_dequantised"]))
    else:
        weights = {key: each.to(torch.bfloat16) if each.itemsize == 1 else each for key, each in weights.items()}
    inputs: dict[str, Any] = _filled(json.loads(metadata.get("args", "{}")), tensors)
    lists: dict[str, list[Tensor]] = {}
    for key, value in sorted(tensors.items()):
        name, _, number = key.removeprefix("in.").partition(".")
        if number.isdigit():
            lists.setdefault(name, []).append(value)
        elif key.startswith("in.") and not number:
            inputs[name] = value
    out = tensors["out"] if "out" in tensors else lists.pop("out")
    bf16 = max(1e-2, 1.1 * float(metadata.get("bf16", 0)))
    return Golden(json.loads(metadata["config"]), weights, {**inputs, **lists}, out, bf16, fp32)


def _filled(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Arguments with the tensors that they name in place of their names."""
    if isinstance(value, dict):
        return {key: _filled(each, tensors) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, tensors) for each in value]
    return tensors[value[1:]] if isinstance(value, str) and value.startswith("@") else value


def animas_text() -> tuple[dict[str, Tensor], Tensor]:
    """What Anima's ``preprocess_text_embeds`` gets in its golden, and what came out."""
    with safe_open(GOLDEN / "anima.safetensors", "pt") as file:
        text, ids, weights = (file.get_tensor(f"pre.{name}") for name in ("cross_attn", "t5xxl_ids", "t5xxl_weights"))
        out = file.get_tensor("in.context")
    return {"context": text, "t5xxl_ids": ids[None], "t5xxl_weights": weights[None, :, None]}, out


class Interrupted(Exception):
    """What a client's `on_wait` raises in tests, as ComfyUI's does after a click on Cancel."""


class Interruption:
    """An `on_wait` that raises `Interrupted` once it is ``armed``."""

    def __init__(self) -> None:
        self.armed = threading.Event()

    def __call__(self) -> None:
        """Called by a client that waits."""
        if self.armed.is_set():
            raise Interrupted
