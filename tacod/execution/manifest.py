"""The resident models, and what it takes to load them again."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tacod.checkpoint import locate, read_checkpoint
from tacod.execution.store import digests_of, tensors_of
from tacod.group.work import Facts, Load
from tacod.plan import AUTO, Request, Shape, make_plan, parse_request
from tacod.shares import EQUAL, Shares
from tacod_client.dtypes import of_numbers
from tacod_client.errors import ArgumentError, ModelNotFound
from tacod_client.wire import Tensor

__all__ = ["Manifest", "Model"]

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a number of a model, by its dtype."""
EVICTED = 64
"""Most evicted models that are remembered, so that they can be loaded again."""
EVICTED_TENSORS = 1 << 16
"""Most tensors that the patches of all of them may name."""


@dataclass(frozen=True)
class Model:
    """A model: its file and how it is loaded. The remaining fields are known once the ranks have loaded it."""

    id: str
    path: str
    identity: str
    dtype: str | None
    patches: Any = None
    """Weight patches as the client sent them, with real paths."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The identity of each file that the patches name, by its path."""
    asked_weights: str = "auto"
    """Where its load request wants the weights to lie."""
    asked_name: str = field(default="", compare=False)
    """The file's name in the request; in a hub's cache, links lead to a file of another name."""
    base: Model | None = None
    """The same model without patches, if this one has any; the ranks hold both, and they share what isn't patched."""
    family: str = ""
    parameters: int = 0
    weight_bytes: int = 0
    """On the rank that holds most, without what it shares with its base; until ranks report it, from the file's header.
    """
    sampling: dict[str, Any] = field(default_factory=dict)
    """What a client has to know to begin a run: the latent's channels, and the noise process."""
    loaded_s: float = 0.0
    asked: Request = AUTO
    """How its load request wants forwards to be split."""
    shape: Shape | None = None
    plan: str = ""
    notes: tuple[str, ...] = ()
    """What the ranks left out of the patches."""
    quantization: Mapping[str, int] = field(default_factory=dict)
    """How many of its layers have which format."""
    weights: str = ""
    """Where they lie: ``replicated``, ``sharded`` or ``host``."""
    resident_bytes: tuple[int, ...] = ()
    """On each rank's device."""
    streamed_bytes: tuple[int, ...] = ()
    """What each rank fetches in a forward."""
    network: str = ""
    """In words, whose network it is and how it is shared out, if it is none of this version's families."""
    shares_tokens: bool = True
    """Whether an image's tokens are shared out."""
    fetch_s: tuple[float, ...] = ()
    """How long that takes each rank; less of it is waited for, as the rank computes meanwhile."""
    shares: Shares | None = None
    """How much of its forwards each rank takes. New ranks keep to it: a run goes on as it has begun."""
    rates: tuple[float, ...] = ()
    """What plans of its forwards count with, as `Facts.rates`; new ranks keep to these too, and so to the plans."""

    hosts: tuple[int, ...] = ()
    """The number of each rank's host; empty for one host."""

    @property
    def name(self) -> str:
        """The file's name."""
        return self.asked_name or os.path.basename(self.path)

    def load(
        self,
        evict_models: Sequence[str] = (),
        memory_bytes: int | None = None,
        fewer: int = 0,
        shares: Shares | None = None,
    ) -> Load:
        """The command that loads it into so much memory of each rank, less some blocks, and evicts ``evict_models``.

        Ranks take the ``shares`` of an earlier load, if there was one, else those given, or they measure their paces.
        They take its rates as well: what is measured anew may lead to another plan, whose sums round otherwise.
        """
        known = self.shares or shares
        return Load(
            model=self.id,
            path=self.path,
            identity=self.identity,
            dtype=self.dtype,
            patches=self.patches,
            base=self.base.id if self.base else None,
            evict_models=list(evict_models),
            files=dict(self.files),
            weights=self.asked_weights,
            memory_bytes=memory_bytes,
            fewer=fewer,
            shares=None if known is None else list(known.each),
            shares_measured=known is not None and known.measured,
            rates=None if self.shares is None else list(self.rates),
        )

    def unloaded(self) -> Model:
        """The same model for ranks of another group, which know nothing of it, and may be too few for its plan."""
        base = None if self.base is None else self.base.unloaded()
        kept = {name: getattr(self, name) for name in ("patches", "files", "asked_weights", "asked_name")}
        return Model(self.id, self.path, self.identity, self.dtype, **kept, base=base, weight_bytes=self.weight_bytes)

    @property
    def file_paths(self) -> list[str]:
        """The real paths of the model's own file or folder, and of its patches' files."""
        return [self.path, *self.files]

    @cached_property
    def digests(self) -> list[bytes]:
        """The stored tensors that its patches name; they are needed for as long as it is to be resident."""
        return digests_of(self.patches)

    def loaded(self, facts: Facts, elapsed_s: float, world_size: int) -> Model:
        """The same model with what the ranks report about it."""
        return replace(
            self.placed(facts),
            family=facts.family,
            parameters=facts.parameters,
            dtype=facts.dtype,
            sampling=facts.sampling,
            notes=tuple(facts.notes),
            network=facts.network,
            shares_tokens=facts.shares_tokens,
            quantization=facts.quantization,
            loaded_s=elapsed_s,
            shape=Shape(facts.heads, facts.width),
            shares=Shares.of(facts.shares, facts.shares_measured),
            rates=tuple(facts.rates),
            hosts=tuple(facts.hosts),
        ).planned(self.asked, world_size)

    def placed(self, facts: Facts) -> Model:
        """The same model with what the ranks report about where its weights lie."""
        return replace(
            self,
            weight_bytes=facts.weight_bytes,
            weights=facts.weights,
            resident_bytes=tuple(facts.resident_bytes),
            streamed_bytes=tuple(facts.streamed_bytes),
            fetch_s=tuple(facts.fetch_s),
        )

    def planned(self, asked: Request, world_size: int) -> Model:
        """The same model with the plan for such a request, as far as it is known before a forward."""
        if self.shape is None:
            return self
        if not self.shares_tokens:
            asked = Request(sequence_parallel_degree=1, cfg_parallel=asked.cfg_parallel)
        shares = self.shares or EQUAL
        try:
            return replace(self, plan=str(make_plan(asked, world_size, self.shape, None, shares, self.hosts)))
        except ArgumentError as error:
            # It was asked for when there were more ranks.
            return replace(self, plan=f"none ({error.message})")

    def resized(self, world_size: int) -> Model:
        """The same model for another number of ranks: nothing is known of how fast they are."""
        base = None if self.base is None else self.base.resized(world_size)
        return replace(self, base=base, shares=None, rates=(), hosts=()).planned(self.asked, world_size)

    def to_wire(self) -> dict[str, Any]:
        """The model as ``status --json`` shows it."""
        return {
            "id": self.id,
            "name": self.name,
            "family": self.family,
            "path": self.path,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "patches": len(self.patches or ()),
            "dtype": self.dtype,
            "sampling": self.sampling,
            "plan": self.plan,
            "loaded_s": round(self.loaded_s, 3),
            "notes": list(self.notes),
            "network": self.network,
            "shares_tokens": self.shares_tokens,
            "quantization": dict(self.quantization),
            "weights": self.weights,
            "resident_bytes": list(self.resident_bytes),
            "streamed_bytes": list(self.streamed_bytes),
            "fetch_s": [round(each, 6) for each in self.fetch_s],
            "shares": [] if self.shares is None else list(self.shares.each),
            "shares_measured": self.shares is not None and self.shares.measured,
        }


class Manifest:
    """Loaded models by id, and evicted ones with what it takes to load them again."""

    def __init__(self, roots: Sequence[str], device: str = "cuda") -> None:
        self.roots = roots
        self.device = device
        self._models: dict[str, Model] = {}
        self._evicted: OrderedDict[str, Model] = OrderedDict()

    def __iter__(self) -> Iterator[Model]:
        return iter(list(self._models.values()))

    @property
    def known(self) -> list[Model]:
        """The loaded models, and the remembered ones."""
        return [*self._evicted.values(), *self._models.values()]

    def __contains__(self, model_id: str) -> bool:
        return model_id in self._models

    def find(self, model_id: str) -> Model:
        """A loaded model.

        Raises `ModelNotFound`.
        """
        if model_id not in self._models:
            raise ModelNotFound(f"no model {model_id!r} is loaded; `tacoctl models` lists them", model=model_id)
        return self._models[model_id]

    def describe(
        self, path: str, dtype: str | None, patches: Any, plan: Any, world_size: int, weights: str = "auto"
    ) -> Model:
        """The model that a load request means.

        Its id is a function of the file's state, the dtype, where the weights are to lie, and the patches.

        Raises a `ModelError` if the file may not or can't be loaded, `ArgumentError` for a plan that can't be.
        """
        asked = parse_request(plan, world_size)
        real = locate(path, self.roots)
        checkpoint = read_checkpoint(real)
        identity = checkpoint.identity
        # As the ranks choose it: fp32 on a CPU, the file's own on a GPU.
        compute = dtype or ("fp32" if self.device == "cpu" else None)
        expected = checkpoint.weight_bytes(_BYTES[of_numbers(compute)] if compute else None)
        known = [identity, dtype, *([weights] if weights != "auto" else [])]
        held = expected
        if weights == "host" or (weights == "sharded" and world_size > 1):
            # Two blocks are there besides, in buffers.
            blocks = checkpoint.block_bytes(_BYTES[of_numbers(compute)] if compute else None)
            shares = sum(blocks) // world_size if weights == "sharded" else 0
            held = min(expected, expected - sum(blocks) + shares + 2 * max(blocks, default=0))
        base = Model(_name(*known), real, identity, dtype, weight_bytes=held, asked=asked, asked_weights=weights)
        base = replace(base, asked_name=_last_name(path))
        if not patches:
            return base
        files: dict[str, str] = {}
        resolved = [self._resolve(index, patch, files) for index, patch in enumerate(patches)]
        contents = [_contents((patch, files.get(patch.get("path", ""), ""))) for patch in resolved]
        return replace(
            base,
            id=_name(*known, contents),
            patches=resolved,
            files=files,
            base=base,
            weight_bytes=0,
        )

    def _resolve(self, index: int, patch: Any, files: dict[str, str]) -> dict[str, Any]:
        """A patch with its file's real path, if it names one; that file's identity is put into ``files``."""
        if not isinstance(patch, dict):
            raise ArgumentError(f"patches[{index}]: expected a map, got {type(patch).__name__}", argument="patches")
        if "path" not in patch:
            return patch
        if not isinstance(patch["path"], str):
            raise ArgumentError(f"patches[{index}].path: expected a string", argument="patches")
        real = locate(patch["path"], self.roots)
        if real not in files:
            files[real] = read_checkpoint(real).identity
        return {**patch, "path": real}

    def recall(self, model_id: str) -> Model | None:
        """A loaded or a remembered model; None for any other id."""
        return self._models.get(model_id) or self._evicted.get(model_id)

    def add(self, model: Model) -> None:
        """Note that a model is resident."""
        self._evicted.pop(model.id, None)
        self._models[model.id] = model

    def note_placed(self, model_id: str, facts: Facts) -> None:
        """Ranks have loaded a resident model again, and may have had more or less room for it than others before."""
        self._models[model_id] = self._models[model_id].placed(facts)

    def remove(self, model_id: str) -> None:
        """Forget a model."""
        self._models.pop(model_id, None)
        self._evicted.pop(model_id, None)

    def resize(self, world_size: int) -> None:
        """There is another number of ranks from now on."""
        self._models = {name: model.resized(world_size) for name, model in self._models.items()}
        self._evicted = OrderedDict((name, model.resized(world_size)) for name, model in self._evicted.items())

    def evict(self, model_id: str) -> None:
        """A model is no longer resident; remember how to load it again, as far as there is room for that."""
        self.remember(self._models.pop(model_id))

    def remember(self, model: Model) -> None:
        """Remember how to load a model that isn't resident, as far as there is room for that."""
        self._evicted[model.id] = model
        tensors = [sum(1 for _ in tensors_of(each.patches)) for each in self._evicted.values()]
        while len(tensors) > EVICTED or sum(tensors) > EVICTED_TENSORS:
            self._evicted.popitem(last=False)
            tensors.pop(0)

    def forget_evicted(self) -> None:
        """Forget all models that aren't loaded: the configuration may allow others now."""
        self._evicted.clear()

    def note_plan(self, model_id: str, plan: str) -> None:
        """A model was just used, with this ``plan``."""
        model = self._models.pop(model_id, None)
        if model is not None:
            self._models[model_id] = model if model.plan == plan else replace(model, plan=plan)

    def patched(self, model_id: str) -> list[str]:
        """The ids of the models that are this one with patches; they are unloaded with it."""
        return [each.id for each in self if each.base is not None and each.base.id == model_id]

    def to_evict(
        self, model: Model, budget: int | None, variants: int, needed: Sequence[str] = (), gone: Collection[str] = ()
    ) -> list[str]:
        """The models to evict for ``model``, in order; those ``gone`` are evicted in any case.

        Afterwards there are no more than ``variants`` patched models of one base, and all fit in the memory budget, as
        far as the base allows. Models that are ``needed``, the most urgent first, go last.
        """
        evicted = list(gone)
        if model.base is not None:
            siblings = [each for each in self.patched(model.base.id) if each not in evicted]
            order = [each.id for each in self._in_order(needed) if each.id in siblings]
            evicted += order[: max(0, len(siblings) + 1 - variants)]
        staying = [each for each in self if each.id not in evicted]
        coming = [each for each in (model, model.base) if each is not None and (each.id not in self or each.id in gone)]
        # A model that is larger than the budget makes do with it.
        excess = sum(each.weight_bytes for each in staying) - (budget or 0)
        excess += min(sum(each.weight_bytes for each in coming), budget or 0)
        while budget is not None and excess > 0 and (next_one := self.next_to_go(model, evicted, needed)) is not None:
            evicted.append(next_one.id)
            excess -= next_one.weight_bytes
        return evicted

    def next_to_go(self, model: Model, gone: Collection[str] = (), needed: Sequence[str] = ()) -> Model | None:
        """The first model to evict for ``model`` after those that are ``gone``; None if there is none.

        ``model`` and its base stay, and so does the base of any patched model that stays: evicting it would free
        nothing.
        """
        staying = [each for each in self._in_order(needed) if each.id not in gone]
        kept = {model.id, *(each.base.id for each in (*staying, model) if each.base is not None)}
        return next((each for each in staying if each.id not in kept), None)

    def _in_order(self, needed: Sequence[str]) -> list[Model]:
        """The models in the order of eviction.

        The least recently used go first, then the needed ones, the least urgent first.
        """
        places = {model_id: place for place, model_id in reversed(list(enumerate(needed)))}
        return sorted(self, key=lambda each: -places.get(each.id, len(places) + len(needed)))


def _last_name(path: str) -> str:
    """The last name of a path; empty if it ends in ``.`` or ``..``."""
    name = os.path.basename(path.rstrip("/"))
    return "" if name in (".", "..") else name


def _name(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _contents(value: Any) -> Any:
    """A body as JSON, with digests in the place of tensors."""
    if isinstance(value, Tensor):
        digest = value.with_digest().digest
        assert digest is not None
        return digest.hex()
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {key: _contents(item) for key, item in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [_contents(item) for item in value]
    return value
