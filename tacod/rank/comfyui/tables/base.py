"""What a table says: where a network's tokens are, which of them attend together, and what a small forward needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

__all__ = [
    "Added",
    "Attention",
    "Blocks",
    "Cut",
    "Heads",
    "LinearAttention",
    "Mask",
    "Shapes",
    "Table",
    "Whole",
    "Window",
    "any_of",
    "patches",
    "width_in",
]

Shapes = Mapping[str, Any]
"""The shapes of a call's tensors by name, and lists of shapes for lists of tensors."""


@dataclass(frozen=True)
class Cut:
    """Where an argument holds tokens: those of these runs, one behind the other, along a dimension.

    The first block's hold those of one run each, or of two of which `Table.leading` tells where they meet.
    """

    dim: int
    runs: tuple[str, ...]
    dims: int = 1
    """Along how many dimensions tokens lie, from ``dim`` on. Blocks get theirs along the first; the others are 1."""
    tail: bool = False
    """Whether an argument with fewer tokens has the last ones of the run, which has no frames."""
    mask: bool = False
    """Whether blocks attend by a mask that they make of it, so that each rank's has its own keys alone."""
    crop: str = ""
    """The argument that says how many of the first tokens count. Nothing looks at the others, and they are left out."""


@dataclass(frozen=True)
class Mask:
    """A mask of small forwards: ones, and behind them some zeros, as whole numbers."""

    shape: tuple[int, ...]
    hidden: int = 0
    """How many zeros there are at the end of the last dimension."""


@dataclass(frozen=True)
class Whole:
    """Whole numbers of small forwards, one by one, such as tokens that stand for an image."""

    values: tuple[Any, ...]
    """In tuples within each other, of as many dimensions as the tensor has."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        sizes, each = [], self.values
        while isinstance(each, tuple):
            sizes.append(len(each))
            each = each[0]
        return tuple(sizes)


@dataclass(frozen=True)
class Window:
    """Attention to near tokens alone: ranks gather keys and values, and each has the mask for its own tokens."""

    size: str
    """The module's attribute that says how far apart they may be; None there is for attention to all."""


@dataclass(frozen=True)
class LinearAttention:
    """Attention by sums over tokens: ranks add up theirs. The first matrix product in the module gives the sums."""


@dataclass(frozen=True)
class Heads:
    """Attention that needs all tokens in their places, such as in windows: ranks exchange tokens for heads around it.

    Tokens are one packed sequence, [S, C]. Between the two modules a rank has all tokens and its heads of them.
    """

    begin: str
    """The module within whose result has queries, keys and values of the tokens, side by side. Of several results the
    others are of tokens that every rank has, such as a text's."""
    end: str
    """The module within that gets what attention gives, in the same order."""
    count: str
    """The attribute that says how many heads there are."""
    parts: int = 3
    """How many tensors lie side by side."""


Attention = tuple[str, ...] | Window | LinearAttention | Heads | None
"""What a module's attention is over: see `Blocks.attention`."""


@dataclass(frozen=True)
class Blocks:
    """A list of blocks, or one module between them, and what they are called with."""

    path: str
    """Where it is in the network."""
    along: Mapping[str, Cut] = field(default_factory=dict)
    """Arguments that each block gets whole, such as rotary tables; a rank's block gets its tokens'."""
    counts: Mapping[str, str] = field(default_factory=dict)
    """Arguments that say how many of the first tokens of a run are meant, or tensors of how many each image of a packed
    sequence has; a rank's block gets how many it has. ``name.part`` is an attribute of an argument."""
    attention: Mapping[str, Attention] = field(default_factory=dict)
    """The runs that attend together in a module, by its path in the block; all of them in modules without an entry. A
    `Window` is for near tokens alone, None for cross-attention, whose keys every rank has."""
    causal: str = ""
    """The argument by which blocks are given their attention, if it is causal among the first run's tokens, while
    the other run's attend to all."""
    convolutions: tuple[str, ...] = ()
    """Convolutions over neighbouring tokens, by their paths in the block. Ranks send each other the edges of chunks."""
    within: tuple[Blocks, ...] = ()
    """Modules in each block that get such arguments too; their paths are in the block."""


@dataclass(frozen=True)
class Added:
    """What a ControlNet adds to the tokens of the run ``image``."""

    name: str
    """ComfyUI's name of the list of residuals."""
    count: Callable[[Any], int]
    """How many of them the network takes."""
    whole: bool = False
    """Whether each must be for all of the image's tokens; otherwise it may be for the first ones."""

    def probe(self, network: Any, tokens: int, width: int) -> Mapping[str, Any]:
        """Shapes of residuals for a small forward with so many tokens."""
        return {self.name: [(1, tokens, width)] * self.count(network)}


@dataclass(frozen=True)
class Table:
    """How a network's tokens are split: a few lines for a family."""

    network: str
    """The class: its module, without ``comfy.ldm.``, and its name."""
    blocks: tuple[Blocks, ...]
    """In the order in which they run, without anything between them that looks at several tokens."""
    tokens: Mapping[str, Cut]
    """The arguments of the first block that hold tokens; each rank's first block gets its chunk of each run."""
    gather: tuple[str, tuple[str, ...]]
    """The module whose result is made whole again, or the list whose last block's result is; and the runs that it
    holds, one behind the other. Of several results that is the first, and nothing may look at the others."""
    heads: Callable[[Any], int]
    """The network's attention heads."""
    width: Callable[[Any], int]
    """The network's channels of a token."""
    lengths: Callable[[Any, Shapes], tuple[int, ...]]
    """About how many tokens there are of each run, the image's last, from the network and the arguments' shapes."""
    probe: Callable[[Any], Mapping[str, Any]]
    """The arguments of a small forward, ``x`` among them: shapes of noise, `Mask`, lists of these, or plain values."""
    further: Callable[[Any], Sequence[Mapping[str, Any]]] = lambda network: ()
    """What other small forwards have beside it, or lack if it is None. A call is split if it has the arguments of one
    of them."""
    attention_names: tuple[str, ...] = ()
    """Where the network's modules name ComfyUI's attention, if they don't hand it the options of a call: module and
    name, without ``comfy.ldm.``."""
    frame: Callable[[Any, Shapes], int] = lambda network, shapes: 0
    """Of how many tokens a frame is, if blocks look at frames; each rank then has its chunk of every frame. 0 if not.
    """
    leading: Callable[[Any, Mapping[str, Any]], int] = lambda network, arguments: 0
    """How many tokens the first of two runs has, from the network and a call's arguments."""
    control: Added | None = None
    """What it takes of a ControlNet; None if it takes nothing."""
    between: bool = False
    """Whether something between the blocks needs whole tensors. It gets them, with nothing of other ranks' tokens."""
    unfit: Callable[[Any, Shapes], str] = lambda network, shapes: ""
    """Why a call of these shapes can't be split, although its arguments are those of a small forward; or nothing."""

    @property
    def exchanges_exactly(self) -> bool:
        """Whether ranks exchange something for which there is no encoding in 8 bits."""
        kinds = [each for blocks in self.blocks for each in blocks.attention.values()]
        return any(isinstance(each, LinearAttention | Heads | Window) for each in kinds)

    @property
    def masks_own_keys(self) -> bool:
        """Whether a rank's blocks may attend by a mask of its own keys, which ranks have to put together."""
        return any(cut.mask for blocks in self.blocks for cut in blocks.along.values())

    def probes(self, network: Any) -> list[dict[str, Any]]:
        """The arguments of all small forwards."""
        base = self.probe(network)
        made = [dict(base), *({**base, **more} for more in self.further(network))]
        if self.control is not None:
            shapes = {name: value for name, value in base.items() if isinstance(value, tuple)}
            added = self.control.probe(network, self.lengths(network, shapes)[-1], self.width(network))
            made += [{**each, "control": added} for each in made]
        return [{name: value for name, value in each.items() if value is not None} for each in made]


def any_of(**optional: Any) -> tuple[Mapping[str, Any], ...]:
    """Small forwards with one or several of these arguments."""
    counts = range(1, len(optional) + 1)
    return tuple(dict(some) for count in counts for some in combinations(optional.items(), count))


def patches(shape: tuple[int, ...], *sizes: int) -> int:
    """How many patches of these sizes a latent has, along its last dimensions."""
    count = 1
    for side, size in zip(shape[-len(sizes) :], sizes, strict=True):
        count *= -(-side // size)
    return count


def width_in(layer: Any) -> int:
    """The input channels of a linear layer."""
    channels: int = layer.in_features
    return channels
