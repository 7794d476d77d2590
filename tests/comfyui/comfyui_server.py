"""A real ComfyUI of one's own, started as a user would and driven over its HTTP and WebSocket API."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from helpers import eventually
from safetensors.torch import load_file
from websockets.sync.client import connect

PATH = os.environ.get("COMFYUI_PATH", "")
"""The checkout of ComfyUI."""
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
"""An interpreter that can run it; ours needs none of its packages."""
HERE = Path(__file__).parent
NODES = HERE.parents[1] / "comfy_nodes"
START_S = 180.0
Graph = dict[str, dict[str, Any]]

_PREVIEW, _TEXT = 1, 3
"""Kinds of binary messages."""


@dataclass
class Outcome:
    """What became of a prompt."""

    kind: str
    """``success``, ``error`` or ``interrupted``."""
    error: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    previews: int = 0
    said: list[tuple[str, str]] = field(default_factory=list)
    """What nodes showed while they ran: node ids and texts."""
    texts: dict[str, str] = field(default_factory=dict)
    """What display nodes showed, by node id."""
    seconds: float = 0.0

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The data of all events of a kind."""
        return [event["data"] for event in self.events if event["type"] == kind]


NEWEST = (0, 33)
"""The newest ComfyUI that is tested: nothing that tests ask for is too new for it."""


@cache
def version() -> tuple[int, ...]:
    """The version of the ComfyUI in `PATH`."""
    (found,) = re.findall(r"__version__ = \"([\d.]+)\"", Path(PATH, "comfyui_version.py").read_text())
    return tuple(map(int, found.split(".")))


def has(source: str, word: str) -> bool:
    """Whether a file of this version of ComfyUI has this word; the newest must have it, or tests would be skipped."""
    path = Path(PATH, source)
    if path.exists() and word in path.read_text():
        return True
    assert version() < NEWEST, f"{source} of ComfyUI {version()} has no {word!r} any more"
    return False


@cache
def stand_ins(python: str) -> list[str]:
    """The folders of stand-ins for what an interpreter can't import."""
    folders = sorted((HERE / "stub").iterdir())
    probes = {folder: [python, "-c", f"import {folder.name}"] for folder in folders}
    return [str(folder) for folder, probe in probes.items() if subprocess.run(probe, capture_output=True).returncode]


class ComfyUI:
    """``main.py --cpu`` in a base directory of its own, with our nodes and the tests' linked into it."""

    def __init__(self, path: str, python: str, endpoint: str, models: Path, *options: str) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="comfyui-"))
        self.path, self.python, self.endpoint, self.models, self.options = path, python, endpoint, models, options
        self.on_gpu = False
        """Whether it has a GPU; else it runs on the CPU."""
        self.has_page = False
        """Whether it has its own page; most tests need none."""
        self.packs: list[Path] = []
        """Other packs of nodes that it has."""
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> ComfyUI:
        (self.base / "models").mkdir()
        for folder in ("diffusion_models", "checkpoints", "loras", "controlnet"):
            (self.models / folder).mkdir(parents=True, exist_ok=True)
            (self.base / "models" / folder).symlink_to(self.models / folder)
        (self.base / "custom_nodes").mkdir()
        (self.base / "custom_nodes" / "taco_dit").symlink_to(NODES)
        (self.base / "custom_nodes" / "taco_dit_testing").symlink_to(HERE / "pack")
        for pack in self.packs:
            (self.base / "custom_nodes" / pack.name).symlink_to(pack.resolve())
        (self.base / "page").mkdir()
        (self.base / "page" / "index.html").write_text("tests need no page")
        try:
            return self.start()
        except BaseException:
            self.stop()
            shutil.rmtree(self.base)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        shutil.rmtree(self.base)

    def start(self) -> ComfyUI:
        """Start it, again if need be."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [self.python, "main.py", "--disable-api-nodes", *([] if self.on_gpu else ["--cpu"])]
        command += ["--port", str(self.port), "--base-directory", str(self.base), "--preview-method", "latent2rgb"]
        if not self.has_page:
            command += ["--front-end-root", str(self.base / "page")]
        # By default it is in the checkout, which may be read-only or another ComfyUI's, too.
        command += ["--database-url", f"sqlite:///{self.base / 'comfyui.db'}"]
        environment = {**os.environ, "TACOD_ENDPOINT": self.endpoint, "OMP_WAIT_POLICY": "passive"}
        paths = [*stand_ins(self.python), *filter(None, [os.environ.get("PYTHONPATH")])]
        if paths:
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        with (self.base / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.options], cwd=self.path, env=environment, stdout=log, stderr=log
            )
        eventually(self._answers, START_S, "ComfyUI answers")
        return self

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"ComfyUI ended:\n{self.log}"
        with suppress(OSError):
            self.get("/system_stats")
            return True
        return False

    @property
    def log(self) -> str:
        """What its console shows."""
        return (self.base / "log").read_text(errors="replace")

    @property
    def memory_bytes(self) -> int:
        """Its process's resident memory."""
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @cached_property
    def nodes(self) -> dict[str, Any]:
        """The nodes that it has, and what they take."""
        nodes: dict[str, Any] = self.get("/object_info")
        return nodes

    def get(self, path: str) -> Any:
        """A GET of its API."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as reply:
            return json.load(reply)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """A POST to its API."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        return json.loads(text) if text else None

    def run(
        self, graph: Graph, on_event: Callable[[dict[str, Any]], None] | None = None, timeout_s: float = 300
    ) -> Outcome:
        """Queue a graph, as the page does, and wait for its end; ``on_event`` hears every message on the way."""
        client = uuid.uuid4().hex
        graph = self._filled(graph)
        outcome = Outcome("")
        with connect(f"ws://127.0.0.1:{self.port}/ws?clientId={client}", max_size=None) as page:
            started = time.perf_counter()
            queued = self.post("/prompt", {"prompt": graph, "client_id": client})
            # It runs what it can, and leaves out the rest.
            assert queued["node_errors"] == {}, queued["node_errors"]
            prompt = queued["prompt_id"]
            while not outcome.kind:
                message = page.recv(timeout=timeout_s)
                if isinstance(message, bytes):
                    kind, size = (int.from_bytes(message[at : at + 4], "big") for at in (0, 4))
                    outcome.previews += kind == _PREVIEW
                    if kind == _TEXT:
                        outcome.said.append((message[8 : 8 + size].decode(), message[8 + size :].decode()))
                    continue
                event = json.loads(message)
                outcome.events.append(event)
                if on_event is not None:
                    on_event(event)
                if event["type"].startswith("execution_") and event["data"].get("prompt_id") == prompt:
                    ending = event["type"].removeprefix("execution_")
                    outcome.kind = ending if ending in ("success", "error", "interrupted") else ""
            outcome.seconds = time.perf_counter() - started
            outcome.error = outcome.events[-1]["data"].get("exception_message", "").strip()
        # The history is written after the last message.
        history = eventually(lambda: self.get(f"/history/{prompt}").get(prompt), 10, "the prompt is in the history")
        outputs = history["outputs"]
        outcome.texts = {node: shown["text"][0] for node, shown in outputs.items() if "text" in shown}
        return outcome

    def _filled(self, graph: Graph) -> Graph:
        """The graph, and as on the page the defaults of what it leaves out."""
        filled = {}
        for name, node in graph.items():
            required = self.nodes.get(node["class_type"], {}).get("input", {}).get("required", {})
            # An input is [type] or [type, {"default": …, …}].
            settings = {key: rest[0] for key, (_, *rest) in required.items() if rest}
            defaults = {key: each["default"] for key, each in settings.items() if "default" in each}
            filled[name] = {**node, "inputs": defaults | node["inputs"]}
        return filled

    def latent(self, name: str) -> torch.Tensor:
        """What a SaveLatent node with this prefix wrote last."""
        files = sorted((self.base / "output").glob(f"{name}_[0-9][0-9][0-9][0-9][0-9]_.latent"))
        assert files, f"no latent {name!r} was saved"
        return load_file(files[-1])["latent_tensor"]
