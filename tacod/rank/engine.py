"""A rank's engine: holds models, runs forwards and sampling runs. Every rank does the same in the same order."""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import psutil
import torch
from torch import Tensor

from tacod.group.work import (
    Command,
    Done,
    Envelope,
    Evict,
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
from tacod.plan import DeviceRates, Plan, Request, parse_request
from tacod.rank.arguments import Kept, check_arguments, digest, is_fixed, load_arguments
from tacod.rank.comfyui.installation import Installation
from tacod.rank.completion import Completion
from tacod.rank.families.base import DiT, Output
from tacod.rank.families.inputs import Inputs, Spec
from tacod.rank.forward.graphs import PREFIX_BYTES, Forwards
from tacod.rank.forward.run import Call, plan_for
from tacod.rank.forward.warmup import Measured
from tacod.rank.loader import Loader, Resident, Wanted
from tacod.rank.oom import clear_tracebacks, describe_oom
from tacod.rank.parallel.topology import Topology
from tacod.rank.plans import Plans
from tacod.rank.sampling.sampling import Run, SampleRequest, begin, go_on
from tacod.rank.shared_memory import MappedMemories, MappedMemory
from tacod.rank.weights.sizes import SMALLEST
from tacod.shares import Shares
from tacod_client import wire
from tacod_client.errors import ArgumentError, ModelNotFound, OutOfMemory, TacodError
from tacod_client.tensors import from_wire, to_wire
from tacod_client.wire import CHANGING, Form, map_tensors

__all__ = ["Engine"]


KINDS = 32
"""Kinds of forward of which is remembered what was found out."""


@dataclass(frozen=True, eq=False)
class _Known:
    """What was found out about forwards whose messages differ in tensors' bytes alone."""

    specs: Mapping[str, Spec]
    asked: Request
    plan: Plan
    shares_tokens: bool
    """What the model's `shares_tokens` was: a network of ComfyUI's may stop, and then they are planned anew."""
    dtype: torch.dtype
    changing: Sequence[str]
    """The arguments that come with each of them."""
    fixed: Inputs
    """The others, on the device."""


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
        """Make one without models.

        Args:
            device: This rank's.
            topology: The ranks.
            graphs: Whether forwards may be CUDA graphs.
            warm: Whether a load on a GPU warms up the model.
            prefix_bytes: Limit for the prefixes that are kept.
            smallest: Tensors of fewer bytes stay whole on each rank.
            comfyui: The folder of the ComfyUI whose networks run where no family here does.
        """
        self.device = device
        self.topology = topology
        self.forwards = Forwards(topology, graphs, prefix_bytes)
        self.models: dict[str, Resident] = {}
        self.runs: dict[str, Run] = {}
        self.report: Callable[[int, int], None] = lambda done, total: None
        """Called during a load, with the bytes that are loaded and the bytes that will be."""
        self.loader = Loader(
            self.forwards,
            device,
            lambda done, total: self.report(done, total),
            self.memory_errors,
            warm=warm,
            smallest=smallest,
            installation=None if comfyui is None else Installation(comfyui, device),
        )
        self.memories = MappedMemories(device)
        """Those that clients share."""
        self.completion: Completion | None = None
        """That of the command that is done now, if there may be one."""
        self._tensors: dict[bytes, wire.Tensor] = {}
        self._on_device = Kept()
        self.keeps_arguments = device.type == "cuda"
        """Whether tensors that forwards have in common stay on the device; on a CPU the wire's are as near."""
        self._plans = Plans(topology.world_size)
        self._known: OrderedDict[Form, _Known] = OrderedDict()
        """What was found out about forwards that may come again with other bytes; nothing of what isn't here any more.
        """

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
                done = self._timed(envelope.command)
            inject("after")
        except OutOfMemory as error:
            computing = self.models.get(self._model_of(envelope.command))
            raise error if computing is None else computing.streaming.advised(error) from None
        finally:
            if envelope.evict:
                self._known.clear()
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
        with torch.inference_mode():
            if isinstance(command, Forward):
                result: Result = self.forward(**command.body(), form=command.form)
            else:
                methods: dict[type[Command], Callable[..., Result]] = {
                    Load: self.load,
                    Unload: self.unload,
                    Evict: self.evict,
                    MethodCall: self.call,
                    SampleStep: self.sample,
                }
                result = methods[type(command)](**vars(with_tensors(command, self._kept)))
            # Done while a GPU still computes.
            memory_used_bytes = self.memory_used_bytes
            if self.completion is not None:
                self.completion.prepare(result, memory_used_bytes)
            if self.device.type == "cuda":
                self.topology.clock.wait()
            busy = time.perf_counter() - started
            if self.completion is not None:
                self.completion.send()
        collective = self.topology.clock.take_s()
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
            self._known.clear()
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
        roots: Sequence[str] = (),
        refused: Mapping[str, Any] | None = None,
    ) -> Loaded:
        """Make a model resident under the id ``model``; does nothing if it is resident already.

        With ``patches``, ``base`` is loaded too, and the two share the weights that aren't patched. ``files`` has the
        identities that the files of the patches had when the request came. ``weights`` says where they are to lie,
        ``memory_bytes`` how many each rank may hold, and ``fewer`` by how many blocks it stays below that (`choose`).
        ``shares`` are the ranks' of its forwards; None to measure their paces, where a load warms up. ``rates`` are
        the numbers of the `DeviceRates` that an earlier load found, none if it found none; None to measure them too.
        Runs of evicted models continue when those are loaded again. With ``refused``, an error on the wire, a model is
        not loaded: that is raised once others are evicted.
        """
        for evicted in evict_models:
            self._evict(evicted)
        self._give_memory_back()
        if refused is not None:
            raise TacodError.from_wire(refused)
        plain = self.models.get(base or model)
        if plain is None:
            given = None if shares is None else Shares.of(shares, shares_measured)
            known = None if given is None or rates is None else Measured(DeviceRates(*rates) if rates else None, given)
            plain = self.loader.load(Wanted(path, identity, dtype, weights, memory_bytes, fewer, given, known))
        loaded = {base or model: plain}
        if model not in self.models:
            loaded[model] = self.loader.patch(plain, patches, files) if base is not None else plain
        if self.device.type == "cuda":
            # A lack of memory may show only now.
            self.topology.clock.wait()
        # All of it or nothing: what the daemon doesn't hear of it can't unload.
        self.models |= loaded
        return Loaded(self.models[model].facts, plain.facts)

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
        self._known.clear()
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
        form: Form | None = None,
    ) -> Stepped:
        """One forward with the meaning of ComfyUI's ``diffusion_model(x, timestep, …)``.

        For the step cache, forwards of one ``session`` are steps of one run if they differ only in ``x``, ``timestep``
        and a ControlNet's residuals. Latents may lie in a ``memory`` shared with the client; the result is put there,
        at ``room`` (offset and size), if it fits. Forwards of one ``form`` differ in tensors' bytes alone.
        """
        shared = self.memories.get(memory)
        dit = self._resident(model).model
        known = None if form is None else self._known.get(form)
        if known is None or known.shares_tokens != dit.shares_tokens:
            known = self._learn(dit, plan, arguments, form)
        elif form is not None:
            self._known.move_to_end(form)
        given = known.fixed.replace(**self._load(arguments, known.changing, known.specs, known.dtype, shared))
        inputs, chosen = dit.prepare(given), known.plan
        if inputs is not given:
            chosen = plan_for(dit, known.asked, self.topology.world_size, inputs)
        conditioning: Hashable = None
        if chosen.step_cache or dit.has_prefix:
            conditioning = digest({name: each for name, each in arguments.items() if name not in CHANGING})
        before = self._counts()
        out = self.forwards(Call(dit, chosen, inputs, (session, conditioning), conditioning))
        return Stepped(
            out=self._result(out, shared, room),
            plan=dit.told(chosen),
            ranks=chosen.layout.ranks,
            forwards=1,
            record=[],
            **self._counts(before),
        )

    def _learn(self, dit: DiT, plan: Any, arguments: Mapping[str, Any], form: Form | None) -> _Known:
        """Check and plan a forward, and put what alike ones have in common on the device. Raises `ArgumentError`."""
        specs, asked, chosen = self._plans.find(dit, plan, map_tensors(arguments, self._kept))
        fixed = [name for name in arguments if self.keeps_arguments and is_fixed(name, arguments[name], specs[name])]
        changing = [name for name in arguments if name not in fixed]
        on_device = self._load(arguments, fixed, specs, dit.dtype)
        known = _Known(specs, asked, chosen, dit.shares_tokens, dit.dtype, changing, on_device)
        if form is not None:
            self._known[form] = known
            if len(self._known) > KINDS:
                self._known.popitem(last=False)
        return known

    def _load(
        self,
        arguments: Mapping[str, Any],
        names: Sequence[str],
        specs: Mapping[str, Spec],
        dtype: torch.dtype,
        memory: MappedMemory | None = None,
    ) -> Inputs:
        """Some of the arguments on the device."""
        some = {name: map_tensors(arguments[name], self._kept) for name in names}
        kept = self._on_device if self.keeps_arguments else None
        return load_arguments(some, specs, dtype, self.device, kept, memory)

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
        if not dit.is_ours:
            self.forwards.others_run()
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
