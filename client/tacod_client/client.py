"""The client: models on the daemon's devices, used as if they were here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tacod_client.connection import Connection, Request
from tacod_client.errors import ArgumentError, ModelNotFound, TacodError
from tacod_client.tensors import from_wire, kind_of, to_wire
from tacod_client.wire import Message, Tensor

__all__ = ["Client", "Job", "Model", "ModelStats", "Progress"]

BY_CONTENT_BYTES = 4096
"""Conditioning tensors from this size on are sent once and named by their digest after that."""
UPLOADS = 8
"""How often a request is sent again because the store lost a tensor meanwhile, before that counts as a failure."""


class Client:
    """A connection to tacod.

    Args:
        endpoint: Where it listens; by default `TACOD_ENDPOINT`, the user's own daemon, or the system's.
        timeout_s: How long to wait for the daemon to say hello.
        reconnect_s: How long a call outlasts the daemon's absence, for example its restart.
        on_wait: Called about every 20 ms while a call waits; what it raises cancels the call and goes through.

    Every method may raise a `TacodError`; `ConnectionFailed` means that no daemon answers.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        timeout_s: float = 5.0,
        reconnect_s: float = 60.0,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        self._connection = Connection(endpoint, timeout_s, reconnect_s, on_wait)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; what is still queued for it is cancelled."""
        self._connection.close()

    @property
    def endpoint(self) -> str:
        """Where the daemon listens."""
        return self._connection.endpoint

    @property
    def boot_id(self) -> str:
        """Which run of the daemon this client talks to; empty before the first call."""
        return self._connection.boot_id

    def ping(self) -> float:
        """Ask for a sign of life; returns the round trip in seconds."""
        self._connection.ask("ping")  # the first call also opens the session
        started = time.perf_counter()
        self._connection.ask("ping")
        return time.perf_counter() - started

    def status(self) -> dict[str, Any]:
        """What the daemon is and holds, as ``tacoctl status --json`` prints it."""
        return self._connection.ask("status").body

    def stats(self) -> dict[str, Any]:
        """What the daemon did and how long it took, as ``tacoctl stats --json`` prints it."""
        return self._connection.ask("stats").body

    def models(self) -> list[dict[str, Any]]:
        """The loaded models."""
        models: list[dict[str, Any]] = self._connection.ask("models").body["models"]
        return models

    def jobs(self) -> list[dict[str, Any]]:
        """The running job and the queued ones, of all clients."""
        jobs: list[dict[str, Any]] = self._connection.ask("ps").body["jobs"]
        return jobs

    def cancel(self, job: str) -> str:
        """Cancel a job by its id, anyone's; returns ``cancelled``, or ``cancelling`` if a step of it runs still."""
        state: str = self._connection.ask("cancel", lambda: {"job": job, "request": None}).body["state"]
        return state

    def load(self, path: str, patches: list[Any] | None = None, plan: Any = "auto", dtype: str | None = None) -> Model:
        """Have a model resident on all ranks, and return it once it is.

        Args:
            path: The file, absolute or relative to one of the daemon's `models.roots`.
            patches: Weight patches; this version takes none.
            plan: How forwards are spread: ``"auto"``, or a map with any of ``sequence_parallel_degree``, ``ulysses``,
                ``ring`` (numbers of ranks) and ``cfg_parallel`` (whether a batch is split over ranks too).
            dtype: The compute dtype, ``fp32``, ``bf16`` or ``fp16``; by default fp32 on CPUs, the file's own on GPUs.

        Idempotent: the same file in the same state, patches and dtype give the same model id, and load once.
        Raises a `ModelError` if the file can't be served.
        """

        def build() -> dict[str, Any]:
            return {"path": str(path), "dtype": dtype, "patches": patches, "plan": plan}

        told = self._connection.ask("load", build).body["model"]
        return Model(self._connection, build, told)

    def unload(self, model: str) -> None:
        """Give back the memory of a model, named by its id."""
        self._connection.ask("unload", lambda: {"model": model})


@dataclass(frozen=True)
class Progress:
    """A step of a sampling run is done."""

    step: int
    """Counts from 1; begins again if the run had to (a rank died, or the daemon was restarted)."""
    total: int
    sigma: float
    """The noise level that the latent now has."""
    elapsed_s: float
    """Since the run's first step began."""


@dataclass
class ModelStats:
    """What this client's calls of one model added up to; the parts of a step sum to `seconds`."""

    forwards: int = 0
    samples: int = 0
    steps: int = 0
    parallel_steps: int = 0
    retries: int = 0
    seconds: float = 0.0
    """Wall time in this client's calls."""
    queue_s: float = 0.0
    wire_s: float = 0.0
    """All that is neither waiting for a turn nor computing: both sockets, copies, the daemon."""
    compute_s: float = 0.0
    collective_s: float = 0.0
    ranks: int = 0
    plan: str = ""

    def add(self, answer: Mapping[str, Any], elapsed_s: float) -> None:
        """Count one answered call."""
        timing = answer["timing"]
        self.steps += answer["steps"]
        self.parallel_steps += answer["steps"] if answer["ranks"] > 1 else 0
        self.retries += answer["attempts"] - 1
        self.seconds += elapsed_s
        self.queue_s += timing["queue_s"]
        self.compute_s += timing["compute_s"]
        self.collective_s += timing["collective_s"]
        self.wire_s += max(0.0, elapsed_s - timing["queue_s"] - timing["compute_s"] - timing["collective_s"])
        self.ranks, self.plan = answer["ranks"], answer["plan"]


class Model:
    """A model that the daemon holds. It loads itself again if the daemon was restarted or has unloaded it."""

    def __init__(self, connection: Connection, load: Callable[[], dict[str, Any]], told: dict[str, Any]) -> None:
        self._connection = connection
        self._load = load
        self._tell(told)
        self.stats = ModelStats()
        """Accumulated over this object's calls."""

    def _tell(self, told: dict[str, Any]) -> None:
        self.id: str = told["id"]
        self.name: str = told["name"]
        self.family: str = told["family"]
        self.path: str = told["path"]
        self.parameters: int = told["parameters"]
        self.dtype: str = told["dtype"]
        self.plan: str = told["plan"]

    def __repr__(self) -> str:
        return f"<Model {self.id} {self.family} {self.name}>"

    def forward(self, **arguments: Any) -> Any:
        """One DiT forward, with the names and meaning of ComfyUI's ``diffusion_model(x, timestep, context, …)``.

        Tensors may be torch (on any device) or numpy; the output is of ``x``'s kind, dtype, shape and device.

        Raises `ArgumentError`, naming the argument, and `EngineError` if the ranks fail even after retries.
        """
        x = arguments.get("x")
        if kind_of(x) is None:
            raise ArgumentError("x: missing, or neither a torch tensor nor a numpy array", argument="x")
        uploads: dict[bytes, Tensor] = {}
        packed = {
            name: _pack(value, name, uploads, by_content=name not in ("x", "timestep"))
            for name, value in arguments.items()
            if value is not None
        }
        started = time.perf_counter()
        for reply in self._converse("forward", {"arguments": packed}, uploads):
            if reply.type == "done":
                out = _like(reply.body["out"], x)
                self.stats.forwards += 1
                self.stats.add(reply.body, time.perf_counter() - started)
                return out
        raise AssertionError("a conversation ends with an answer")

    def sample(
        self,
        *,
        noise: Any,
        latent: Any,
        sigmas: Any,
        positive: Mapping[str, Any],
        negative: Mapping[str, Any] | None = None,
        cfg: float = 1.0,
        sampler: str = "euler",
        seed: int = 0,
    ) -> Job:
        """Start a whole sampling run in the ranks, and return the job.

        Args:
            noise: [B, C, H, W], standard normal.
            latent: [B, C, H, W] in the VAE's space, as ComfyUI's LATENT; zeros for an empty canvas.
            sigmas: [steps + 1], falling noise levels from at most 1 to at least 0.
            positive: The forward's other arguments (``context``, ``y``, ``guidance``, …).
            negative: The same for the negative prompt; not looked at when ``cfg`` is 1.
            cfg: Guidance scale.
            sampler: ``euler``, ``heun``, ``dpmpp_2m``, …; an unknown one is refused with the list.
            seed: For samplers that add noise, by the rule of ComfyUI's.
        """
        if kind_of(noise) is None:
            raise ArgumentError("noise: expected a torch tensor or a numpy array", argument="noise")
        uploads: dict[bytes, Tensor] = {}

        def condition(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
            return {
                key: _pack(value, f"{name}.{key}", uploads, by_content=True)
                for key, value in given.items()
                if value is not None
            }

        body = {
            "sampler": sampler,
            "seed": int(seed),
            "cfg": float(cfg),
            "noise": _pack(noise, "noise", uploads),
            "latent": _pack(latent, "latent", uploads),
            "sigmas": _pack(sigmas, "sigmas", uploads),
            "positive": condition("positive", positive),
            "negative": None if negative is None else condition("negative", negative),
        }
        return Job(self, self._converse("sample", body, uploads), noise)

    def _converse(self, kind: str, body: dict[str, Any], uploads: dict[bytes, Tensor]) -> Iterator[Message]:
        """Send a request, with uploads and loads as they prove needed, and yield its messages up to the last.

        Whatever ends this early (an exception from `on_wait`, ctrl-C, a job that is dropped) cancels the request.
        """
        lacks = 0
        while True:
            request = self._connection.start(kind, lambda: {"model": self.id, "plan": self._load()["plan"], **body})
            ended = False
            try:
                for reply in self._replies(request):
                    if reply.type == "missing":
                        lacks += 1
                        self._upload(reply.body["digests"], uploads, lacks)
                        break
                    ended = reply.type == "done"
                    yield reply
                    if ended:
                        return
                ended = True
            except ModelNotFound:
                ended = True
                lacks += 1
                if lacks > UPLOADS:
                    raise
                self._tell(self._connection.ask("load", self._load).body["model"])
            except TacodError:
                ended = True
                raise
            finally:
                if not ended:
                    self._connection.cancel(request)
                self._connection.forget(request)

    def _replies(self, request: Request) -> Iterator[Message]:
        return self._connection.replies(request)

    def _upload(self, digests: list[bytes], uploads: dict[bytes, Tensor], attempt: int) -> None:
        if attempt > UPLOADS:
            raise TacodError(
                "the daemon's tensor store keeps losing this request's tensors; it is too small for the clients "
                "that share it (limits.store_bytes)"
            )
        for digest in digests:
            tensor = uploads[digest]
            self._connection.ask("put", lambda tensor=tensor: {"tensors": [tensor]})  # type: ignore[misc]


class Job:
    """A sampling run under way: iterate over it for its steps, then take the result.

    The run goes on in the daemon whether or not anyone iterates.
    """

    def __init__(self, model: Model, messages: Iterator[Message], like: Any) -> None:
        self._model = model
        self._messages = messages
        self._like = like
        self._started = time.perf_counter()
        self._result: Any = None
        self._error: BaseException | None = None
        self.id: str = ""
        """The daemon's name for it; empty until the daemon has accepted it."""
        self.total = 0
        """Steps in all; 0 until the daemon has accepted it."""
        self._advance()

    def _advance(self) -> Progress | None:
        """Take in the next message; a `Progress` if it was one."""
        if self._error is not None:
            raise self._error
        try:
            message = next(self._messages)
        except BaseException as error:
            self._error = error
            raise
        body = message.body
        if message.type == "accepted":
            self.id, self.total = body["job"], body["total"]
            return None
        if message.type == "progress":
            return Progress(body["step"], body["total"], body["sigma"], body["elapsed_s"])
        self._result = _like(body["out"], self._like)
        self._model.stats.samples += 1
        self._model.stats.add(body, time.perf_counter() - self._started)
        next(self._messages, None)
        return None

    def __iter__(self) -> Iterator[Progress]:
        """One `Progress` for each step that is done, as it is done.

        If steps are faster than they travel, the latest one counts. Raises `Cancelled`, or why it failed.
        """
        while self._result is None:
            progress = self._advance()
            if progress is not None:
                yield progress

    def result(self) -> Any:
        """Wait for the end and return the latent, of ``noise``'s kind, dtype, shape and device.

        Raises `Cancelled`, or why it failed.
        """
        for _ in self:
            pass
        return self._result

    def cancel(self) -> None:
        """Cancel the run: at its next step, on all ranks. `result` raises `Cancelled` then."""
        self._model._connection.ask("cancel", lambda: {"job": self.id, "request": None})


def _pack(value: Any, name: str, uploads: dict[bytes, Tensor], by_content: bool = False) -> Any:
    """A value as the wire takes it; large tensors that are sent by content go to ``uploads``."""
    if isinstance(value, (list, tuple)):
        return [_pack(item, name, uploads, by_content) for item in value]
    if kind_of(value) is None:
        if value is None or isinstance(value, (str, int, float, bool)):
            return value
        raise ArgumentError(f"{name}: a {type(value).__name__} can't be sent to the daemon", argument=name)
    tensor = to_wire(value, name)
    if not by_content or tensor.nbytes < BY_CONTENT_BYTES:
        return tensor
    tensor = tensor.with_digest()
    assert tensor.digest is not None
    uploads[tensor.digest] = tensor
    return tensor.without_bytes()


def _like(tensor: Tensor, like: Any) -> Any:
    """A result of the kind, dtype and device of an input."""
    if kind_of(like) == "numpy":
        return from_wire(tensor, "numpy").astype(like.dtype, copy=False)
    return from_wire(tensor, "torch").to(device=like.device, dtype=like.dtype)
