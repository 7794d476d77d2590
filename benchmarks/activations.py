"""What a forward takes of a rank's memory beside the weights, at published sizes, without a GPU.

The forward runs on PyTorch's device ``meta``, on which tensors have shapes and no values, as one of several ranks, with
stand-ins for the other ranks and for the kernels. Counted are tensors that are alive at the same time, at the most,
and the memory that ranks exchange heads through. An allocator takes more, and so do workspaces of libraries.

    python benchmarks/activations.py [--models wan_14b …] [--sizes 1280x720x121 …] [--ranks 1 2 3 4] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import types
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import published
import torch
from published import PUBLISHED, Size
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tacod.rank import ops
from tacod.rank.comm import transport
from tacod.rank.comm.group import Group
from tacod.rank.comm.peers import Peer
from tacod.rank.families import detect
from tacod.rank.parallel.sequence import SequenceParallel

META = torch.device("meta")
GIB = 1 << 30
MODELS = (
    "wan_14b",
    "wan_5b",
    "hunyuan_video",
    "hunyuan_video_1.5",
    "ltx2_19b",
    "ltx2.3_21b",
    "minimax_h3_full",
    "kandinsky5_pro",
)
SIZES = ("1280x720x121", "1280x720x241")


class Shapes(Group):
    """A rank of a group of which there is no other: what it receives has shapes alone."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def _to_all(self, sent: Tensor, receive: Sequence[int]) -> Tensor:
        return sent.new_empty(sum(receive))

    def maximum(self, number: Tensor) -> Tensor:
        """See `Group.maximum`."""
        return number


class Block:
    """Memory that ranks exchange through; its size is counted, and not what is seen of it."""

    total = 0

    def __init__(self, size: int) -> None:
        Block.total += size

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype, start: int) -> Tensor:
        """See `tacod.rank.comm.peers.Block.view`."""
        with uncounted():
            return torch.empty(shape, dtype=dtype, device=META)

    def send(self, source: Tensor, target: Tensor) -> None:
        """See `tacod.rank.comm.peers.Block.send`."""

    def barrier(self, clock: Any) -> None:
        """See `tacod.rank.comm.peers.Block.barrier`."""


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations have made and that are still alive."""

    counts = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta and Alive.counts:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key in given and key not in self._users:
                    # A view of a weight, or of what came in.
                    continue
                if not self._users[key]:
                    self.now += size
                self._users[key] += 1
                weakref.finalize(tensor, self._drop, key, size)
        self.most = max(self.most, self.now)
        return out

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= size


@contextmanager
def uncounted() -> Iterator[None]:
    """What is made meanwhile counts elsewhere."""
    Alive.counts = False
    try:
        yield
    finally:
        Alive.counts = True


def _kernels() -> Any:
    """Stand-ins for the kernels: they allocate the same, and compute nothing."""
    module: Any = types.ModuleType("tacod.rank.ops.kernels")

    def rows(x: Tensor, added: Any = None, norm: Any = None, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        total = x if added is None else torch.empty_like(x)
        return total, total if norm is None else torch.empty_like(x)

    module.rows = rows
    module.gated_silu = lambda one, other: one.new_empty(one.shape)
    module.pack = module.copy = lambda *_, **__: None
    return module


def _has_kernels(x: Tensor) -> bool:
    return x.is_meta


def measure(name: str, size: Size, ranks: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """The tokens of all ranks, those of the first rank, and the bytes that it takes."""
    model = PUBLISHED[name]
    family, config = detect({}, dict(model.config))
    with torch.device(META):
        dit = family(config)
    for key, value in dit.state_dict(keep_vars=True).items():
        value.data = value.data.to(dit.dtype_of(key, dtype))
    inputs = dit.prepare(published.make_inputs(name, dit.eval().requires_grad_(False), size, META))
    group = Shapes(0, ranks)
    Block.total = 0
    sequence = SequenceParallel(group, group, Group(), transport=Peer(group, Block) if ranks > 1 else None)
    alive = Alive()
    with ExitStack() as patches, torch.inference_mode():
        for module in ("fused", "qkv", "linear"):
            # A mock would remember, and so keep, each tensor that it was asked about.
            patches.enter_context(mock.patch(f"tacod.rank.ops.{module}.has_kernels", _has_kernels))
        patches.enter_context(mock.patch.object(ops, "kernels", _kernels(), create=True))
        # As on a GPU.
        patches.enter_context(mock.patch.object(transport.Local, "open", lambda _, deal, __: transport._Packed(deal)))
        with alive:
            dit.run(sequence, inputs)
    tokens = sum(dit.lengths(inputs))
    return tokens, sum(sequence.sizes(n)[0] for n in dit.lengths(inputs)), alive.most + Block.total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS, choices=sorted(PUBLISHED))
    parser.add_argument("--sizes", nargs="*", default=[*map(Size.parse, SIZES)], type=Size.parse)
    parser.add_argument("--ranks", nargs="*", default=[1, 2, 3, 4], type=int)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    args = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    titles = [f"{n} ranks, GiB" if n > 1 else "1 rank, GiB" for n in args.ranks]
    print(f"| model | size | tokens | {' | '.join(titles)} | bytes for each token of a share |")
    print("| --- " * (len(args.ranks) + 4) + "|")
    for name in args.models:
        for size in args.sizes:
            told = [measure(name, size, n, dtype) for n in args.ranks]
            _, share, nbytes = told[-1]
            sizes = " | ".join(f"{each / GIB:.2f}" for _, _, each in told)
            print(f"| {name} | {size} | {told[0][0]:,} | {sizes} | {nbytes / share:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
