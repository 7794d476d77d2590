"""The processes that tests run forwards on; `Ranks` starts them.

Run as a script, this file imports what they need and forks them. Each reads cases as JSON lines and answers each with
what it measured.
"""

from __future__ import annotations

import bisect
import functools
import gc
import itertools
import json
import math
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import made_up
import made_up_attention
import made_up_exchanges
import torch
import torch.distributed as dist
from attention_cases import largest_error
from conformance import at_level, each_latent, random_case, required_inputs, smallest_inputs, tiny, with_optional
from fake_graphs import graphs_on_cpu
from fake_kernels import EightBits, fakes
from helpers import FLUX, SD3, Golden, read_golden, relative_error
from hypothesis import strategies as st
from shared_block import SharedBlock, reach_shared
from torch.distributed import distributed_c10d
from torch.nn import functional
from whole import POSITION, WholeSequences

from tacod.checkpoint import read_checkpoint
from tacod.plan import DEFAULT_POLICY, AttentionPolicy, Layout, Plan, Shape
from tacod.rank.comm.group import Group
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward import warmup
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call, compute_prefix, equal, relative_difference, run
from tacod.rank.forward.step_graph import StepGraph
from tacod.rank.forward.warmup import warm_up
from tacod.rank.ops.attention_kernels import Obstacle
from tacod.rank.ops.packed.float8 import Nvfp4Linear, quantize_nvfp4
from tacod.rank.ops.qkv import QKV
from tacod.rank.ops.sdpa import attend
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Topology
from tacod.rank.weights.load import get_weight, load_model, set_weight, share, weight_bytes
from tacod.rank.weights.placement import Placement, Sizes, _placed
from tacod.rank.weights.reader import Reader
from tacod.rank.weights.remap import identify
from tacod.rank.weights.sizes import sizes_of
from tacod.rank.weights.stage import Buffers, Stage
from tacod.rank.weights.streaming import Streaming
from tacod.shares import Shares
from tacod_client.errors import ArgumentError, ModelCorrupt, OutOfMemory, TacodError

WORLD = 5
LAYOUTS = [
    (batch, ulysses, ring)
    for batch in range(1, WORLD + 1)
    for ulysses in range(1, WORLD // batch + 1)
    for ring in range(1, WORLD // batch // ulysses + 1)
]
"""Every layout of these ranks, as degrees of batch, Ulysses and ring."""
UNEQUAL = [
    # Of each kind, on two to five ranks; also without the first one, and with one that gets hardly a head or a token.
    (1, 2, 1, (2, 1, 0, 0, 0)),
    (1, 3, 1, (8, 5, 5, 0, 0)),
    (1, 1, 3, (5, 0, 8, 5, 0)),
    (2, 1, 1, (0, 1, 0, 3, 0)),
    (2, 2, 1, (1, 3, 2, 2, 0)),
    (1, 2, 2, (3, 1, 1, 2, 0)),
    (1, 5, 1, (20, 1, 20, 31, 26)),
]
"""Layouts with unequal shares of all ranks, 0 for an idle one."""


@st.composite
def unequal(draw: st.DrawFn, layouts: Sequence[tuple[int, ...]]) -> tuple[Any, ...]:
    """One of these layouts with any shares of any ranks."""
    layout = draw(st.sampled_from(layouts))
    busy = math.prod(layout)
    shares = draw(st.lists(st.integers(1, 20), min_size=busy, max_size=busy))
    members = draw(st.permutations(range(WORLD)))[:busy]
    each = dict(zip(members, shares, strict=True))
    return (*layout, tuple(each.get(rank, 0) for rank in range(WORLD)))


class Ranks:
    """The processes of one gloo world; every case runs on all of them, in a layout."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        # Triton chooses its interpreter when it is imported.
        environment["TRITON_INTERPRET"] = "1"
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        cases, answers = zip(*((os.pipe(), os.pipe()) for _ in range(WORLD)), strict=True)
        self._cases = [os.fdopen(write, "w", buffering=1) for _, write in cases]
        self._answers = [os.fdopen(read) for read, _ in answers]
        theirs = [number for (read, _), (_, write) in zip(cases, answers, strict=True) for number in (read, write)]
        self._process = subprocess.Popen(
            [sys.executable, __file__, f"file://{folder / 'rendezvous'}", *map(str, theirs)],
            stdin=subprocess.DEVNULL,
            pass_fds=theirs,
            env=environment,
            start_new_session=True,
        )
        for number in theirs:
            os.close(number)

    def run(self, layout: tuple[Any, ...], verb: str, **case: Any) -> list[Any]:
        """What each rank measured; of those that the layout leaves idle, what they have to say."""
        for cases in self._cases:
            cases.write(json.dumps({"layout": layout, "verb": verb, **case}) + "\n")
        answers = [each.readline() for each in self._answers]
        assert all(answers), "a rank died; its traceback is on stderr"
        return [answer for answer in map(json.loads, answers) if answer is not None]

    def close(self) -> None:
        """End the processes by closing their input."""
        for cases in self._cases:
            cases.close()
        # Each rank closes its end when it ends.
        for answers in self._answers:
            if not select.select([answers], [], [], 10)[0]:
                os.killpg(self._process.pid, signal.SIGKILL)
            answers.close()
        self._process.wait()


def projected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], QKV]:
    """As a fused projection would give them."""
    return lambda: QKV(torch.stack((q, k, v), dim=2).flatten(2), q.shape[2])


def all_to_all(received: Sequence[torch.Tensor], sent: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """As NCCL's, which gloo lacks."""
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
    works = [dist.isend(each, ranks[i], group) for i, each in enumerate(sent) if i != me and each.numel()]
    works += [dist.irecv(each, ranks[i], group) for i, each in enumerate(received) if i != me and each.numel()]
    received[me].copy_(sent[me])
    for work in works:
        work.wait()


@functools.cache
def golden_named(name: str) -> Golden:
    """A golden forward, read once."""
    return read_golden(name)


@functools.lru_cache(maxsize=4)
def golden_model(name: str, dtype: str = "float32") -> Any:
    """Its model, built once for all cases that follow each other."""
    return golden_named(name).model(getattr(torch, dtype))


@functools.lru_cache(maxsize=1)
def saved_model(name: str, path: str) -> Any:
    """Its model from its file: bits may depend on how weights lie in memory, so both models come by the same way."""
    return load_model(read_checkpoint(path), torch.float32, torch.device("cpu"))


@functools.cache
def native_golden(name: str) -> Any:
    """A golden model as on a device that multiplies its format."""
    with mock.patch("tacod.rank.weights.packing.has_product", return_value=True):
        return golden_named(name).model()


@functools.cache
def native_tiny(family: str) -> Any:
    """A family's tiny model, every linear layer of it in nvfp4, as on a device that multiplies it."""
    dit = share(tiny(family))
    for name, layer in list(dit.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            dit.set_submodule(name, native_nvfp4(layer))
    return dit


def native_nvfp4(layer: torch.nn.Linear) -> Nvfp4Linear:
    """A layer in nvfp4, whose tokens have one scale for all of them."""
    scale = layer.weight.abs().amax() / 2688
    padded = functional.pad(layer.weight, (0, -layer.in_features % 16))
    numbers, blocks = quantize_nvfp4(torch.unflatten(padded, 1, (-1, 16)), scale)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = (torch.searchsorted(levels, numbers.abs()) + 8 * (numbers < 0)).to(torch.uint8).flatten(1)
    data = codes[:, ::2] << 4 | codes[:, 1::2]
    return Nvfp4Linear(data, blocks, scale, layer.in_features, layer.bias, layer.weight.dtype, native=True)


@functools.cache
def device() -> Any:
    """What gloo's groups of this process send and receive by."""
    return dist.ProcessGroupGloo.create_device(interface="lo")


class OnOneDevice(dist.ProcessGroupGloo):
    """A group on the device of all of this process's groups: each device has a thread that wakes 100 times a second."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [device()]
        options._timeout = timeout
        super().__init__(store, rank, size, options)


def joined(outs: Sequence[Any]) -> Any:
    """Outputs of some images each as that of all."""
    return list(map(torch.cat, zip(*outs, strict=True))) if isinstance(outs[0], list) else torch.cat(outs)


def holding(counts: Sequence[int], asked: str, sizes: Sizes, *_: Any) -> Placement:
    """A placement in which each rank holds the first so many blocks whole."""
    return _placed(asked, sizes, [frozenset([*sizes.blocks][:count]) for count in counts], (0,) * len(counts))


Walk = tuple[list[Any], list[bool]]
"""What each step of a run gave, and which were skipped."""


def walk(family: str, forwards: Forwards, layout: Layout, threshold: float, mine: slice, native: bool = False) -> Walk:
    """Some steps of a run of two images, or of those of them that are ``mine``."""
    dit = native_tiny(family) if native else tiny(family)
    start = required_inputs(dit, batch=2)
    plan = Plan(layout, forwards.topology.world_size, Shape(dit.heads, dit.width), step_cache=threshold)
    outs, skipped = [], []
    generator = torch.Generator().manual_seed(1)
    for n, level in enumerate(torch.linspace(1, 0.1, 8).tolist()):
        moved = each_latent(start, lambda each, n=n: each + 0.05 * n * torch.randn(each.shape, generator=generator))
        inputs = dit.prepare(at_level(dit, moved, level).images(mine))
        before = forwards.skipped
        outs.append(forwards(Call(dit, plan, inputs)))
        skipped.append(forwards.skipped > before)
    return outs, skipped


@functools.cache
def first_that_skips(family: str, batch: int, native: bool = False) -> tuple[float, list[Walk]]:
    """The least of some thresholds at which each of ``batch`` groups of two images skips something alone; and how."""
    groups = [slice(i, i + 2 // batch) for i in range(0, 2, 2 // batch)]
    thresholds = [0.01 * 1.4**n for n in range(20)]

    @functools.cache
    def alone(threshold: float) -> list[Walk]:
        return [walk(family, Forwards(Topology()), Layout(1, 1, 1), threshold, mine, native) for mine in groups]

    # Until its first skip a walk is the same at every threshold, so what skips something at one does so at all above.
    found = bisect.bisect_left(thresholds, True, key=lambda each: all(any(skipped) for _, skipped in alone(each)))
    return thresholds[found], alone(thresholds[found])


class Rank:
    """One rank's side of the cases; each verb returns what the test looks at."""

    def __init__(self, rank: int, rendezvous: str) -> None:
        torch.set_num_threads(1)
        distributed_c10d.ProcessGroupGloo = OnOneDevice
        dist.init_process_group("gloo", rendezvous, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))

        @functools.cache
        def group_of(part: tuple[int, ...]) -> dist.ProcessGroup:
            return dist.new_group(part)

        def make_group(parts: list[list[int]]) -> dist.ProcessGroup:
            groups = [group_of(tuple(part)) for part in parts]
            return next(group for group, part in zip(groups, parts, strict=True) if rank in part)

        self.topology = Topology(rank, WORLD, make_group)
        self.sharing = Topology(rank, WORLD, make_group, reach_shared)
        self._native: tuple[Any, Any] = None, None

    def golden(
        self,
        layout: Layout,
        name: str,
        dtype: str = "float32",
        sharing: bool = False,
        exchange: Any = "exact",
        kernel: str = "exact",
    ) -> float:
        """How far a golden forward is from ComfyUI's; ``kernel`` is a fake one."""
        golden = golden_named(name)
        model = golden_model(name, dtype)
        with fakes():
            out = self._run(layout, model, golden.arguments(model), sharing, exchange, kernel)
        return relative_error(out, golden.out)

    def unlike(self, layout: Layout, kernel: str, ranks: list[int]) -> str:
        """What a forward says if a rank's card can't run a kernel, and another rank has no package for it."""
        reasons = dict(zip(ranks, (Obstacle.DEVICE, Obstacle.PACKAGE), strict=True))
        mine = reasons.get(self.topology.rank, Obstacle.NONE)
        plan = Plan(layout, WORLD, Shape(SD3.model.heads, SD3.model.width), AttentionPolicy(kernel=kernel))
        call = Call(SD3.model, plan, Inputs(SD3.inputs(), SD3.model.arguments()))
        with fakes(), mock.patch.object(EightBits, "obstacle", return_value=mine):
            try:
                Forwards(self.topology)(call)
            except ArgumentError as error:
                return str(error)
        return ""

    def masked(self, layout: Layout, kernel: str) -> str:
        """What a forward says whose attention has a mask, and another one after it whether the ranks go on."""
        model, inputs = FLUX.model, FLUX.inputs(batch=2)
        plan = Plan(layout, WORLD, Shape(model.heads, model.width), AttentionPolicy(kernel=kernel))
        tokens = sum(model.lengths(Inputs(inputs, model.arguments())))
        forwards, said = Forwards(self.topology), []
        # Every rank is to come to the end of a long one too.
        forwards.watch = watch = mock.Mock()
        with fakes():
            for more in ({"attention_mask": torch.zeros(1, tokens, tokens)}, {}):
                try:
                    forwards(Call(model, plan, Inputs({**inputs, **more}, model.arguments())))
                except ArgumentError as error:
                    said.append(f"{error.argument}: {error}")
        assert watch.begin.call_count == 2
        assert watch.end.call_count == (2 if layout.ranks < WORLD else 1)
        return " and ".join(said)

    def streamed(
        self,
        layout: Layout,
        name: str,
        path: str,
        weights: str,
        everyone: bool = False,
        parts: Sequence[float] | None = None,
        counts: Sequence[int] | None = None,
        fewer: int = 0,
        alike: bool = True,
        hosts: Sequence[int] = (),
    ) -> tuple[bool, int, int, int] | None:
        """Whether a golden forward is the same to the bit if the ranks hold its weights, at ``path``, together.

        Also what this rank holds, what it was expected to hold, and what it fetches. The ranks are those of the layout,
        or ``everyone``. Each may hold the least that it has to, and its one of ``parts`` of what there is besides; or
        it holds the first so many blocks whole, as ``counts`` say. They may be on several ``hosts``.
        """
        sequence = self._sequence(layout)
        near = self._neighbours(hosts)
        group = self.topology.everyone if everyone else sequence.whole if sequence is not None else None
        if group is None:
            return None
        cpu = torch.device("cpu")
        budgets: list[int | None] = [None] * group.size
        if parts is not None:
            family, config, checkpoint = identify(read_checkpoint(path))
            with torch.device("meta"):
                empty = family(config)
            sizes = sizes_of(empty, checkpoint, torch.float32, smallest=0)
            budgets = [sizes.least + int(part * (sizes.total - sizes.least)) for part in parts]
        with ExitStack() as held:
            if counts is not None:
                held.enter_context(mock.patch("tacod.rank.weights.streaming.choose", partial(holding, counts)))
            streaming = Streaming(
                group, cpu, weights, budgets, True, smallest=0, fewer=fewer, alike=alike, hosts=hosts, near=near
            )
            held.enter_context(streaming)
            model = load_model(read_checkpoint(path), torch.float32, cpu, streaming=streaming)
        fetched = streaming.streamed_bytes(model)[group.rank]
        if sequence is None:
            return None
        plain = saved_model(name, path)
        inputs = golden_named(name).arguments(plain)
        if layout.batch > 1:
            inputs = inputs.images(slice(0, 1))
        with torch.inference_mode():
            wanted = plain.run(sequence, inputs)
            # The second time the buffers hold what the first one has left there.
            outs = [model.run(sequence, inputs) for _ in range(2)]
        same = all(equal(out, wanted) for out in outs)
        expected = streaming.placement.device_bytes[group.rank]
        return same, weight_bytes(model), expected, fetched

    def _neighbours(self, hosts: Sequence[int]) -> Group | None:
        """The group of this rank's host, if the first ranks are on several; all ranks call it."""
        of_each = [[rank for rank, each in enumerate(hosts) if each == host] for host in dict.fromkeys(hosts)]
        return self.topology._group(sorted(of_each, key=len, reverse=True)) if hosts else None

    def reading_load(
        self, layout: Layout, path: str, weights: str, counts: Sequence[int] | None = None, alike: bool = True
    ) -> tuple[list[list[int]], int, int] | None:
        """Where this rank reads a model's file in a load, as starts and ends.

        Also how many bytes of the host's memory all ranks' segments take together, and what is stored there.
        """
        sequence = self._sequence(layout)
        if sequence is None:
            return None
        group, read, ranges = sequence.whole, os.preadv, []

        def counted(file: int, buffers: Sequence[Any], offset: int) -> int:
            count = read(file, buffers, offset)
            ranges.append([offset, offset + count])
            return count

        with ExitStack() as held:
            if counts is not None:
                held.enter_context(mock.patch("tacod.rank.weights.streaming.choose", partial(holding, counts)))
            held.enter_context(mock.patch.object(os, "preadv", counted))
            cpu = torch.device("cpu")
            streaming = Streaming(group, cpu, weights, [None] * group.size, True, smallest=0, alike=alike)
            with streaming:
                model = load_model(read_checkpoint(path), torch.float32, cpu, streaming=streaming)
        assert isinstance(model.weights, Stage)
        stored = [each for unit in model.weights.units for each in unit.tensors.values()]
        slabs = {id(each.slab): each.slab for each in stored}
        return (
            ranges,
            sum(len(part) for each in slabs.values() for part in each.segments),
            sum(each.nbytes for each in stored),
        )

    def failing_load(self, layout: Layout, path: str, failing: int, what: str, hosts: Sequence[int] = ()) -> str | None:
        """What a load of the file says, on one rank of which something fails some time, or the buffers do."""
        sequence = self._sequence(layout)
        near = self._neighbours(hosts)
        if sequence is None:
            return None
        group = sequence.whole
        streaming = Streaming(
            group, torch.device("cpu"), "sharded", [None] * group.size, True, smallest=0, hosts=hosts, near=near
        )
        owner, name_of, moment, error = {
            "block": (streaming, "store", 2, MemoryError("none")),
            "corrupt": (streaming, "store", 2, ModelCorrupt("a scale isn't finite")),
            "changed": (Reader, "check", 1, ModelCorrupt("the file changed")),
            "file": (os, "memfd_create", 1, OSError("none")),
            "reserve": (os, "posix_fallocate", 1, OSError("none")),
            "map": (mmap, "mmap", 2, OSError("none")),
            "buffers": (Buffers, "of", 0, torch.OutOfMemoryError("none")),
        }[what]
        original, count = getattr(owner, name_of), itertools.count()

        def fails(*arguments: Any) -> Any:
            if next(count) == moment and group.rank == failing:
                raise error
            return original(*arguments)

        with mock.patch.object(owner, name_of, fails):
            try:
                with streaming:
                    load_model(read_checkpoint(path), torch.float32, torch.device("cpu"), streaming=streaming)
            except (MemoryError, TacodError, torch.OutOfMemoryError) as error:
                return f"{type(error).__name__}: {error}"
        return "loaded"

    def failing_patch(
        self, layout: Layout, name: str, path: str, weights: str, failing: int
    ) -> tuple[str, bool, bool] | None:
        """What patching says if one rank fails in the middle.

        Also whether the base is as it was, and can be patched then.
        """
        sequence = self._sequence(layout)
        if sequence is None:
            return None
        group, golden, cpu = sequence.whole, golden_named(name), torch.device("cpu")

        def patch(model: Any, patched: Any, fails: bool) -> None:
            keys = [name for name, each in plain.named_parameters() if each.ndim == 2 and "blocks" in name]
            for number, some in enumerate(streaming.in_turn(model, patched, keys)):
                if number == 2 and fails:
                    raise MemoryError("none")
                for key in some:
                    set_weight(patched, key, 1.01 * get_weight(model, key))

        plain = saved_model(name, path)
        with Streaming(group, cpu, weights, [None] * group.size, True, smallest=0) as streaming:
            model = load_model(read_checkpoint(path), torch.float32, cpu, streaming=streaming)
        said = "patched"
        with torch.inference_mode():
            try:
                with streaming:
                    patch(model, share(model), group.rank == failing)
            except (MemoryError, OutOfMemory) as error:
                said = f"{type(error).__name__}: {error}"
            inputs = golden.arguments(plain)
            unchanged = equal(model.run(sequence, inputs), plain.run(sequence, inputs))
            patched, wanted = share(model), share(plain)
            with streaming:
                patch(model, patched, fails=False)
            for key, each in plain.named_parameters():
                if each.ndim == 2 and "blocks" in key:
                    set_weight(wanted, key, 1.01 * each)
            works = equal(patched.run(sequence, inputs), wanted.run(sequence, inputs))
        return said, unchanged, works

    def _run(
        self,
        layout: Layout,
        model: Any,
        inputs: Mapping[str, Any],
        sharing: bool = False,
        exchange: Any = "exact",
        kernel: str = "exact",
    ) -> Any:
        policy = AttentionPolicy(exchange=exchange, kernel=kernel)
        plan = Plan(layout, WORLD, Shape(model.heads, model.width), policy)
        topology = self.sharing if sharing else self.topology
        with torch.inference_mode():
            known = inputs if isinstance(inputs, Inputs) else Inputs(inputs, model.arguments())
            return run(Call(model, plan, known), topology)

    def warm_up(self, layout: Layout, alone: Sequence[float | None], asked: Sequence[int] | None = None) -> Any:
        """The rates that this rank has measured, and the shares, where a forward took each rank alone so long.

        None is for one that had no room for it.
        """
        took = alone[self.topology.rank]
        found: Any = {"return_value": took}
        if took is None:
            found = {"side_effect": torch.OutOfMemoryError("CUDA out of memory")}
        with mock.patch("tacod.rank.forward.warmup._alone_s", **found):
            # Its usual latent is small.
            forwards = Forwards(self.topology)
            rates, shares = warm_up(SD3.model, forwards, torch.device("cpu"), asked and Shares.of(asked))
        return None if rates is None else [rates.flops, rates.bytes, rates.collective_s], shares.each

    def pace(self, layout: Layout, slow: int) -> Any:
        """The shares that a warm-up measures where a forward takes one rank some seconds more than it does here."""
        original, more = warmup._alone_s, 9.0 * (self.topology.rank == slow)
        with mock.patch("tacod.rank.forward.warmup._alone_s", lambda *given: original(*given) + more):
            return warm_up(SD3.model, Forwards(self.topology), torch.device("cpu")).shares.each

    def _sequence(
        self, layout: Layout, sharing: bool = False, policy: AttentionPolicy = DEFAULT_POLICY
    ) -> SequenceParallel | None:
        seat = (self.sharing if sharing else self.topology).seat(layout)
        return None if seat is None else seat.sequence(policy)

    def attention(
        self,
        layout: Layout,
        heads: int,
        batch: int,
        lengths: list[int],
        seed: int,
        cuts: Sequence[int] = (),
        sharing: bool = False,
        overlap: bool = False,
    ) -> float | None:
        sequence = self._sequence(layout, sharing, AttentionPolicy(split_kv=bool(cuts)))
        if sequence is None:
            return None

        def in_runs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> Iterator[torch.Tensor]:
            edges = sorted({0, q.shape[2], *(cut for cut in cuts if cut < q.shape[2])})
            for begin, end in itertools.pairwise(edges) if len(edges) > 1 else [(0, 0)]:
                yield attend(q[:, :, begin:end], k, v)

        torch.manual_seed(seed)
        q, k, v = torch.randn(3, batch, sum(lengths), heads, 16)
        expected = torch.split(SequenceParallel().attend([projected(q, k, v)], lengths).wait(), lengths, dim=1)
        local = [torch.cat([sequence.shard(part) for part in torch.split(t, lengths, dim=1)], dim=1) for t in (q, k, v)]
        with mock.patch("tacod.rank.parallel.joint_attention.attend_pieces", in_runs):
            attending = sequence.attend([projected(*local)], lengths, overlap=overlap)
            if overlap:
                attending.start()
            mine = attending.wait().clone()
        outs = torch.split(mine, [sequence.sizes(length)[sequence.whole.rank] for length in lengths], dim=1)
        whole = [sequence.gather(out, length) for out, length in zip(outs, lengths, strict=True)]
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(whole, expected, strict=True) if b.numel()]
        return max(errors) if all(map(math.isfinite, errors)) else math.inf

    def made_up(self, layout: Layout, **case: Any) -> float:
        return made_up.error(self.topology, layout, **case)

    def exchanged(self, layout: Layout, **case: Any) -> Any:
        """See `made_up_exchanges.error`."""
        sequence = self._sequence(layout)
        return None if sequence is None else made_up_exchanges.error(sequence, **case)

    def called(self, layout: Layout, **case: Any) -> Any:
        """See `made_up_attention.called`."""
        return made_up_attention.called(self.topology, layout, **case)

    def checked(self, layout: Layout, **case: Any) -> Any:
        """See `made_up_attention.checked`."""
        return made_up_attention.checked(self.topology, **case)

    def network_graphs(self, layout: Layout, sharing: bool, **case: Any) -> Any:
        """See `made_up_attention.graphed`."""
        with torch.inference_mode():
            return made_up_attention.graphed(self.sharing if sharing else self.topology, layout, **case)

    def variant(self, layout: Layout, sharing: bool, **case: Any) -> float | None:
        sequence = self._sequence(layout, sharing)
        return None if sequence is None else largest_error(sequence, **case)

    def sent(self, layout: Layout, **case: Any) -> int | None:
        """How often a copy engine is asked for."""
        with mock.patch.object(SharedBlock, "send", autospec=True, side_effect=SharedBlock.send) as send:
            error = self.attention(layout, sharing=True, **case)
        assert error is None or error <= 2e-6
        return None if error is None else send.call_count

    def forward(self, layout: Layout, family: str, seed: int, sharing: bool, **case: Any) -> float:
        """How far a forward in a layout is from that on one rank."""
        dit = tiny(family)
        inputs = random_case(dit, seed, **case)
        expected = self._from_first(lambda: dit.run(SequenceParallel(), inputs))
        return relative_difference(self._run(layout, dit, inputs, sharing), expected)

    def native(self, layout: Layout, name: str, golden: bool = False, **case: Any) -> tuple[float, float]:
        """How far a forward of floats in blocks times such is from that on one rank.

        Of a golden model, or of a family's tiny one with everything in nvfp4. The second number is the same where every
        rank scales by its own tokens.
        """
        dit = native_golden(name) if golden else native_tiny(name)
        inputs = golden_named(name).arguments(dit) if golden else random_case(dit, **case)
        with mock.patch("tacod.rank.families.chroma_radiance._TILE", 4):
            # All layouts of one model follow each other.
            if self._native[0] != (name, golden):
                self._native = (name, golden), self._from_first(lambda: dit.run(SequenceParallel(), inputs))
            _, expected = self._native
            error = relative_difference(self._run(layout, dit, inputs), expected)
            with mock.patch.object(Group, "maximum", lambda self, number: number):
                return error, relative_difference(self._run(layout, dit, inputs), expected)

    def whole(self, layout: Layout, family: str, **case: Any) -> list[str]:
        """What makes a tensor of the whole sequence here that is larger than latents, outside of attention."""
        dit = tiny(family)
        inputs = random_case(dit, **case)
        lengths = dit.lengths(inputs)
        x = inputs.latents[0]
        shapes = tuple(x.shape), dit.output_shapes([tuple(each.shape) for each in inputs.latents])[0]
        made = dit.lengths(required_inputs(dit, inputs.batch, case["text"], case["sides"]))[-1]
        numbers = max(math.prod(shape[1:]) for shape in shapes) // made + POSITION
        with WholeSequences([lengths[-1], sum(lengths), math.prod(x.shape[2:])], numbers, inputs.batch) as whole:
            self._run(layout, dit, inputs)
        return sorted(whole.found)

    def kernels(self, layout: Layout, family: str) -> tuple[float, int]:
        """How far a forward with the GPU's kernels, interpreted, is from that without; and how many were run.

        It has as many images as ranks. The last rank alone runs kernels, as an interpreter takes milliseconds for each
        row: its tokens begin in the middle of the sequence, and the others compute on with what it gives them.
        """
        dit = tiny(family)
        # Few tokens: the interpreter takes each row of a kernel by itself.
        inputs = with_optional(dit, smallest_inputs(dit, batch=layout.ulysses, text=3), most=2)
        expected = self._from_first(lambda: dit.run(SequenceParallel(), inputs))
        last = self.topology.rank == layout.ranks - 1
        with ExitStack() as patches:
            modules = ("fused", "qkv")
            has = [mock.patch(f"tacod.rank.ops.{module}.has_kernels", return_value=last) for module in modules]
            asked = [patches.enter_context(each) for each in has]
            out = self._run(layout, dit, inputs, sharing=True)
        return relative_difference(out, expected), last * sum(each.call_count for each in asked)

    def steps(self, layout: Layout, family: str, native: bool = False) -> tuple[list[bool], float, list[list[bool]]]:
        """Of a run of some steps: which were skipped, the largest error, and which each group's images skip alone."""
        with torch.inference_mode():
            threshold, expected = self._from_first(lambda: first_that_skips(family, layout.batch, native))
            outs, skipped = walk(family, Forwards(self.topology), layout, threshold, slice(None), native)
        wholes = [joined(parts) for parts in zip(*(each for each, _ in expected), strict=True)]
        error = max(relative_difference(*each) for each in zip(outs, wholes, strict=True))
        return skipped, error, [each for _, each in expected]

    def graphed_steps(self, layout: Layout, family: str) -> tuple[bool, list[int]]:
        """Whether a run with a step cache gives the same with graphs and without, and how often each was replayed."""
        with torch.inference_mode():
            # Of groups that decide by themselves, each skips at other steps.
            threshold = self._from_first(lambda: first_that_skips(family, layout.batch)[0]) if layout.batch > 1 else 1e9
            plain = walk(family, Forwards(self.topology, graphs=False), layout, threshold, slice(None))
            with graphs_on_cpu():
                forwards = Forwards(self.topology)
                graphed = walk(family, forwards, layout, threshold, slice(None))
        (graph,) = [each for each in forwards._captured() if isinstance(each, StepGraph)]
        same = plain[1] == graphed[1] and all(equal(*each) for each in zip(plain[0], graphed[0], strict=True))
        counted = vars(graph).get("_first_graph"), vars(graph).get("_rest_graph"), vars(graph).get("_skip_graph")
        return same, [0 if each is None else each.replays for each in counted]

    def prefixes(
        self, layout: Layout, family: str, seed: int, sharing: bool, prompts: str, room: float, **case: Any
    ) -> tuple[bool, list[bool], int]:
        """Forwards along a run, one for each letter of ``prompts``, of which each is a conditioning of its own.

        Whether all equal, to the bit, those that keep nothing; which found their prefix; and the bytes that are kept.
        ``room`` is for so many prefixes.
        """
        dit = tiny(family)
        inputs = {letter: random_case(dit, seed + place, **case) for place, letter in enumerate(sorted(set(prompts)))}
        plan = Plan(layout, WORLD, Shape(dit.heads, dit.width))
        topology = self.sharing if sharing else self.topology
        one = compute_prefix(Call(dit, plan, inputs["a"]), topology).most_bytes
        keeping, plain = Forwards(topology, prefix_bytes=int(room * one)), Forwards(topology, prefix_bytes=0)
        exact, found = [], []
        for step, letter in enumerate(prompts):
            given = inputs[letter]
            given = each_latent(given, lambda each, step=step: each + 0.1 * step)
            given = given.replace(timestep=given["timestep"] * (1 - 0.1 * step))
            before = keeping.prefixes.hits
            outs = [each(Call(dit, plan, given, conditioning=letter)) for each in (keeping, plain)]
            exact.append(equal(*outs))
            found.append(keeping.prefixes.hits > before)
        assert plain.prefix_bytes == plain.prefixes.hits == 0
        return all(exact), found, keeping.prefix_bytes

    def _from_first(self, compute: Callable[[], Any]) -> Any:
        """What the first rank computes, on all."""
        with torch.inference_mode():
            found = [compute() if self.topology.rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def gather(self, layout: Layout, dtype: str, shape: list[int], dim: int, lists: bool) -> bool | None:
        sequence = self._sequence(layout)
        if sequence is None:
            return None
        tokens = torch.arange(torch.Size(shape).numel()).reshape(shape).to(getattr(torch, dtype))
        with ExitStack() as patches:
            if lists:
                patches.enter_context(mock.patch.object(Group, "on_gpu", True))
                patches.enter_context(mock.patch.object(dist, "all_to_all", all_to_all))
            return torch.equal(sequence.gather(sequence.shard(tokens, dim), shape[dim], dim), tokens)

    def timing(self, layout: Layout) -> tuple[float, float, float] | None:
        sequence = self._sequence(layout)
        if sequence is None:
            return None
        clock = self.topology.clock
        clock.take_s()
        begin = time.perf_counter()
        tokens = sequence.shard(torch.zeros(1, 10, 4, 8))
        sequence.attend([projected(tokens, tokens, tokens)], [10]).wait()
        wall = time.perf_counter() - begin
        return clock.take_s(), wall, clock.take_s()


def main(rendezvous: str, *numbers: str) -> None:
    # gloo reports its connections on stdout.
    os.dup2(2, 1)
    places = [(int(read), int(write)) for read, write in zip(numbers[::2], numbers[1::2], strict=True)]
    # As the fork server of a daemon does: no collection visits what was imported.
    gc.freeze()
    for rank, (read, write) in enumerate(places):
        if os.fork() == 0:
            for number in {each for place in places for each in place} - {read, write}:
                os.close(number)
            serve(Rank(rank, rendezvous), read, write)
            return
    for place in places:
        for number in place:
            os.close(number)
    for _ in places:
        os.wait()


def layout_of(degrees: Sequence[Any]) -> Layout:
    """A layout from its degrees, which the shares of all ranks may follow."""
    batch, ulysses, ring, *shares = degrees
    return Layout(batch, ulysses, ring, *map(tuple, shares))


def serve(rank: Rank, read: int, write: int) -> None:
    with open(read) as cases, open(write, "w") as answers:
        for line in cases:
            case = json.loads(line)
            layout, verb = layout_of(case.pop("layout")), case.pop("verb")
            # As in the ranks: memory that they share is made by one case and written by others.
            with torch.inference_mode():
                answer = getattr(rank, verb)(layout, **case)
            print(json.dumps(answer), file=answers, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
