"""A model that the daemon holds: forwards, calls and sampling runs of it."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tacod_client.connection import Connection
from tacod_client.digests import Copies, Digests
from tacod_client.errors import ArgumentError, ModelNotFound
from tacod_client.exchange import Uploads, converse, own, pack
from tacod_client.forward import ForwardRequest
from tacod_client.job import Job
from tacod_client.latents import check_latents
from tacod_client.loading import Loading
from tacod_client.request import Completion, Request
from tacod_client.stats import Call, ModelStats
from tacod_client.tensors import all_like, kind_of, like
from tacod_client.wire import Message

__all__ = ["Model"]

_log = logging.getLogger(__name__)

RELOADS = 8
"""How many times a call loads its model again because the daemon lost it."""


class Model:
    """A model that the daemon holds.

    It loads itself again if the daemon was restarted or has unloaded it. If its file or a patch's file has changed by
    then, calls raise `ModelNotFound`.
    """

    def __init__(
        self, connection: Connection, load: Loading, described: dict[str, Any], copies: Copies | None = None
    ) -> None:
        """``copies`` are the client's."""
        self._connection = connection
        self._load = load
        self._digests = Digests(copies=copies)
        self._shares = True
        """Whether its latents may lie in shared memory; learned from the daemon's refusal."""
        self._describe(described)
        for note in self.notes:
            _log.warning("%s: a patch was left out: %s", self.name, note)
        self._stats = ModelStats()
        self._last: Request | None = None
        """That of the last forward, if it was completed before the daemon had told the split of its time."""
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
        self.group: str = described.get("group") or next(iter(described.get("groups", ())), "")
        """The group of ranks that loaded it, or the first that holds one that was found, if the daemon has several; its
        forwards may go to others."""
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

    @property
    def stats(self) -> ModelStats:
        """Accumulated over this object's calls, as of after `settle`. Others may be put in their place."""
        self.settle()
        return self._stats

    @stats.setter
    def stats(self, stats: ModelStats) -> None:
        self._stats = stats

    def settle(self) -> None:
        """Wait for what the daemon has yet to tell of calls that have returned, for a second at most."""
        self._connection.settle()

    def hear_last(self, hear: Callable[[Call], None]) -> None:
        """Have ``hear`` hear of the last call, at once or when the daemon has told the split of its time."""
        stats = self._stats

        def tell(answer: Message | None = None) -> None:
            assert stats.last is not None
            hear(stats.last)

        if self._last is not None:
            self._last.when_answered(tell)
        else:
            tell()

    def __repr__(self) -> str:
        return f"<Model {self.id} {self.family} {self.name}>"

    def group_in(self, status: Mapping[str, Any]) -> Mapping[str, Any]:
        """Its group, as `Client.status` has it; all ranks if the daemon has one group, or is an older one."""
        groups: Sequence[Mapping[str, Any]] = status.get("groups", ())
        return next((each for each in groups if each["name"] == self.group), status["group"])

    def with_plan(self, plan: Any) -> Model:
        """The same model with another ``plan``, as `Client.load` takes it, and with stats of its own."""
        other = copy.copy(self)
        other._load = replace(self._load, plan=plan)
        other._digests = Digests(copies=self._digests.copies)
        other._stats, other._last = ModelStats(), None
        return other

    def forward(self, /, **arguments: Any) -> Any:
        """One DiT forward, with the names and meaning of ComfyUI's ``diffusion_model(x, timestep, context, …)``.

        Tensors may be torch (on any device) or numpy; the output is of ``x``'s kind, dtype, shape and device. A model
        of several latents, such as video and audio, takes a list of them as ``x`` and gives a list; for a list of one
        it gives a tensor. Its ``timestep`` may be a list too, one for each latent.
        ``control`` is ComfyUI's map of lists of residuals; one that stands in several places travels once.

        Raises `ArgumentError`, naming the argument, and `EngineError` if the ranks fail even after retries.
        """
        request = ForwardRequest(self._connection, self._digests, self._load.plan, arguments, self._shares)
        latents = request.latents
        started = time.perf_counter()
        answered = False
        try:
            # Now, as it may take until a GPU has computed them; the build would have other threads wait for that.
            latents.pack()
            out, reply = self._run(request)
            if latents.is_gone:
                # The session ended before the result was copied, as with a daemon that stops.
                latents.stop_sharing()
                out, reply = self._run(request)
            answered = True
        finally:
            latents.close(answered)
        self._count(reply, time.perf_counter() - started)
        return out

    def _count(self, reply: Message, elapsed_s: float) -> None:
        """Count a forward by its answer, or by the one that follows its completion."""
        stats = self._stats
        stats.forwards += 1
        self._last = reply.request if isinstance(reply, Completion) else None
        if self._last is None:
            stats.add(reply.body, elapsed_s)
            return

        def count(answer: Message | None) -> None:
            if answer is not None and answer.type == "done":
                stats.add(answer.body, elapsed_s)
            else:
                stats.add_untold(elapsed_s)

        self._last.when_answered(count)

    def _run(self, request: ForwardRequest) -> tuple[Any, Message]:
        """The output of a forward, and the message that it came with: its answer, or its completion."""
        for reply in self._replies(request):
            if reply.type == "progress" and self.on_blocks is not None:
                self.on_blocks(reply.body["block"], reply.body["blocks"])
        return all_like(request.latents.result(reply.body["out"]), request.x), reply

    def _replies(self, request: ForwardRequest) -> Iterator[Message]:
        try:
            yield from self._converse("forward", request.build, request.uploads, request.holds)
        except ArgumentError as error:
            if error.argument != "memory" or not request.latents.shares:
                raise
            # Not every model's latents may lie there.
            self._shares = False
            request.latents.stop_sharing()
            yield from self._converse("forward", request.build, request.uploads, request.holds)

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
            name: pack(value, name, uploads, self._digests.address)
            for name, value in arguments.items()
            if value is not None
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
        check_latents("noise", noise)
        uploads: Uploads = {}

        def condition(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
            return {
                key: pack(value, f"{name}.{key}", uploads, self._digests.address)
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
        return Job(self._converse("sample", lambda: owned, kept), noise, self._stats, self._cancel)

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
