"""Takes a model's blocks apart while it is loaded: what isn't to stay whole on each rank goes into a depot."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

import torch
from torch import Tensor, nn

from tacod.rank.comm.group import Group
from tacod.rank.families.base import DiT
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.weights.depot import Depot, HostSlabs, MakeSlab, Owner, OwnSlabs, PeerSlabs
from tacod.rank.weights.parts import assign, get, parts_of
from tacod.rank.weights.placement import Links, Placement, Sizes, alternatives, choose, holders
from tacod.rank.weights.sizes import SMALLEST
from tacod.rank.weights.skeleton import Skeleton
from tacod.rank.weights.stage import Buffers, Stage, Unit, owner_of
from tacod_client.errors import OutOfMemory, TacodError
from tacod_client.units import size as in_words

__all__ = ["Streaming", "Turn"]


@dataclass(frozen=True)
class Turn:
    """Units that ranks fill before these are stored; all ranks have the same turns."""

    mine: list[str]
    """Those of this rank, by their paths."""
    stored: list[tuple[int | None, str]] = field(default_factory=list)
    """Those of all ranks, each with the rank that fills it, or with None if all do; none if ranks keep what they have
    filled.
    """


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
        links: Tells how fast ranks fetch; all ask at once.
        alike: Whether all devices are of one kind. Otherwise layers that one rank packs may not suit another's device,
            and each rank reads all of the file.
        hosts: The number of each rank's host; empty for one host. On several, each rank reads all of the file.
        near: The ranks of this one's host.
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
        links: Callable[[], Links] = Links,
        alike: bool = True,
        hosts: Sequence[int] = (),
        near: Group | None = None,
    ) -> None:
        self._group = group
        self._device = device
        self._asked = asked
        self._budgets = budgets
        self._reaches = reaches
        self._fewer = fewer
        self._ask_links = links
        self._links = Links()
        self._hosts = tuple(hosts) or (0,) * group.size
        self._near = near or group
        self._neighbours = [rank for rank, host in enumerate(self._hosts) if host == self._hosts[group.rank]]
        self._alike = alike and len({*self._hosts}) == 1
        self.smallest = smallest
        self._sizes: Sizes | None = None
        """Known with `placement`."""
        self._blocks: frozenset[str] = frozenset()
        """The paths of the blocks."""
        self._units: dict[str, Unit] = {}
        self._holders: dict[str, int] = {}
        """Which of the host's ranks holds a modulation, by its path."""
        self._depot: Depot | None = None

    def begin(self, model: DiT, sizes: Sizes) -> None:
        """Choose the placement of a model without weights, which will have these sizes.

        Raises `OutOfMemory` if there is none.
        """
        fits = all(budget is None or budget >= sizes.total for budget in self._budgets) and not self._fewer
        if self._asked != "replicated" and not (self._asked == "auto" and fits):
            self._links = self._ask_links()
        self.placement = choose(self._asked, sizes, self._budgets, self._reaches, self._fewer, self._links, self._hosts)
        self._sizes = sizes
        self._blocks = frozenset(sizes.blocks)
        if not self.placement.streams:
            return
        gpu = self._device.type == "cuda"
        sharded = self.placement.kind == "sharded"

        def slabs() -> MakeSlab:
            if sharded and self._near.size == 1:
                return OwnSlabs(self._device)
            return PeerSlabs(self._near) if sharded and gpu else HostSlabs(self._near, gpu, on_device=sharded)

        self._depot = Depot(self._group, slabs, host=gpu and not sharded, near=self._near)
        if sharded:
            outs = [layer.out_features for layer in model.modulating]
            whose = holders(outs, self._hosts, self._hosts[self._group.rank])
            self._holders = dict(zip(sizes.modulations, map(self._neighbours.index, whose), strict=True))

    @property
    def units(self) -> Collection[str]:
        """The paths of the modules that are stored each by itself: blocks, and modulations within them or elsewhere."""
        return {} if self._sizes is None else self._sizes.units

    def turns(self, order: Sequence[str]) -> list[Turn]:
        """Who fills which of these units, and of an empty path what is in none; ``order`` is that of their files.

        What all ranks keep whole they fill first, each for itself. Each of the others is filled by one rank alone: a
        modulation by the rank that holds it, a block by the one that has the least to do.
        """
        assert self._sizes is not None
        everyones = [path for path in order if not path or path in self.placement.everywhere]
        if self._depot is None:
            return [Turn(list(order))]
        if not self._alike:
            others = [path for path in order if path not in everyones]
            return [Turn(everyones), *(Turn([path], [(None, path)]) for path in others)]
        queues: list[list[str]] = [[] for _ in range(self._group.size)]
        done = [0] * self._group.size
        for path in order:
            if path not in everyones:
                rank = self._holders.get(path, min(range(len(done)), key=done.__getitem__))
                queues[rank].append(path)
                done[rank] += self._sizes.units[path]
        turns = [Turn(everyones)]
        while any(queues):
            # As much as fits beside the buffers that come later.
            taken = [_first(queue, self._sizes) for queue in queues]
            turns.append(
                Turn(taken[self._group.rank], [(rank, path) for rank, paths in enumerate(taken) for path in paths])
            )
            queues = [queue[len(paths) :] for queue, paths in zip(queues, taken, strict=True)]
        return turns

    def store(self, model: DiT, turn: Turn) -> None:
        """Store the units that the ranks have filled at their turn.

        On every rank their layers become what the rank that filled them has made of them.
        """
        if not turn.stored:
            return
        assert self._depot is not None
        rank = self._group.rank
        own = [Skeleton.of(self._tensors(model, path), self._packed(model, path), self.smallest) for path in turn.mine]
        everyones = list(map(Skeleton.unpack, self._depot.exchange(Skeleton.pack(own)))) if self._alike else []
        units = []
        for loader, path in turn.stored:
            skeleton = None if loader is None else next(everyones[loader])
            if skeleton is None or loader == rank:
                tensors = self._tensors(model, path)
            else:
                tensors = skeleton.fill(model, self._device)
            units.append({name: each for name, each in tensors.items() if each.nbytes >= self.smallest})
        whose = [Owner(loader, self._holders.get(path)) for loader, path in turn.stored]
        stored = self._depot.store([list(unit.values()) for unit in units], whose)
        for (_, path), tensors, parts in zip(turn.stored, units, stored, strict=True):
            _take_away(model, tensors)
            if tensors:
                self._units[path] = Unit(path, dict(zip(tensors, parts, strict=True)), path not in self._blocks)

    def finish(self, model: DiT) -> None:
        """Have the model fetch what this rank lacks."""
        if self._depot is None:
            return
        self._depot.settle()
        for path in self.placement.resident[self._group.rank] & self._units.keys():
            for name, each in self._units[path].tensors.items():
                assign(*owner_of(model, name), each.read(self._device))
        stage = self._stage(model, self._in_order(model))
        # A rank without memory for these has made all fail by then.
        self._depot.settle()
        model.weights = stage

    def __enter__(self) -> Streaming:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and self._depot is not None:
            # What this rank can't load the others won't.
            self._depot.abandon(error if isinstance(error, TacodError) else None)

    def advised(self, error: OutOfMemory) -> OutOfMemory:
        """A lack of memory in a load of this model, or in a forward of it, with what would help.

        Its detail ``shrinks`` says whether ranks that hold fewer blocks can try again.
        """
        if self._sizes is None or "shrinks" in error.details:
            return error
        # Blocks that a GPU gives up would take more of the host.
        host = error.details.get("host") and self._device.type == "cuda"
        shrinks = self.placement.can_shrink and not host
        text = error.message if shrinks or host else f"{error.message}. {self._advice()}"
        return OutOfMemory(text, **{**error.details, "shrinks": shrinks})

    def _advice(self) -> str:
        """What this model takes, and what would take less."""
        assert self._sizes is not None
        held = max(self.placement.device_bytes)
        text = f"The model takes {in_words(held)} of each device"
        if self._asked != "auto":
            return f"{text}: {alternatives(self._asked, self._sizes, self._fewest_near, self._reaches)}"
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
            tensors = {
                name: each
                for name, each in self._tensors(patched, path).items()
                if name not in known and each.nbytes >= self.smallest
            }
            if tensors:
                (stored,) = self._depot.store([list(tensors.values())], [Owner(holder=self._holders.get(path))])
                if path not in self.placement.resident[self._group.rank]:
                    _take_away(patched, tensors)
                together = {**known, **dict(zip(tensors, stored, strict=True))}
                changed[path] = Unit(path, together, path not in self._blocks)
        units = [changed.get(unit.path, unit) for unit in self._in_order(base)]
        assert isinstance(base.weights, Stage)
        stage = self._stage(patched, units, base.weights.buffers)
        self._depot.settle()
        patched.weights = stage

    def streamed_bytes(self, model: DiT) -> list[int]:
        """What each rank fetches in a forward of a model that was loaded so, or of a patched one. All ask at once."""
        stage = model.weights
        fetched = [stage.streamed_bytes(rank) if isinstance(stage, Stage) else 0 for rank in range(self._near.size)]
        # Of other hosts' ranks only they know it.
        return fetched if self._near.size == self._group.size else self._group.numbers(fetched[self._near.rank])

    def fetch_s(self, model: DiT) -> list[float]:
        """How long each rank fetches in a forward, at the speed of the links; empty if that wasn't measured."""
        if not self._links.measured:
            return []
        return self._links.seconds(replace(self.placement, streamed_bytes=tuple(self.streamed_bytes(model))))

    @property
    def _fewest_near(self) -> int:
        """How many ranks the host with the fewest has."""
        return min(map(self._hosts.count, self._hosts))

    def _stage(self, model: DiT, units: Sequence[Unit], buffers: Buffers | None = None) -> Stage:
        resident = [self.placement.resident[rank] for rank in self._neighbours]
        return Stage(model, units, resident, self._near.rank, self._device, buffers, self._group.size)

    def _in_order(self, model: DiT) -> list[Unit]:
        first = [path for path in self._units if path not in model.blocks_at]
        return [self._units[path] for path in (*first, *model.blocks_at) if path in self._units]

    def _tensors(self, model: DiT, path: str) -> dict[str, Tensor]:
        """The plain tensors of a unit by their paths: parameters, buffers and parts of them.

        There are none of other units within it.
        """
        return {
            f"{name}.{leaf}{behind}": part
            for name, module in self._modules(model, path)
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
            for behind, part in parts_of(tensor)
        }

    def _packed(self, model: DiT, path: str) -> dict[str, PackedLinear]:
        """The packed layers of a unit, by their paths."""
        return {name: each for name, each in self._modules(model, path) if isinstance(each, PackedLinear)}

    def _modules(self, model: DiT, path: str) -> Iterator[tuple[str, nn.Module]]:
        top = model.get_submodule(path)
        spared = {id(part) for layer in model.modulating if layer is not top for part in layer.modules()}
        return ((name, each) for name, each in top.named_modules(prefix=path) if id(each) not in spared)


def _first(queue: Sequence[str], sizes: Sizes) -> list[str]:
    """The first units of a queue, of the largest one's bytes together, at most."""
    taken: list[str] = []
    size = 0
    for path in queue:
        size += sizes.units[path]
        if taken and size > sizes.largest:
            break
        taken.append(path)
    return taken


def _take_away(model: DiT, tensors: Mapping[str, Tensor]) -> None:
    """Leave nothing but shapes in the places of tensors."""
    for name, tensor in tensors.items():
        # Not `empty_like`: on the meta device it is computed in Python, and imports PyTorch's compiler.
        assign(*owner_of(model, name), torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))


def _is_shared(base: DiT, patched: DiT, name: str) -> bool:
    """Whether a model has another one's tensor."""
    tensors = []
    for model in (base, patched):
        try:
            tensors.append(get(*owner_of(model, name)))
        except AttributeError:
            return False
    return tensors[0] is not None and tensors[0] is tensors[1]
