"""Takes a model's blocks apart while it is loaded: what isn't to stay whole on each rank goes into a depot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor

from tacod.rank.comm.group import Group
from tacod.rank.families.base import DiT
from tacod.rank.parallel.modulation import owners
from tacod.rank.weights.depot import Depot, HostSlabs, MakeSlab, PeerSlabs, Stored
from tacod.rank.weights.placement import Placement, Sizes, alternatives, choose, in_words
from tacod.rank.weights.sizes import SMALLEST
from tacod.rank.weights.stage import Buffers, Stage, Unit, assign, owner_of
from tacod_client.errors import OutOfMemory

__all__ = ["Streaming"]


class Streaming:
    """One load of a model whose weights may be stored apart. All ranks make the same calls in the same order.

    Args:
        group: All ranks.
        device: This rank's.
        asked: ``auto``, ``replicated``, ``sharded`` or ``host``; see `choose`.
        budgets: Bytes for weights on each rank's device; None for no limit.
        reaches: Whether the ranks reach each other's memory.
        smallest: Smaller tensors, in bytes, stay whole on each rank.
        fewer: By how many blocks each rank stays below its budget.
    """

    placement: Placement
    """Known once `begin` was called."""

    def __init__(
        self,
        group: Group,
        device: torch.device,
        asked: str,
        budgets: Sequence[int | None],
        reaches: bool,
        smallest: int = SMALLEST,
        fewer: int = 0,
    ) -> None:
        self._group = group
        self._device = device
        self._asked = asked
        self._budgets = budgets
        self._reaches = reaches
        self._fewer = fewer
        self.smallest = smallest
        self._sizes: Sizes | None = None
        """Known with `placement`."""
        self._within: dict[str, list[str]] = {}
        self._units: dict[str, Unit] = {}
        self._owners: dict[str, int] = {}
        self._depot: Depot | None = None

    def begin(self, model: DiT, sizes: Sizes) -> None:
        """Choose the placement of a model without weights, which will have these sizes.

        Raises `OutOfMemory` if there is none.
        """
        self._sizes = sizes
        self.placement = choose(self._asked, sizes, self._budgets, self._reaches, self._fewer)
        self._within = {path: [path] for path in sizes.blocks} | {"": []}
        for path in sizes.modulations:
            block = next((block for block in sizes.blocks if path.startswith(f"{block}.")), "")
            self._within[block].append(path)
        if not self.placement.streams:
            return
        gpu = self._device.type == "cuda"
        sharded = self.placement.kind == "sharded"

        def slabs() -> MakeSlab:
            return PeerSlabs(self._group) if sharded and gpu else HostSlabs(self._group, gpu, on_device=sharded)

        self._depot = Depot(self._group, slabs)
        if sharded:
            whose = owners([layer.out_features for layer in model.modulating], self._group.size)
            self._owners = dict(zip(sizes.modulations, whose, strict=True))

    def settle(self, model: DiT, path: str) -> None:
        """Store a block that is filled, and its modulations, unless they stay whole; or modulations in no block.

        ``path`` is the block's, or empty.
        """
        if self._depot is None:
            return
        for each in self._within[path]:
            if each not in self.placement.everywhere and (tensors := self._large(model, each)):
                self._units[each] = self._store(model, each, tensors, {})

    def finish(self, model: DiT) -> None:
        """Have the model fetch what this rank lacks."""
        if self._depot is not None:
            stage = self._stage(model, self._in_order(model))
            # A rank without memory for buffers has made all fail by then.
            self._depot.settle()
            model.weights = stage

    def __enter__(self) -> Streaming:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and self._depot is not None:
            # What this rank can't load the others won't.
            self._depot.abandon()

    def advised(self, error: OutOfMemory) -> OutOfMemory:
        """A lack of memory in a load of this model, or in a forward of it, with what would help.

        Its detail ``shrinks`` says whether ranks that hold fewer blocks can try again.
        """
        if self._sizes is None or "shrinks" in error.details:
            return error
        shrinks = self.placement.can_shrink and not (error.details.get("host") and self._device.type == "cuda")
        text = error.message if shrinks else f"{error.message}. {self._advice()}"
        return OutOfMemory(text, **{**error.details, "shrinks": shrinks})

    def _advice(self) -> str:
        """What this model takes, and what would take less."""
        assert self._sizes is not None
        held = max(self.placement.device_bytes)
        text = f"The model takes {in_words(held)} of each device"
        if self._asked != "auto":
            return f"{text}: {alternatives(self._asked, self._sizes, self._group.size, self._reaches)}"
        return f"{text}, and that can't be less" + (": it fetches all of its blocks" if self.placement.streams else "")

    def in_turn(self, base: DiT, patched: DiT, keys: Sequence[str]) -> Iterator[list[str]]:
        """Weights that patches change, in groups; ``base`` has those of a group in place until the next is asked for.

        By then ``patched``, which shares all others with ``base``, has its own of the group. At the end it fetches what
        this rank lacks of these too.
        """
        groups: dict[str, list[str]] = {}
        for key in keys:
            within = [path for path in self._units if key.startswith(f"{path}.")]
            groups.setdefault(max(within, key=len, default=""), []).append(key)
        yield groups.pop("", [])
        if self._depot is None or base.weights is None:
            return
        changed: dict[str, Unit] = {}
        modules = {base.get_submodule(path): path for path in groups}
        for module in base.weights.over(modules):
            path = modules[module]
            yield groups[path]
            known = {name: each for name, each in self._units[path].tensors.items() if _is_shared(base, patched, name)}
            tensors = {name: each for name, each in self._large(patched, path).items() if name not in known}
            if tensors:
                changed[path] = self._store(patched, path, tensors, known)
        units = [changed.get(unit.path, unit) for unit in self._in_order(base)]
        assert isinstance(base.weights, Stage)
        stage = self._stage(patched, units, base.weights.buffers)
        self._depot.settle()
        patched.weights = stage

    def streamed_bytes(self, model: DiT) -> list[int]:
        """What each rank fetches in a forward of a model that was loaded so, or of a patched one."""
        stage = model.weights
        return [stage.streamed_bytes(rank) if isinstance(stage, Stage) else 0 for rank in range(self._group.size)]

    def _stage(self, model: DiT, units: Sequence[Unit], buffers: Buffers | None = None) -> Stage:
        return Stage(model, units, self.placement.resident, self._group.rank, self._device, buffers)

    def _in_order(self, model: DiT) -> list[Unit]:
        first = [path for path in self._units if path not in model.blocks_at]
        return [self._units[path] for path in (*first, *model.blocks_at) if path in self._units]

    def _large(self, model: DiT, path: str) -> dict[str, Tensor]:
        """The tensors of a module that may be stored, by their paths: parameters and buffers, without modulations."""
        top = model.get_submodule(path)
        spared = {id(part) for layer in model.modulating if layer is not top for part in layer.modules()}
        found: dict[str, Tensor] = {}
        for name, module in top.named_modules(prefix=path):
            if id(module) in spared:
                continue
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.nbytes >= self.smallest:
                    found[f"{name}.{leaf}"] = tensor
        return found

    def _store(self, model: DiT, path: str, tensors: Mapping[str, Tensor], known: Mapping[str, Stored]) -> Unit:
        assert self._depot is not None
        stored = self._depot.store(list(tensors.values()), self._owners.get(path))
        if path not in self.placement.resident[self._group.rank]:
            for name, tensor in tensors.items():
                owner, leaf = owner_of(model, name)
                assign(owner, leaf, torch.empty_like(tensor, device="meta"))
        together = {**known, **dict(zip(tensors, stored, strict=True))}
        return Unit(path, together, modulates=path not in self._within)


def _is_shared(base: DiT, patched: DiT, name: str) -> bool:
    """Whether a model has another one's tensor."""
    tensors = []
    for model in (base, patched):
        try:
            owner, leaf = owner_of(model, name)
        except AttributeError:
            return False
        tensors.append(owner._parameters.get(leaf, owner._buffers.get(leaf)))
    return tensors[0] is not None and tensors[0] is tensors[1]
