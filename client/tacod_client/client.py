"""The client: use models on the daemon's devices as if they were local."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from tacod_client.connection import Connection
from tacod_client.digests import Digests, Glance
from tacod_client.errors import ArgumentError, JobNotFound, ModelNotFound
from tacod_client.exchange import Uploads, converse, each_once, own, pack
from tacod_client.job import Job
from tacod_client.latents import Latents
from tacod_client.stats import ModelStats
from tacod_client.tensors import all_like, kind_of, like
from tacod_client.text import encodable
from tacod_client.upload import PIECE_BYTES, digests_of_pieces, pieces
from tacod_client.wire import CHANGING, Message, Tensor, split

__all__ = ["Client", "Model"]

_log = logging.getLogger(__name__)

RELOADS = 8
"""How many times a call loads its model again because the daemon lost it."""


class Client:
    """A connection to tacod.

    Args:
        endpoint: Where it listens; by default `TACOD_ENDPOINT`, the user's own daemon, or the system's.
        timeout_s: How long to wait for the daemon to say hello.
        reconnect_s: How long a call outlasts the daemon's absence, for example its restart.
        on_wait: Called about every 20 ms while a call waits; what it raises cancels the call and goes through.
        key: For ``tcp://``, the file with this client's secret CURVE key; by default `TACOD_CURVE_KEY`, or
            ``~/.config/tacod/client.key_secret``.
        server_key: The file with the daemon's public key; by default `TACOD_CURVE_SERVER_KEY`, or
            ``~/.config/tacod/server.key``.

    Every method may raise a `TacodError`; `ConnectionFailed` means that no daemon answers.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        timeout_s: float = 5.0,
        reconnect_s: float = 60.0,
        on_wait: Callable[[], None] | None = None,
        key: str | os.PathLike[str] | None = None,
        server_key: str | os.PathLike[str] | None = None,
    ) -> None:
        self._connection = Connection(endpoint, timeout_s, reconnect_s, on_wait, key, server_key)

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
        """Identifies the run of the daemon that this client talks to; empty before the first call."""
        return self._connection.boot_id

    @property
    def limits(self) -> dict[str, int]:
        """The daemon's limits: ``message_bytes``, ``store_bytes``, ``queue``; empty before the first call."""
        return dict(self._connection.limits)

    def ping(self) -> float:
        """Check that the daemon answers; returns the round trip in seconds."""
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
        """Cancel a job by its id; returns ``cancelled``, or ``cancelling`` while a step of it still runs.

        Another user's job is for root, the daemon's own user and its admins.
        """
        if encodable(job) != job:
            raise JobNotFound(f"{job!r} is no job's id; `tacoctl ps` lists them", job=job)
        state: str = self._connection.ask("cancel", lambda: {"job": job, "request": None}).body["state"]
        return state

    def reload(self) -> list[str]:
        """Have the daemon read its configuration again; returns the keys that changed.

        For root and the daemon's own user. Raises `ConfigInvalid`, and then nothing has changed.
        """
        changed: list[str] = self._connection.ask("reload").body["changed"]
        return changed

    def drain(self) -> int:
        """Have the daemon finish its running work, refuse new work and stop; returns how many jobs it has to finish.

        For root and the daemon's own user.
        """
        jobs: int = self._connection.ask("drain").body["jobs"]
        return jobs

    def load(
        self,
        path: str,
        patches: Sequence[Mapping[str, Any]] | None = None,
        plan: Any = "auto",
        dtype: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        weights: str = "auto",
    ) -> Model:
        """Have a model resident on all ranks, and return it once it is.

        Args:
            path: The file, absolute or relative to one of the daemon's `models.roots`.
            patches: Weight patches, in the order in which they are put on: each a map with a weight's ``key``, a
                ``kind`` and its tensors, or with the ``path`` of a LoRA file and a ``strength``. A patch of another
                size than its weight is left out if others fit, as in ComfyUI, with a warning in the log and a line in
                `Model.notes`.
            plan: How forwards are spread: ``"auto"``, or a map with any of ``sequence_parallel_degree``, ``ulysses``,
                ``ring`` (numbers of ranks), ``cfg_parallel`` (whether a batch is split over ranks too) and
                ``flash_attention`` (False keeps to the plain attention kernels), ``exchange`` (``"int8"`` sends what
                ranks exchange in 8 bits, for GPUs without fast links), ``attention`` (``"sage"``, ``"int8"`` or
                ``"fa3"``: another kernel for the blocks' attention, faster and not equal to ComfyUI; ``"exact"`` is the
                default. Where a card, a package or a mask doesn't allow it, forwards raise `ArgumentError`; no other
                kernel takes its place) and ``step_cache`` (a threshold such as 0.1: a
                step whose first block does nearly what it did in the last computed one takes over what the other
                blocks did then. Faster, and not exact; 0, the default, is off. If ranks are lost within a run of
                forwards, the cache is too, and the run may come out other than undisturbed, by about its error).
            progress: Hears, now and then, how many bytes of how many the slowest rank has loaded.
            dtype: The compute dtype, ``fp32``, ``bf16`` or ``fp16``; by default fp32 on CPUs, the file's own on GPUs.
                ``fp8`` is bf16 with the blocks' matrices multiplied in 8 bits: faster, and less exact. With
                ``_weight_only`` behind one of the first three, a quantized model's activations stay as they are, where
                ComfyUI quantizes them too: nearer to the model that was quantized, and not equal to ComfyUI.
            weights: Where they lie. ``"replicated"``: whole on each GPU. ``"sharded"``: each GPU holds a share of each
                block and fetches the others' while it computes. ``"host"``: blocks lie in the host's memory, once for
                all GPUs, and are fetched from there. ``"auto"``: whole if that fits in the daemon's
                ``models.memory_bytes`` (or in the GPU's memory); else as many blocks as fit are whole, and the others
                lie with the other GPUs if these reach each other, or with the host. The results are the same to the
                bit.

        Idempotent: the same file in the same state, patches, dtype and weights give the same model id, and load once.
        Raises a `ModelError` if the file can't be served.
        """
        for name in (path, *(patch.get("path") for patch in patches or () if isinstance(patch, Mapping))):
            if isinstance(name, (str, os.PathLike)) and encodable(str(name)) != str(name):
                raise ModelNotFound(f"{encodable(str(name))} is no UTF-8, and so no name that travels; rename the file")
        uploads: Uploads = {}
        packed = pack(patches, "patches", uploads, Tensor.with_digest) if patches else None
        loading = Loading(str(path), dtype, packed, plan, uploads, weights)
        return Model(self._connection, loading, loading.run(self._connection, progress))

    def model(self, model: str, plan: Any = "auto") -> Model:
        """A loaded model by its id, with the patches and the dtype that it was loaded with.

        It can't load itself again: once the daemon has forgotten it, calls raise `ModelNotFound`, as this does.
        """
        described = next((each for each in self.models() if each["id"] == model), None)
        if described is None:
            raise ModelNotFound(f"no model {model!r} is loaded; `tacoctl models` lists them", model=model)
        return Model(self._connection, _Found(described["path"], None, None, plan, {}), described)

    def upload(
        self,
        tensors: Mapping[str, Any],
        metadata: Mapping[str, str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> str:
        """Send a model's state dict to a daemon that can't read its file; returns the path to `load`.

        Args:
            tensors: Torch tensors or numpy arrays by their names in the single file.
            metadata: What the file's ``__metadata__`` would hold, such as ``tacod.config``.
            progress: Hears how many bytes of how many are there.

        By content: what the daemon has already, whole or in part, isn't sent again, once the daemon has compared it.

        Raises `ModelNotAllowed` if the daemon takes no uploads or none of this size, `Unavailable` if it has no room
        for it now or can't write it, `ArgumentError` for a dtype that doesn't travel.
        """
        notes = dict(metadata or {})
        nbytes, digests = digests_of_pieces(tensors, notes)
        for attempt in range(RELOADS):
            try:
                return self._send_pieces(nbytes, digests, pieces(tensors, notes), progress)
            except ArgumentError as error:
                # A daemon that was restarted has forgotten what was announced, but not what it had written.
                if error.argument != "upload" or attempt == RELOADS - 1:
                    raise
        raise AssertionError

    def _send_pieces(
        self, nbytes: int, digests: list[bytes], pieces: Iterator[bytes], progress: Callable[[int, int], None] | None
    ) -> str:
        begun = self._begin_upload(nbytes, digests)
        path: str = begun["path"]
        here: int = begun["here"]
        for offset, piece in zip(range(0, nbytes, PIECE_BYTES), pieces, strict=True):
            if here == nbytes:
                break
            if offset < here:
                continue
            data = Tensor("U8", (len(piece),), split(piece))
            body = {"upload": begun["upload"], "offset": offset, "data": data}
            # It may be more than was sent: behind this piece others may lie there already.
            here = self._connection.ask("piece", lambda body=body: body).body["here"]  # type: ignore[misc]
            if progress is not None:
                progress(here, nbytes)
        return path

    def _begin_upload(self, nbytes: int, digests: list[bytes]) -> dict[str, Any]:
        """Announce a file, as often as needed for the daemon to compare what it has of it."""
        left = None
        while True:
            begun = self._connection.ask("begin_upload", lambda: {"nbytes": nbytes, "digests": digests}).body
            before, left = left, begun.get("unchecked", 0)
            if not left or (before is not None and left >= before):
                return begun

    def unload(self, model: str) -> None:
        """Unload a model by its id."""
        if encodable(model) != model:
            raise ModelNotFound(f"{model!r} is no model's id; `tacoctl models` lists them", model=model)
        self._connection.ask("unload", lambda: {"model": model})


@dataclass(frozen=True)
class Loading:
    """How to load a model, the first time and again."""

    path: str
    dtype: str | None
    patches: Any
    plan: Any
    uploads: Uploads
    weights: str = "auto"

    def run(self, connection: Connection, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Load it, and return the daemon's description of it."""
        body = {"path": self.path, "dtype": self.dtype, "patches": self.patches, "plan": self.plan}
        if self.weights != "auto":
            # A daemon that is older doesn't know the word.
            body["weights"] = self.weights
        described: dict[str, Any] = {}
        for reply in converse(connection, "load", lambda: body, self.uploads):
            if reply.type == "done":
                described = reply.body["model"]
            elif progress is not None:
                progress(reply.body["done_bytes"], reply.body["total_bytes"])
        return described


class _Found(Loading):
    """A model that was found by its id; how it was loaded isn't known here."""

    def run(self, connection: Connection, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """See `Loading.run`. Raises `ModelNotFound`, because another load could give another model."""
        raise ModelNotFound(f"the daemon holds this model of {self.path} no more; load its file again")


class Model:
    """A model that the daemon holds.

    It loads itself again if the daemon was restarted or has unloaded it. If its file or a patch's file has changed by
    then, calls raise `ModelNotFound`.
    """

    def __init__(self, connection: Connection, load: Loading, described: dict[str, Any]) -> None:
        self._connection = connection
        self._load = load
        self._digests = Digests()
        self._shares = True
        """Whether its latents may lie in shared memory; learned from the daemon's refusal."""
        self._describe(described)
        for note in self.notes:
            _log.warning("%s: a patch was left out: %s", self.name, note)
        self.stats = ModelStats()
        """Accumulated over this object's calls."""
        self.on_blocks: Callable[[int, int], None] | None = None
        """Hears, during a forward of more than half a second, how many of the model's blocks are done, and of how many.
        """

    def _describe(self, described: dict[str, Any]) -> None:
        self.id: str = described["id"]
        self.name: str = described["name"]
        self.family: str = described["family"]
        self.path: str = described["path"]
        self.parameters: int = described["parameters"]
        self.dtype: str = described["dtype"]
        self.sampling: dict[str, Any] = dict(described.get("sampling", {}))
        """Its noise process, by which `sample` runs: ``prediction``, ``channels``, …; the protocol names all keys."""
        self.plan: str = described["plan"]
        self.notes: tuple[str, ...] = tuple(described.get("notes", ()))
        """What was left out of the patches, and why; a line each."""
        self.network: str = described.get("network", "")
        """In words, whose network it is and how it is shared out, if it is none of the daemon's own families."""
        self.shares_tokens: bool = described.get("shares_tokens", True)
        """Whether ranks share out an image's tokens; otherwise only images of a batch."""
        self.quantization: dict[str, int] = dict(described.get("quantization", {}))
        """How many of its layers have which format, such as ``int8_convrot``; empty for a model of plain weights."""
        self.weights: str = described.get("weights", "replicated")
        """Where its weights lie: ``replicated``, ``sharded`` or ``host``."""
        self.resident_bytes: tuple[int, ...] = tuple(described.get("resident_bytes", ()))
        """What of them each rank holds on its device."""
        self.streamed_bytes: tuple[int, ...] = tuple(described.get("streamed_bytes", ()))
        """What each rank fetches in a forward."""

    def __repr__(self) -> str:
        return f"<Model {self.id} {self.family} {self.name}>"

    def with_plan(self, plan: Any) -> Model:
        """The same model with another ``plan``, as `Client.load` takes it, and with stats of its own."""
        other = copy.copy(self)
        other._load = replace(self._load, plan=plan)
        other._digests = Digests()
        other.stats = ModelStats()
        return other

    def forward(self, /, **arguments: Any) -> Any:
        """One DiT forward, with the names and meaning of ComfyUI's ``diffusion_model(x, timestep, context, …)``.

        Tensors may be torch (on any device) or numpy; the output is of ``x``'s kind, dtype, shape and device. A model
        of several latents, such as video and audio, takes a list of them as ``x`` and gives a list; for a list of one
        it gives a tensor. Its ``timestep`` may be a list too, one for each latent.
        ``control`` is ComfyUI's map of lists of residuals; one that stands in several places travels once.

        Raises `ArgumentError`, naming the argument, and `EngineError` if the ranks fail even after retries.
        """
        x = arguments.get("x")
        _check_latents("x", x)
        uploads: Uploads = {}
        if arguments.get("control") is not None:
            arguments["control"] = each_once(arguments["control"])
        glance = Glance(self._digests)
        latents = Latents(self._connection, x, self._shares)

        def packed() -> dict[str, Any]:
            return {
                name: pack(value, name, uploads, None if name in CHANGING else glance.of)
                for name, value in arguments.items()
                if value is not None and name != "x"
            }

        body = {"plan": self._load.plan, "arguments": packed()}

        def build() -> dict[str, Any]:
            packed_x, places = latents.pack()
            return {**body, "arguments": {"x": packed_x, **body["arguments"]}, **places}

        def holds() -> bool:
            if not glance.holds():
                latents.close(answered=False)
                body["arguments"] = packed()
                return False
            return True

        def replies() -> Iterator[Message]:
            try:
                yield from self._converse("forward", build, uploads, holds)
            except ArgumentError as error:
                if error.argument != "memory" or not latents.shares:
                    raise
                # Not every model's latents may lie there.
                self._shares = False
                latents.stop_sharing()
                yield from self._converse("forward", build, uploads, holds)

        def finish() -> tuple[Any, Message]:
            for reply in replies():
                if reply.type == "progress" and self.on_blocks is not None:
                    self.on_blocks(reply.body["block"], reply.body["blocks"])
            return all_like(latents.result(reply.body["out"]), x), reply

        started = time.perf_counter()
        answered = False
        try:
            # Now, as it may take until a GPU has computed them; the build would have other threads wait for that.
            latents.pack()
            out, reply = finish()
            if latents.is_gone:
                # The session ended before the result was copied, as with a daemon that stops.
                latents.stop_sharing()
                out, reply = finish()
            answered = True
        finally:
            latents.close(answered)
        self.stats.forwards += 1
        self.stats.add(reply.body, time.perf_counter() - started)
        return out

    def call(self, method: str, /, **arguments: Any) -> Any:
        """What the model's network does outside of a forward, such as ``preprocess_text_embeds`` of Anima.

        Args:
            method: ComfyUI's name of the network's method.
            arguments: Tensors (torch or numpy) and what else the method takes; ``context`` is the text.

        The output is of the kind, dtype and device of ``context``. Patches, retries and limits are those of `forward`.

        Raises `ArgumentError`, naming the argument, also for a method that the network doesn't have.
        """
        context = arguments.get("context")
        if kind_of(context) is None:
            raise ArgumentError("context: missing, or neither a torch tensor nor a numpy array", argument="context")
        uploads: Uploads = {}
        packed = {
            name: pack(value, name, uploads, self._digests.of) for name, value in arguments.items() if value is not None
        }
        body = {"method": method, "arguments": packed}
        *_, reply = self._converse("call", lambda: body, uploads)
        return like(reply.body["out"], context)

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
            noise: [B, C, H, W], or [B, C, T, H, W] as `Model.sampling` tells; standard normal. For a model of several
                latents, such as video and audio, a list.
            latent: Of the same shape, in the VAE's space, as ComfyUI's LATENT; zeros for an empty canvas.
            sigmas: [steps + 1], falling noise levels down to at least 0: from at most 1 for a flow, from at most the
                level of the noisiest training step for a model that predicts the noise (157 for PixArt).
            positive: The forward's other arguments (``context``, ``y``, ``guidance``, …).
            negative: The same for the negative prompt; not looked at when ``cfg`` is 1.
            cfg: Guidance scale.
            sampler: ``euler``, ``heun``, ``dpmpp_2m``, …; an unknown one is refused with the list.
            seed: For samplers that add noise, by the rule of ComfyUI's.
        """
        _check_latents("noise", noise)
        uploads: Uploads = {}

        def condition(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
            return {
                key: pack(value, f"{name}.{key}", uploads, self._digests.of)
                for key, value in given.items()
                if value is not None
            }

        asked = {
            "plan": self._load.plan,
            "sampler": pack(sampler, "sampler", uploads, None),
            "seed": pack(int(seed), "seed", uploads, None),
            "cfg": float(cfg),
            "noise": pack(noise, "noise", uploads, None),
            "latent": pack(latent, "latent", uploads, None),
            "sigmas": pack(sigmas, "sigmas", uploads, None),
            "positive": condition("positive", positive),
            "negative": None if negative is None else condition("negative", negative),
        }
        # The job may be asked for again after this has returned, whatever its caller does with these tensors by then.
        kept = {digest: own(each) if each.nbytes > self._digests.limit else each for digest, each in uploads.items()}
        owned = own(asked)
        return Job(self._converse("sample", lambda: owned, kept), noise, self.stats, self._cancel)

    def _converse(
        self,
        kind: str,
        fields: Callable[[], dict[str, Any]],
        uploads: Uploads,
        holds: Callable[[], bool] = lambda: True,
    ) -> Iterator[Message]:
        """As `converse`; loads the model again if the daemon no longer has it."""

        def build() -> dict[str, Any]:
            return {"model": self.id, **fields()}

        for _ in range(RELOADS):
            try:
                yield from converse(self._connection, kind, build, uploads, holds)
                return
            except ModelNotFound:
                described = self._load.run(self._connection)
                if described["id"] != self.id:
                    # What was asked of this model another one would answer.
                    patches = self._load.patches or ()
                    files = " or a file of its patches" if any("path" in each for each in patches) else ""
                    raise ModelNotFound(
                        f"{self.path}{files} has changed since it was loaded, and the daemon holds the old one no "
                        "more; load it again",
                        model=self.id,
                    ) from None
                self._describe(described)
        yield from converse(self._connection, kind, build, uploads, holds)

    def _cancel(self, job: str) -> None:
        self._connection.ask("cancel", lambda: {"job": job, "request": None})


def _check_latents(name: str, given: Any) -> None:
    """Raise `ArgumentError`, naming the argument, unless it is a tensor or a list of such."""
    several = given if isinstance(given, (list, tuple)) else [given]
    if not several or any(kind_of(each) is None for each in several):
        missing = "missing, or " if given is None else ""
        raise ArgumentError(
            f"{name}: {missing}neither a torch tensor nor a numpy array, nor a list of such", argument=name
        )
