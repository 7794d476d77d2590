"""Loads a rank's models: a file's family with its weights, or ComfyUI's own network, and patches on either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from tacod.checkpoint import Checkpoint, read_checkpoint
from tacod.group.work import (
    Facts,
)
from tacod.rank.comfyui.check import check_split
from tacod.rank.comfyui.installation import Installation
from tacod.rank.comfyui.loading import load_network
from tacod.rank.families.base import DiT
from tacod.rank.families.names import Place
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.warmup import Measured, warm_up
from tacod.rank.weights.links import measure_links
from tacod.rank.weights.load import (
    DTYPES,
    Progress,
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
from tacod.rank.weights.placement import Links
from tacod.rank.weights.reader import changed
from tacod.rank.weights.remap import identify
from tacod.rank.weights.streaming import Streaming
from tacod.rank.weights.unfilled import Unfilled
from tacod.shares import EQUAL, Shares
from tacod_client.dtypes import is_weight_only
from tacod_client.errors import ArgumentError, ModelCorrupt, ModelUnsupported, OutOfMemory
from tacod_client.tensors import from_wire
from tacod_client.text import encodable, shortened
from tacod_client.wire import map_tensors

__all__ = ["Loader", "Resident", "Wanted"]

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


@dataclass(frozen=True)
class Wanted:
    """A file, and how it is to be loaded; see `Engine.load`."""

    path: str
    identity: str
    dtype: str | None
    weights: str = "auto"
    memory_bytes: int | None = None
    fewer: int = 0
    shares: Shares | None = None
    known: Measured | None = None
    """What an earlier load has measured."""


class Loader:
    """Makes resident models. All ranks make the same calls in the same order.

    Args:
        forwards: What warms models up; it has the ranks' topology.
        device: This rank's.
        report: Called during a load, with the bytes that are loaded and the bytes that will be.
        memory_errors: Makes a context in which a lack of memory raises `OutOfMemory` with this advice.
        warm: Whether a load on a GPU warms up the model.
        smallest: Tensors of fewer bytes stay whole on each rank.
        installation: The ComfyUI whose networks run where no family here does.
    """

    def __init__(
        self,
        forwards: Forwards,
        device: torch.device,
        report: Progress,
        memory_errors: Callable[[str], AbstractContextManager[None]],
        *,
        warm: bool,
        smallest: int,
        installation: Installation | None,
    ) -> None:
        self._forwards = forwards
        self._topology = forwards.topology
        self._device = device
        self._report = report
        self._memory_errors = memory_errors
        self._warm = warm
        self._smallest = smallest
        self._installation = installation

    def load(self, wanted: Wanted) -> Resident:
        """A model of this file, which nothing else holds yet.

        Raises `ModelUnsupported`, `ModelCorrupt`, `ModelNotFound`, `ArgumentError` and `OutOfMemory`, alike on all
        ranks.
        """
        checkpoint = read_checkpoint(wanted.path)
        if checkpoint.identity != wanted.identity:
            raise changed(wanted.path)
        try:
            return self._load_own(checkpoint, wanted)
        except (ModelUnsupported, ModelCorrupt) as error:
            # What looks like a damaged file of a family here may be a whole one of a network that ComfyUI knows.
            if self._installation is None:
                raise
            return self._load_network(self._installation, checkpoint, error.message, wanted)

    def _load_network(
        self,
        installation: Installation,
        checkpoint: Checkpoint,
        refusal: str,
        wanted: Wanted,
    ) -> Resident:
        """A file that no family here runs, by ComfyUI's own network."""
        chosen = choose_dtype(checkpoint, wanted.dtype, self._device)
        if chosen == "fp8" or is_weight_only(chosen):
            raise ArgumentError(f"dtype: {chosen} is for this version's own families; use bf16", argument="dtype")
        streaming = self._streaming(wanted)
        # Its small forwards run code that other networks have too.
        self._forwards.others_run()
        advice = "unload a model (`tacoctl unload`)"
        try:
            with self._memory_errors(advice), streaming:
                network = load_network(
                    installation, checkpoint, refusal, DTYPES[chosen], self._device, streaming, self._report
                )
            network.hosts = self._topology.hosts if self._topology.spans_hosts else ()
            with self._memory_errors(advice):
                check_split(network, self._topology, self._device)
        except OutOfMemory as error:
            raise streaming.advised(error) from None
        facts = self._facts(network, checkpoint, chosen, streaming)
        shapes = {name: tuple(each.shape) for name, each in network.named_weights().items()}
        return Resident(network, {}, shapes, facts, streaming)

    def _load_own(self, checkpoint: Checkpoint, wanted: Wanted) -> Resident:
        """A file that a family here runs."""
        with Unfilled():
            family, config, checkpoint = identify(checkpoint)
        chosen = choose_dtype(checkpoint, wanted.dtype, self._device)
        if chosen == "fp8" and self._device.type == "cuda" and torch.cuda.get_device_capability(self._device) < (8, 9):
            name = torch.cuda.get_device_name(self._device)
            raise ArgumentError(
                f"dtype: {name} can't multiply in 8 bits (Ada and Hopper can); use bf16", argument="dtype"
            )
        streaming = self._streaming(wanted)
        try:
            with self._memory_errors("unload a model (`tacoctl unload`)"), streaming:
                loaded = load_model(
                    checkpoint,
                    DTYPES[chosen],
                    self._device,
                    self._report,
                    weight_only=is_weight_only(chosen),
                    fp8=chosen == "fp8",
                    streaming=streaming,
                )
            loaded.shares = wanted.shares or EQUAL
            loaded.hosts = self._topology.hosts if self._topology.spans_hosts else ()
            # Before it is resident: a load that fails here leaves nothing behind.
            if self._device.type == "cuda" and self._warm:
                hint = (
                    "that was a forward at 1024² on all ranks, to warm up; unload a model, or set group.warm_up = false"
                )
                with self._memory_errors(hint):
                    loaded.rates, loaded.shares = warm_up(
                        loaded, self._forwards, self._device, wanted.shares, wanted.known
                    )
                    self._topology.clock.wait()
        except OutOfMemory as error:
            raise streaming.advised(error) from None
        facts = self._facts(loaded, checkpoint, chosen, streaming)
        with Unfilled():
            return Resident(loaded, family.lora_layout(config), family.shapes(config), facts, streaming)

    def _streaming(self, wanted: Wanted) -> Streaming:
        """What stores the weights of a load."""
        return Streaming(
            self._topology.everyone,
            self._device,
            wanted.weights,
            self._budgets(wanted.memory_bytes),
            self._topology.reaches,
            self._smallest,
            wanted.fewer,
            lambda: self._links,
            self._devices_are_alike,
            self._topology.hosts,
            self._topology.neighbours,
        )

    def _facts(self, loaded: DiT, checkpoint: Checkpoint, dtype: str, streaming: Streaming) -> Facts:
        """What there is to report about a model. All ranks ask at once."""
        resident = self._topology.everyone.numbers(weight_bytes(loaded))
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
            hosts=[*loaded.hosts],
            network=loaded.network,
            shares_tokens=loaded.shares_tokens,
        )

    def patch(self, base: Resident, patches: Any, files: Mapping[str, str]) -> Resident:
        """The base's weights with patches applied; only patched weights take memory of their own.

        ``files`` has the identities of the patches' files, by their paths. Raises what `load` does; a lack of memory
        says whether a base that holds fewer blocks would leave more.
        """
        try:
            with self._memory_errors("unload a model (`tacoctl unload`)"):
                return self._patch(base, patches, files)
        except OutOfMemory as error:
            raise base.streaming.advised(error) from None

    def _patch(self, base: Resident, patches: Any, files: Mapping[str, str]) -> Resident:
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
        resident = self._topology.everyone.numbers(weight_bytes(model, patched) - weight_bytes(model))
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
        if self._device.type == "cpu":
            return True
        major, minor = torch.cuda.get_device_capability(self._device)
        return len(set(self._topology.everyone.numbers(100 * major + minor))) == 1

    @cached_property
    def _links(self) -> Links:
        """How fast ranks fetch weights; measured once."""
        links = measure_links(self._topology.neighbours, self._device, self._topology.reaches)
        everyone = self._topology.everyone
        return Links(
            min(everyone.numbers(links.peer_bytes_s)),
            min(everyone.numbers(links.host_bytes_s)),
            all(everyone.numbers(int(links.measured))),
        )

    def _budgets(self, limit: int | None) -> list[int | None]:
        """Bytes of weights for each rank's device: the limit, else what leaves some for what is computed.

        That is as if it held no other model: where there is no room beside others, these are evicted (`OutOfMemory`).
        None for CPUs without a limit.
        """
        if self._device.type == "cpu":
            return [limit] * self._topology.world_size
        _, total = torch.cuda.mem_get_info(self._device)
        room = int(total * FOR_WEIGHTS)
        return [*self._topology.everyone.numbers(limit if limit is not None and limit <= total else room)]


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
