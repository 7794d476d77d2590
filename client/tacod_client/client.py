"""The client: use models on the daemon's devices as if they were local."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from tacod_client.connection import Connection
from tacod_client.digests import Copies
from tacod_client.errors import ArgumentError, JobNotFound, ModelNotFound
from tacod_client.exchange import Uploads, pack
from tacod_client.loading import Found, Loading
from tacod_client.model import Model
from tacod_client.tensors import to_wire
from tacod_client.text import encodable
from tacod_client.upload import PIECE_BYTES, digests_of_pieces, pieces
from tacod_client.wire import Tensor, split

__all__ = ["Client"]

RETRIES = 8
"""How many times an upload begins again because the daemon forgot it."""


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
        self._copies = Copies()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; what is still queued for it is cancelled."""
        self._connection.close()
        self._copies.clear()

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
        packed = pack(patches, "patches", uploads, _address) if patches else None
        loading = Loading(str(path), dtype, packed, plan, uploads, weights)
        return Model(self._connection, loading, loading.run(self._connection, progress), self._copies)

    def model(self, model: str, plan: Any = "auto") -> Model:
        """A loaded model by its id, with the patches and the dtype that it was loaded with.

        It can't load itself again: once the daemon has forgotten it, calls raise `ModelNotFound`, as this does.
        """
        described = next((each for each in self.models() if each["id"] == model), None)
        if described is None:
            raise ModelNotFound(f"no model {model!r} is loaded; `tacoctl models` lists them", model=model)
        return Model(self._connection, Found(described["path"], None, None, plan, {}), described, self._copies)

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
        for attempt in range(RETRIES):
            try:
                return self._send_pieces(nbytes, digests, pieces(tensors, notes), progress)
            except ArgumentError as error:
                # A daemon that was restarted has forgotten what was announced, but not what it had written.
                if error.argument != "upload" or attempt == RETRIES - 1:
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


def _address(value: Any, name: str) -> Tensor:
    """See `tacod_client.exchange.Address`: what a load brings doesn't come again."""
    return to_wire(value, name).with_digest()
