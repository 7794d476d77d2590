"""A rank's engine: holds models, runs forwards and sampling runs. Every rank does the same in the same order."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import psutil
import torch
from torch import Tensor

from tacod.checkpoint import Checkpoint, read_checkpoint
from tacod.group.work import (
    Command,
    Done,
    Envelope,
    Evict,
    Facts,
    Forward,
    Load,
    Loaded,
    MethodCall,
    Result,
    Sample,
    SampleStep,
    Stepped,
    Unload,
    with_tensors,
)
from tacod.plan import DeviceRates, parse_request
from tacod.rank.arguments import Kept, check_arguments, digest, load_arguments
from tacod.rank.comfyui.check import check_split
from tacod.rank.comfyui.installation import Installation
from tacod.rank.comfyui.loading import find_network, load_network
from tacod.rank.families.base import DiT, Output
from tacod.rank.families.names import Place
from tacod.rank.forward.graphs import PREFIX_BYTES, Forwards
from tacod.rank.forward.run import Call, plan_for
from tacod.rank.forward.warmup import Measured, warm_up
from tacod.rank.oom import clear_tracebacks, describe_oom
from tacod.rank.parallel.topology import Topology
from tacod.rank.plans import Plans
from tacod.rank.sampling.sampling import Run, SampleRequest, begin, go_on
from tacod.rank.shared_memory import MappedMemories, MappedMemory
from tacod.rank.weights.links import measure_links
from tacod.rank.weights.load import (
    DTYPES,
    adapt_weight,
    choose_dtype,
    get_weight,
    is_packed,
    load_model,
    set_weight,
    share,
    weight_bytes,
)
from tacod.rank.weights.lora import read_lora
from tacod.rank.weights.patch_request import parse_patches
from tacod.rank.weights.patches import Patch, apply, factors
from tacod.rank.weights.placement import Links, Sizes
from tacod.rank.weights.reader import changed
from tacod.rank.weights.remap import identify
from tacod.rank.weights.sizes import SMALLEST
from tacod.rank.weights.streaming import Streaming
from tacod.rank.weights.unfilled import Unfilled
from tacod.shares import EQUAL, Shares
from tacod_client import wire
from tacod_client.dtypes import is_weight_only
from tacod_client.errors import ArgumentError, ModelCorrupt, ModelNotFound, ModelUnsupported, OutOfMemory
from tacod_client.tensors import from_wire, to_wire
from tacod_client.text import encodable, shortened
from tacod_client.wire import CHANGING, map_tensors

__all__ = ["Engine"]

FOR_WEIGHTS = 0.85
"""The part of a GPU's memory that the weights of a model may take if nothing else is said."""
NOTES = 8
NOTE_CHARACTERS = 300
"""How many patches that were left out are told of, and how much of each."""


@dataclass
class Resident:
    """A loaded model, and what the daemon reports about it."""

    model: DiT
    layout: Mapping[str, Place]
    shapes: Mapping[str, Sequence[int]]
    """The weights' shapes, by their names in the single file."""
    facts: Facts
    streaming: Streaming
    """What has stored its weights, where they don't lie whole on each rank; its patched models' too."""


class Engine:
    """The models and runs of one rank.

    No method leaves another rank waiting: what can fail, fails on all ranks alike.
    """

    def __init__(
        self,
        device: torch.device,
        topology: Topology,
        graphs: bool = True,
        warm: bool = True,
        prefix_bytes: int = PREFIX_BYTES,
        smallest: int = SMALLEST,
        comfyui: str | None = None,
    ) -> None:
        """``comfyui`` is the folder of the ComfyUI whose networks run where no family here does."""
        self.device = device
        self.smallest = smallest
        """Tensors of fewer bytes stay whole on each rank."""
        self.warm = warm
        """Whether a load on a GPU warms up the model."""
        self.topology = topology
        self.installation = None if comfyui is None else Installation(comfyui, device)
        self.forwards = Forwards(topology, graphs, prefix_bytes)
        self.models: dict[str, Resident] = {}
        self.runs: dict[str, Run] = {}
        self.report: Callable[[int, int], None] = lambda done, total: None
        """Called during a load, with the bytes that are loaded and the bytes that will be."""
        self.memories = MappedMemories(device)
        """Those that clients share."""
        self._tensors: dict[bytes, wire.Tensor] = {}
        self._on_device = Kept()
        self._plans = Plans(topology.world_size)

    @property
    def memory_used_bytes(self) -> int:
        """Device memory that this rank's tensors take; on a CPU, the process's resident memory."""
        if self.device.type == "cuda":
            # `memory_allocated` would sort all of the statistics first, at every step.
            stats = torch.cuda.memory_stats_as_nested_dict(self.device)
            return int(stats["allocated_bytes"]["all"]["current"]) if stats else 0
        return int(self._process.memory_info().rss)

    @cached_property
    def _process(self) -> psutil.Process:
        return psutil.Process()

    def work(self, envelope: Envelope, inject: Callable[[str], None] = lambda when: None) -> Done:
        """Do one command and report it. ``inject`` may raise ``"before"`` and ``"after"`` it, in tests.

        Raises a `TacodError` that every rank raises alike, or any other error, which means that this rank is broken.
        """
        for tensor in envelope.store:
            assert tensor.digest is not None
            assert tensor.frames is not None
            # The arena's memory is good for this command alone.
            self._tensors[tensor.digest] = replace(tensor, frames=tuple(map(bytes, tensor.frames)))
        for job in envelope.forget:
            self._end(job)
        try:
            inject("before")
            with self.memory_errors():
                done = self._timed(with_tensors(envelope.command, self._kept))
            inject("after")
        except OutOfMemory as error:
            computing = self.models.get(self._model_of(envelope.command))
            raise error if computing is None else computing.streaming.advised(error) from None
        finally:
            for digest in envelope.evict:
                self._tensors.pop(digest, None)
                self._on_device.drop(digest)
        return replace(done, memory_used_bytes=self.memory_used_bytes) if envelope.evict else done

    def _kept(self, named: wire.Tensor) -> wire.Tensor:
        """The kept tensor that is named by digest; one with bytes, or in shared memory, is returned as it is."""
        if named.frames is not None or named.offset is not None:
            return named
        assert named.digest is not None
        return self._tensors[named.digest]

    def _timed(self, command: Command) -> Done:
        started = time.perf_counter()
        methods: dict[type[Command], Callable[..., Result]] = {
            Load: self.load,
            Unload: self.unload,
            Evict: self.evict,
            Forward: self.forward,
            MethodCall: self.call,
            SampleStep: self.sample,
        }
        with torch.inference_mode():
            result = methods[type(command)](**vars(command))
            # Done while a GPU still computes.
            memory_used_bytes = self.memory_used_bytes
            if self.device.type == "cuda":
                self.topology.clock.wait()
        collective = self.topology.clock.take_s()
        busy = time.perf_counter() - started
        compute = max(busy - collective, 0.0)
        return Done(memory_used_bytes, compute, min(collective, busy), result, self.forwards.prefix_bytes)

    @contextmanager
    def memory_errors(
        self, hint: str = "use a smaller image or batch, or unload a model (`tacoctl unload`)"
    ) -> Iterator[None]:
        """A context in which a lack of memory raises `OutOfMemory`: what was asked for, what is free and what to do."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            shortage = describe_oom(error)
            if shortage is None:
                raise
            clear_tracebacks(error)
            self.forwards.clear()
            self._on_device.clear()
            self._give_memory_back()
            raise OutOfMemory(
                f"{shortage.text}; {hint}", lacking_bytes=shortage.lacking_bytes, host=shortage.host
            ) from None

    def _model_of(self, command: Command) -> str:
        """The id of the model that a command computes with; empty if it computes nothing."""
        if isinstance(command, SampleStep):
            run = self.runs.get(command.job)
            return run.model if run is not None else command.inputs.model if command.inputs is not None else ""
        return command.model if isinstance(command, Forward | MethodCall) else ""

    def load(
        self,
        model: str,
        path: str,
        identity: str,
        dtype: str | None,
        patches: list[Any] | None,
        base: str | None,
        evict_models: list[str],
        files: Mapping[str, str] = MappingProxyType({}),
        weights: str = "auto",
        memory_bytes: int | None = None,
        fewer: int = 0,
        shares: Sequence[int] | None = None,
        shares_measured: bool = False,
        rates: Sequence[float] | None = None,
    ) -> Loaded:
        """Make a model resident under the id ``model``; does nothing if it is resident already.

        With ``patches``, ``base`` is loaded too, and the two share the weights that aren't patched. ``files`` has the
        identities that the files of the patches had when the request came. ``weights`` says where they are to lie,
        ``memory_bytes`` how many each rank may hold, and ``fewer`` by how many blocks it stays below that (`choose`).
        ``shares`` are the ranks' of its forwards; None to measure their paces, where a load warms up. ``rates`` are
        the numbers of the `DeviceRates` that an earlier load found, none if it found none; None to measure them too.
        Runs of evicted models continue when those are loaded again.
        """
        for evicted in evict_models:
            self._evict(evicted)
        self._give_memory_back()
        plain = self.models.get(base or model)
        if plain is None:
            given = None if shares is None else Shares.of(shares, shares_measured)
            known = None if given is None or rates is None else Measured(DeviceRates(*rates) if rates else None, given)
            plain = self._load_file(path, identity, dtype, weights, memory_bytes, fewer, given, known)
        loaded = {base or model: plain}
        if model not in self.models:
            loaded[model] = self._try_to_patch(plain, patches, files) if base is not None else plain
        if self.device.type == "cuda":
            # A lack of memory may show only now.
            self.topology.clock.wait()
        # All of it or nothing: what the daemon doesn't hear of it can't unload.
        self.models |= loaded
        return Loaded(self.models[model].facts, plain.facts)

    def _load_file(
        self,
        path: str,
        identity: str,
        dtype: str | None,
        weights: str,
        memory_bytes: int | None,
        fewer: int,
        shares: Shares | None,
        known: Measured | None,
    ) -> Resident:
        checkpoint = read_checkpoint(path)
        if checkpoint.identity != identity:
            raise changed(path)
        try:
            return self._load_own(checkpoint, dtype, weights, memory_bytes, fewer, shares, known)
        except (ModelUnsupported, ModelCorrupt) as error:
            # What looks like a damaged file of a family here may be a whole one of a network that ComfyUI knows.
            if self.installation is None:
                raise
            return self._load_network(self.installation, checkpoint, error.message, dtype, weights, memory_bytes)

    def _load_network(
        self,
        installation: Installation,
        checkpoint: Checkpoint,
        refusal: str,
        dtype: str | None,
        weights: str,
        memory_bytes: int | None,
    ) -> Resident:
        """A file that no family here runs, by ComfyUI's own network."""
        if weights not in ("auto", "replicated"):
            raise ArgumentError(
                f"weights: of ComfyUI's networks each rank holds all weights; {weights!r} is for this version's own "
                "families, so use auto",
                argument="weights",
            )
        chosen = choose_dtype(checkpoint, dtype, self.device)
        if chosen == "fp8" or is_weight_only(chosen):
            raise ArgumentError(f"dtype: {chosen} is for this version's own families; use bf16", argument="dtype")
        streaming = Streaming(
            self.topology.everyone, self.device, "auto", self._budgets(memory_bytes), False, self.smallest
        )
        with self.memory_errors("unload a model (`tacoctl unload`)"):
            found = find_network(
                installation,
                checkpoint,
                refusal,
                self.device,
                lambda total: streaming.begin(None, Sizes({}, others=total)),
                self.report,
            )
            network = load_network(installation, found, checkpoint.path, DTYPES[chosen], self.device)
            check_split(network, self.topology, self.device)
        facts = self._facts(network, checkpoint, chosen, streaming)
        shapes = {name: tuple(each.shape) for name, each in network.named_weights().items()}
        return Resident(network, {}, shapes, facts, streaming)

    def _load_own(
        self,
        checkpoint: Checkpoint,
        dtype: str | None,
        weights: str,
        memory_bytes: int | None,
        fewer: int,
        shares: Shares | None,
        known: Measured | None,
    ) -> Resident:
        """A file that a family here runs."""
        with Unfilled():
            family, config, checkpoint = identify(checkpoint)
        chosen = choose_dtype(checkpoint, dtype, self.device)
        if chosen == "fp8" and self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) < (8, 9):
            name = torch.cuda.get_device_name(self.device)
            raise ArgumentError(
                f"dtype: {name} can't multiply in 8 bits (Ada and Hopper can); use bf16", argument="dtype"
            )
        streaming = Streaming(
            self.topology.everyone,
            self.device,
            weights,
            self._budgets(memory_bytes),
            self.topology.reaches,
            self.smallest,
            fewer,
            lambda: self._links,
            self._devices_are_alike,
        )
        try:
            with self.memory_errors("unload a model (`tacoctl unload`)"), streaming:
                loaded = load_model(
                    checkpoint,
                    DTYPES[chosen],
                    self.device,
                    self.report,
                    weight_only=is_weight_only(chosen),
                    fp8=chosen == "fp8",
                    streaming=streaming,
                )
            loaded.shares = shares or EQUAL
            # Before it is resident: a load that fails here leaves nothing behind.
            if self.device.type == "cuda" and self.warm:
                hint = (
                    "that was a forward at 1024² on all ranks, to warm up; unload a model, or set group.warm_up = false"
                )
                with self.memory_errors(hint):
                    loaded.rates, loaded.shares = warm_up(loaded, self.forwards, self.device, shares, known)
                    self.topology.clock.wait()
        except OutOfMemory as error:
            raise streaming.advised(error) from None
        facts = self._facts(loaded, checkpoint, chosen, streaming)
        with Unfilled():
            return Resident(loaded, family.lora_layout(config), family.shapes(config), facts, streaming)

    def _facts(self, loaded: DiT, checkpoint: Checkpoint, dtype: str, streaming: Streaming) -> Facts:
        """What there is to report about a model. All ranks ask at once."""
        resident = self._everyones(weight_bytes(loaded))
        return Facts(
            family=loaded.family,
            parameters=checkpoint.parameters,
            weight_bytes=max(resident),
            weights=streaming.placement.kind,
            resident_bytes=resident,
            streamed_bytes=streaming.streamed_bytes(loaded),
            fetch_s=streaming.fetch_s(loaded),
            dtype=dtype,
            heads=loaded.heads,
            width=loaded.width,
            sampling=loaded.sampling(),
            quantization=checkpoint.formats,
            shares=[*loaded.shares.each],
            shares_measured=loaded.shares.measured,
            rates=[] if loaded.rates is None else [*astuple(loaded.rates)],
            network=loaded.network,
            shares_tokens=loaded.shares_tokens,
        )

    def _try_to_patch(self, base: Resident, patches: Any, files: Mapping[str, str]) -> Resident:
        """See `_patch`; a lack of memory says whether a base that holds fewer blocks would leave more."""
        try:
            with self.memory_errors("unload a model (`tacoctl unload`)"):
                return self._patch(base, patches, files)
        except OutOfMemory as error:
            raise base.streaming.advised(error) from None

    def _patch(self, base: Resident, patches: Any, files: Mapping[str, str]) -> Resident:
        """The base's weights with patches applied; only patched weights take memory of their own."""
        model = base.model
        patched = share(model)
        notes: list[str] = []

        def read(path: str, strength: float) -> dict[str, list[Patch]]:
            return read_lora(path, base.layout, base.shapes, strength, type(model).spellings, files.get(path), notes)

        given = map_tensors(patches, lambda each: from_wire(each, "torch"))
        parsed = parse_patches(given, read, base.shapes, base.model.canonical, notes)
        with base.streaming as streaming:
            for keys in streaming.in_turn(
                model, patched, [key for key, each in parsed.items() if not all(patch.idle for patch in each)]
            ):
                for key in keys:
                    _change(model, patched, key, parsed[key], base.shapes[key])
        resident = self._everyones(weight_bytes(model, patched) - weight_bytes(model))
        if len(notes) > NOTES:
            notes[NOTES:] = [f"and {len(notes) - NOTES} more"]
        short = [shortened(encodable(note), NOTE_CHARACTERS) for note in notes]
        facts = replace(
            base.facts,
            weight_bytes=max(resident),
            resident_bytes=resident,
            streamed_bytes=streaming.streamed_bytes(patched),
            fetch_s=streaming.fetch_s(patched),
            notes=short,
        )
        return replace(base, model=patched, facts=facts)

    @cached_property
    def _devices_are_alike(self) -> bool:
        """Whether all ranks' devices are of one compute capability. All ask at once."""
        if self.device.type == "cpu":
            return True
        major, minor = torch.cuda.get_device_capability(self.device)
        return len(set(self._everyones(100 * major + minor))) == 1

    @cached_property
    def _links(self) -> Links:
        """How fast ranks fetch weights; measured once."""
        return measure_links(self.topology.everyone, self.device, self.topology.reaches)

    def _budgets(self, limit: int | None) -> list[int | None]:
        """Bytes of weights for each rank's device: the limit, else what leaves some for what is computed.

        That is as if it held no other model: where there is no room beside others, these are evicted (`OutOfMemory`).
        None for CPUs without a limit.
        """
        if self.device.type == "cpu":
            return [limit] * self.topology.world_size
        _, total = torch.cuda.mem_get_info(self.device)
        room = int(total * FOR_WEIGHTS)
        return [*self._everyones(limit if limit is not None and limit <= total else room)]

    def _everyones(self, number: int) -> list[int]:
        """Every rank's number, in the order of ranks."""
        mine = torch.tensor([number], dtype=torch.int64, device=self.device)
        numbers: list[int] = self.topology.everyone.gather(mine, [1] * self.topology.world_size, dim=0).tolist()
        return numbers

    def unload(self, model: str, evict_models: list[str]) -> None:
        """Unload a model and those that are made of it by patches."""
        self._resident(model)
        for gone in (model, *evict_models):
            self._drop(gone)
        self._give_memory_back()

    def evict(self, models: list[str]) -> None:
        """Unload models to make room; their runs keep their progress."""
        for gone in models:
            self._evict(gone)
        self._give_memory_back()

    def _drop(self, model: str) -> None:
        """Forget a model and its runs, whose next step will not come."""
        self._take(model)
        for job in [job for job, run in self.runs.items() if run.model == model]:
            self._end(job)

    def _evict(self, model: str) -> None:
        """Forget a model, but keep the progress of its runs."""
        gone = self._take(model)
        for job, run in self.runs.items():
            if gone is not None and run.model == model and run.denoise.model is not None:
                run.denoise.model = None
                run.cached = self.forwards.step_caches.take(gone.model, job)

    def _take(self, model: str) -> Resident | None:
        """Remove a model, and what is kept of its forwards."""
        gone = self.models.pop(model, None)
        if gone is not None:
            self.forwards.prefixes.drop(gone.model)
        return gone

    def _give_memory_back(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _resident(self, model: str) -> Resident:
        if model not in self.models:
            raise ModelNotFound(f"no model {model!r} is loaded; `tacoctl models` lists them", model=model)
        return self.models[model]

    def forward(
        self,
        model: str,
        plan: Any,
        arguments: dict[str, Any],
        session: bytes,
        memory: int | None = None,
        room: Sequence[int] | None = None,
    ) -> Stepped:
        """One forward with the meaning of ComfyUI's ``diffusion_model(x, timestep, …)``.

        For the step cache, forwards of one ``session`` are steps of one run if they differ only in ``x``, ``timestep``
        and a ControlNet's residuals. Latents may lie in a ``memory`` shared with the client; the result is put there,
        at ``room`` (offset and size), if it fits.
        """
        shared = self.memories.get(memory)
        dit = self._resident(model).model
        specs, asked, chosen = self._plans.find(dit, plan, arguments)
        kept = self._on_device if self.device.type == "cuda" else None
        given = load_arguments(arguments, specs, dit.dtype, self.device, kept, shared)
        inputs = dit.prepare(given)
        if inputs is not given:
            chosen = plan_for(dit, asked, self.topology.world_size, inputs)
        conditioning: Hashable = None
        if chosen.step_cache or dit.has_prefix:
            conditioning = digest({name: each for name, each in arguments.items() if name not in CHANGING})
        before = self._counts()
        out = self.forwards(Call(dit, chosen, inputs, (session, conditioning), conditioning))
        return Stepped(
            out=self._result(out, shared, room),
            plan=str(chosen),
            ranks=chosen.layout.ranks,
            forwards=1,
            record=[],
            **self._counts(before),
        )

    def _counts(self, before: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
        """Counts of what forwards found here, less those ``before``."""
        forwards = self.forwards
        now = {
            "skipped": forwards.skipped,
            "prefix_hits": forwards.prefixes.hits,
            "prefix_misses": forwards.prefixes.misses,
        }
        return {name: count - before.get(name, 0) for name, count in now.items()}

    def call(self, model: str, method: str, arguments: dict[str, Any]) -> Stepped:
        """What a model's network does outside of a forward; each rank computes all of it."""
        dit = self._resident(model).model
        methods = dit.methods()
        if method not in methods:
            known = f"it has {', '.join(methods)}" if methods else "this model has none"
            raise ArgumentError(f"method: {dit.family} has no {method!r:.60}; {known}", argument="method")
        specs = methods[method].arguments
        check_arguments(arguments, specs, method)
        given = load_arguments(arguments, specs, dit.dtype, self.device)
        out = methods[method].run(**given)
        return Stepped(out=self._result(out), plan="whole on each rank", ranks=1, forwards=0, skipped=0)

    def _result(
        self, out: Output, memory: MappedMemory | None = None, room: Sequence[int] | None = None
    ) -> wire.Tensor | list[wire.Tensor] | None:
        """The output for the client, from rank 0: at its ``room`` in shared memory if it fits. None on other ranks."""
        if self.topology.rank != 0:
            return None
        if memory is not None and room is not None:
            placed = memory.write(out if isinstance(out, list) else [out], room)
            if placed is not None:
                return placed if isinstance(out, list) else placed[0]
        if isinstance(out, list):
            return [self._to_host(each) for each in out]
        return self._to_host(out)

    def _to_host(self, out: Tensor) -> wire.Tensor:
        if self.device.type == "cuda":
            # From the GPU into locked memory it goes by itself.
            out = torch.empty(out.shape, dtype=out.dtype, pin_memory=True).copy_(out, non_blocking=True)
        return to_wire(out, "out")

    def sample(self, job: str, step: int, inputs: Sample | None = None, record: Sequence[wire.Tensor] = ()) -> Stepped:
        """One step of the run ``job``; the last one carries the latent.

        A step with ``inputs`` begins the run: step 0, or on new ranks a later one, with the ``record`` of those before.
        """
        if inputs is not None:
            self.runs[job] = self._begin(job, **vars(inputs))
            go_on(self.runs[job], step, [from_wire(each, "torch") for each in record])
        walk = self.runs[job]
        walk.denoise.record.clear()
        if walk.denoise.model is None:
            walk.denoise.model = self._resident(walk.model).model
            self.forwards.step_caches.put(walk.denoise.model, walk.cached)
            walk.cached = {}
        before, counts = walk.denoise.forwards, self._counts()
        x = next(walk.steps)
        last = step + 2 == len(walk.sigmas)
        done = Stepped(
            out=self._result(walk.finish(x)) if last else None,
            sigma=walk.sigmas[step + 1],
            plan=str(walk.denoise.plan),
            ranks=walk.denoise.plan.layout.ranks,
            forwards=walk.denoise.forwards - before,
            record=[],
            **self._counts(counts),
        )
        if last:
            self._end(job)
            return done
        return replace(done, record=self._recorded(walk))

    def _recorded(self, run: Run) -> list[wire.Tensor]:
        """What a watched step of a run has predicted, from rank 0: it is kept where ranks don't come to lose it.

        A step cache is lost with the ranks, so a run that has one begins anew.
        """
        kept = self.forwards.watch is not None and self.topology.rank == 0 and not run.denoise.plan.step_cache
        return [self._to_host(each) for each in run.denoise.record] if kept else []

    def _end(self, job: str) -> None:
        self.runs.pop(job, None)
        self.forwards.step_caches.drop(job)

    def _begin(self, job: str, model: str, plan: Any, **inputs: Any) -> Run:
        dit = self._resident(model).model
        request = SampleRequest(**inputs)
        request.check(dit)
        asked = parse_request(plan, self.topology.world_size)
        run = begin(request, dit, asked, self.forwards, self.device, job)
        run.model = model
        return run


def _change(model: DiT, patched: DiT, key: str, patches: Sequence[Patch], shape: Sequence[int]) -> None:
    """Apply patches to a weight of ``model``, for ``patched``, which shares its other weights."""
    low_rank = factors(patches, shape, key) if is_packed(model, key) else None
    if low_rank is not None:
        adapt_weight(patched, key, *low_rank)
        return
    weight = get_weight(model, key).to(model.dtype_of(key, model.dtype))
    merged = apply(weight, patches, key)
    if merged.shape != weight.shape:
        raise ArgumentError(f"patches: {key} would grow to {list(merged.shape)}", argument="patches")
    if merged is not weight:
        set_weight(patched, key, merged)
