"""The state of one forward on one rank: streams of tokens, and what blocks share.

A family's `begin` shards its inputs into streams, its blocks change them, and its `end` gathers the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from tacod.rank.ops.attention_kernels import Kernel
from tacod.rank.ops.fused import Residual
from tacod.rank.ops.group_bias import GroupBias
from tacod.rank.ops.qkv import QKV, Rotation
from tacod.rank.parallel.joint_attention import JointAttention, KeysValues
from tacod.rank.parallel.modulation import modulations
from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["Attention", "ForwardPass", "Stream", "Weights"]

T = TypeVar("T")


class Stream(Residual):
    """Tokens of one kind on this rank, [B, S, W]."""

    def __init__(
        self,
        tokens: Tensor,
        lengths: tuple[int, ...],
        rotation: Rotation | None = None,
        segments: Tensor | None = None,
        whole: bool = False,
    ) -> None:
        """Start a stream.

        Args:
            tokens: This rank's tokens, [B, S, W].
            lengths: How many tokens all ranks have together, of each part that was joined; most streams have one part.
            rotation: The rotary position of this rank's tokens.
            segments: For each of this rank's tokens the row of its modulation, int64 [S]; None if there is one row.
            whole: Whether each rank has all tokens, and computes the same for them.
        """
        super().__init__(tokens, segments)
        self.lengths = lengths
        self.rotation = rotation
        self.whole = whole


class Weights(Protocol):
    """Weights of which a rank lacks some (`tacod.rank.weights.stage`)."""

    def over(self, modules: Iterable[T]) -> Iterator[T]:
        """The modules one by one, each with its weights in place until the next is asked for."""

    def beside(self, module: T) -> AbstractContextManager[T]:
        """One more module with its weights in place."""

    def ahead(self, modules: Iterable[Any]) -> AbstractContextManager[None]:
        """A context in which `over` comes to these modules; the weights of the first ones are on their way at once."""


class Attention:
    """The handle of an attention that streams share; work between its calls overlaps communication."""

    def __init__(self, attention: JointAttention, sizes: Sequence[int]) -> None:
        self._attention = attention
        self._sizes = list(sizes)

    def start(self) -> None:
        """Attend, and begin to send results back."""
        self._attention.start()

    @property
    def kept(self) -> KeysValues:
        """The keys and values of these tokens, of an attention that was begun with ``keep`` and started."""
        return self._attention.kept

    def wait(self) -> tuple[Tensor, ...]:
        """For each stream, in order, what its tokens attended to: [B, S, H * D]. See `JointAttention.wait`."""
        return torch.split(self._attention.wait(), self._sizes, dim=1)


class ForwardPass:
    """One forward on one rank. Families add attributes of their own for what their blocks share."""

    image: Stream
    """The stream of the output; residuals and the step cache are for it."""

    def __init__(self, sequence: SequenceParallel, weights: Weights | None = None) -> None:
        """``weights`` fetches those that this rank lacks; None if it has all."""
        self.sequence = sequence
        self.weights = weights
        self.kernel: Kernel | None = None
        """What the blocks attend by; None for exact attention, and before the first block."""
        self.joined: tuple[Stream, list[Stream]] | None = None
        """While streams are joined: the joint stream, and those that it is made of."""
        self.outputs: tuple[Stream, ...] = ()
        """For a family with several latents, the streams of all of them: ``image``, and others that aren't joined to
        it."""
        self.prefix: Sequence[Tensor] = ()
        """What `DiT.prefix` has given for this forward's arguments."""
        self._modulation: dict[Any, Tensor] = {}

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

    def shard(
        self,
        tokens: Tensor,
        embed: Callable[[Tensor], Tensor] | None = None,
        rotation: Callable[[Callable[[Tensor], Tensor]], Rotation] | None = None,
        segments: Tensor | None = None,
    ) -> Stream:
        """A stream of this rank's chunk of ``tokens`` [B, N, W], which every rank has whole.

        ``embed`` is applied to the chunk only. ``rotation`` gets a function that takes this rank's chunk of a tensor
        [N, ...], and returns the rotation of these tokens. ``segments`` [N] has the row of each token's modulation.
        """
        mine = self.sequence.shard(tokens)
        mine = mine if embed is None else embed(mine)
        local = None if segments is None else self.sequence.shard(segments, dim=0)
        turned = None if rotation is None else rotation(lambda each: self.sequence.shard(each, dim=0))
        return Stream(mine, (tokens.shape[1],), turned, local)

    def gather(self, stream: Stream, tokens: Tensor) -> Tensor:
        """All ranks' ``tokens`` of a stream [B, S, C] as the whole, [B, N, C]."""
        return self.sequence.gather(tokens, sum(stream.lengths))

    def attend(
        self,
        *projections: tuple[Stream, Callable[[], QKV]],
        mask: Tensor | GroupBias | None = None,
        overlap: bool = False,
        before: KeysValues | None = None,
        keep: bool = False,
    ) -> Attention:
        """Begin attention over the tokens of these streams, on all ranks.

        Each projection gives a stream's queries, keys and values; the longest stream's is called first, and travels
        while the others are computed. ``mask`` is what `SequenceParallel.in_order_of_ranks` gives. ``overlap`` says
        that something is computed before `Attention.start`. With ``keep`` the handle has the tokens' keys and values
        afterwards; passed as ``before`` to another attention, without a mask, its tokens attend to them too.
        """
        streams = [project for _, project in projections]
        lengths = [stream.lengths for stream, _ in projections]
        attention = self.sequence.attend(streams, lengths, mask, overlap, before, keep, self.kernel)
        return Attention(attention, [stream.size for stream, _ in projections])

    def over(self, modules: Iterable[T]) -> Iterator[T]:
        """Modules one by one, each with its weights in place until the next is asked for; see `Weights.over`."""
        return iter(modules) if self.weights is None else self.weights.over(modules)

    def beside(self, module: T) -> AbstractContextManager[T]:
        """A module with its weights in place, for a block that uses one which isn't its own; see `Weights.beside`."""
        return nullcontext(module) if self.weights is None else self.weights.beside(module)

    def modulate(self, layers: Sequence[Any], conditioning: Tensor) -> None:
        """Compute the modulation of every layer for ``conditioning`` [B, W] or, for M segments, [B, M, W].

        The ranks share the layers out. `modulation` finds the results. Layers with another conditioning need another
        call.
        """
        values = modulations(layers, conditioning, self.sequence, self.over)
        self._modulation.update(zip(layers, values, strict=True))

    def modulation(self, layer: Any, parts: int) -> tuple[Tensor, ...]:
        """A layer's modulation in this many parts (shift, scale, gate, …), each [B, M, W]."""
        return self._modulation[layer].chunk(parts, dim=-1)

    def join(self, *streams: Stream) -> Stream:
        """Make one stream of these, in this order; `image` must be the last.

        If one of them has segments, tokens of those without get the first row of a modulation. Until `part` the streams
        have no tokens of their own, which would take as much memory once more.
        """
        rotations = [stream.rotation for stream in streams if stream.rotation is not None]
        segments = [stream.segments for stream in streams]
        joint = Stream(
            torch.cat([stream.tokens for stream in streams], dim=1),
            tuple(length for stream in streams for length in stream.lengths),
            Rotation.concatenate(rotations) if rotations else None,
            _joined_segments(segments, [stream.size for stream in streams]),
        )
        for stream in streams:
            stream.tokens = stream.tokens.to("meta")
        self.joined = joint, list(streams)
        return joint

    def part(self) -> None:
        """Undo `join`: each stream gets its tokens back."""
        if self.joined is not None:
            joint, streams = self.joined
            sizes = [stream.size for stream in streams]
            for stream, tokens in zip(streams, torch.split(joint.tokens, sizes, dim=1), strict=True):
                stream.tokens = tokens
            self.joined = None

    def state(self) -> Callable[[], None]:
        """Remember this forward as it is now; the function that is returned brings it back. Tensors aren't copied."""
        kept = [(each, dict(vars(each))) for each in (self, *_streams_in(list(vars(self).values())))]

        def back() -> None:
            for each, values in kept:
                vars(each).clear()
                vars(each).update(values)

        return back

    @property
    def image_tokens(self) -> Tensor:
        """This rank's image tokens [B, S, W], as a view if streams are joined."""
        if self.joined is None:
            return self.image.tokens
        joint, _ = self.joined
        return joint.tokens[:, joint.size - self.image.size :]

    @property
    def output_tokens(self) -> list[Tensor]:
        """This rank's tokens of each output stream, the image's first."""
        return [self.image_tokens, *(stream.tokens for stream in self.outputs[1:])]

    @property
    def streams(self) -> list[Stream]:
        """The streams that blocks change now."""
        if self.joined is not None:
            return [self.joined[0]]
        return [value for value in vars(self).values() if isinstance(value, Stream)]


def _streams_in(values: Iterable[Any]) -> Iterator[Stream]:
    """The streams among these values, and in lists, tuples and maps of them; some more than once."""
    for value in values:
        if isinstance(value, Stream):
            yield value
        elif isinstance(value, list | tuple):
            yield from _streams_in(value)
        elif isinstance(value, dict):
            yield from _streams_in(value.values())


def _joined_segments(segments: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Of streams of these sizes as one; None where none has any."""
    given = next((each for each in segments if each is not None), None)
    if given is None:
        return None
    parts = [given.new_zeros(size) if each is None else each for each, size in zip(segments, sizes, strict=True)]
    return torch.cat(parts)
