"""What a model family is: a module whose parameters carry the names of the published single files.

A family keeps the key layout of its authors' single-file checkpoints, which is ComfyUI's too. So weights are
copied by name, weight patches (LoRA) apply by name, and the arithmetic is in the order that ComfyUI has.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.plan import Pace
from tacod.rank.families.noise import Process
from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client import wire
from tacod_client.errors import ArgumentError, ModelUnsupported
from tacod_client.tensors import from_wire, rows


@dataclass(frozen=True)
class Argument:
    """What a forward's argument must look like.

    ``shape`` holds an int for a fixed size and a name for a free one; the same name means the same size in every
    argument of one forward. ``"B"`` is the batch, along which images go to ranks; a tensor without it is whole on every
    rank. ``None`` stands for a value that is no tensor.
    """

    shape: tuple[int | str, ...] | None
    required: bool = True
    many: bool = False
    """A list of such tensors; free sizes other than ``"B"`` may differ between its members."""
    choices: tuple[str, ...] = ()
    """For ``shape=None``: the strings it may be."""
    also: Mapping[str, str] = field(default_factory=dict)
    """Other strings that it may be, each with the choice that it stands for."""
    mask: bool = False
    """Added to scores; it may be boolean too, where false hides what it stands for."""
    fp32: bool = False
    """It stays fp32, whatever the model computes in: what is embedded there, such as timesteps and guidance."""
    shared: bool = False
    """Its batch may also be 1: one for all images."""

    @property
    def batch_axis(self) -> int | None:
        """The dimension that counts images; None if there is none."""
        return self.shape.index("B") if self.shape is not None and "B" in self.shape else None

    def images(self, value: Any, mine: slice) -> Any:
        """Some images' share of a tensor, or of each in a list; of what all images share, all."""
        if isinstance(value, list):
            return [self.images(each, mine) for each in value]
        axis = self.batch_axis
        if axis is None or not isinstance(value, Tensor) or (self.shared and value.shape[axis] == 1):
            return value
        return value[(slice(None),) * axis + (mine,)]


@dataclass(frozen=True)
class Numbers:
    """An argument that is a map of numbers by these names; none of them has to be there."""

    names: tuple[str, ...]
    required: bool = False


@dataclass(frozen=True)
class Number:
    """An argument that is one number within bounds, the same for all images of a forward."""

    least: float
    most: float
    required: bool = False


@dataclass(frozen=True)
class Residuals:
    """What a ControlNet adds to the image's tokens after each block, as ComfyUI's ``control`` has it.

    A map of lists of [B or 1, N, width] tensors or None, one for each block; the first ones count if there are more.
    """

    width: int
    blocks: Mapping[str, int]
    """How many blocks each list is for."""
    whole: bool = False
    """Each must be for all of the image's tokens; else it may be for the first ones."""
    required: bool = False


Spec = Argument | Number | Numbers | Residuals
"""What one argument of a forward must look like."""


class Control:
    """The residuals of one forward, as they came; a rank reads its own tokens' share of one when its block is done.

    ``images`` are the rank's, of those that a residual [B, N, width] is for.
    """

    def __init__(self, residuals: Mapping[str, Sequence[wire.Tensor | None]], images: slice = slice(None)) -> None:
        self.residuals = residuals
        self.images = images
        self._last: tuple[wire.Tensor, Tensor] | None = None

    def find(self, name: str, block: int) -> wire.Tensor | None:
        """The residual for after that block, if there is one."""
        each = self.residuals.get(name, ())
        return each[block] if block < len(each) else None

    def add(self, name: str, block: int, sequence: SequenceParallel, tokens: Tensor, n: int, start: int = 0) -> Tensor:
        """``tokens`` [B, S, width], in which from ``start`` on stand this rank's of a stream of ``n``, one block on.

        A residual for fewer tokens than the stream has is for the first ones.
        """
        residual = self.find(name, block)
        if residual is None:
            return tokens
        if self._last is None or self._last[0] is not residual:
            self._last = None
            self._last = residual, self._read(residual, sequence, n).to(tokens.device, tokens.dtype)
        mine = self._last[1]
        if mine.shape[1]:
            # In place, as ComfyUI does it: the blocks' outputs are new tensors.
            tokens[:, start : start + mine.shape[1]] += mine
        return tokens

    def _read(self, residual: wire.Tensor, sequence: SequenceParallel, n: int) -> Tensor:
        sizes = sequence.sizes(n)
        batch, length, _ = residual.shape
        first = min(sum(sizes[: sequence.whole.rank]), length)
        last = min(first + sizes[sequence.whole.rank], length)
        # What is there once is for all images.
        images = range(batch)[self.images] if batch > 1 else range(1)
        parts: list[Tensor] = [
            from_wire(rows(residual, i * length + first, i * length + last), "torch") for i in images
        ]
        return torch.stack(parts)


@dataclass(frozen=True)
class LatentFormat:
    """The affine map between the latents that users hold (a VAE's) and those that the model sees."""

    scale: float
    shift: float

    def into_model(self, latent: Tensor) -> Tensor:
        """The model's view of a latent; one of zeros is an empty canvas and stays zeros."""
        return (latent - self.shift) * self.scale if latent.any() else latent

    def out_of_model(self, x: Tensor) -> Tensor:
        """The user's view of what a sampler made."""
        return x / self.scale + self.shift


@dataclass(frozen=True)
class Place:
    """Where a tensor of diffusers' layout lies in that of the single file: all of ``key``, or some of its rows."""

    key: str
    rows: tuple[int, int] | None = None
    """First row and number of rows, where the single file fuses what diffusers keeps apart (q, k, v)."""
    swap: bool = False
    """Whether the two halves of the rows are exchanged (scale and shift of a final modulation)."""


class DiT(nn.Module, abc.ABC):
    """A diffusion transformer; one subclass per model family.

    Its parameters are all in a file. Buffers are what files may hold though no forward looks at it.
    """

    family: ClassVar[str]
    """The name that users see: ``flux``, ``sd3``."""
    title: ClassVar[str]
    """What people call the family: ``Flux.1``."""
    models: ClassVar[tuple[str, ...]]
    """The names of its models: ``dev``, ``schnell``."""
    diffusers: ClassVar[Mapping[str, Any]] = {}
    """diffusers' classes for it; each with a function of a `DiffusersConfig` that gives a config as `detect` does.

    ``Transformer2DModel`` is a class of several models. It is named with its ``norm_type``: ``Transformer2DModel(…)``.
    """
    lora_marks: ClassVar[str] = ""
    """A regular expression that finds this family's module names in a LoRA file; empty if there is none."""
    tiny: ClassVar[Mapping[str, Any] | None] = None
    """The configuration of a tiny model, for the self-test of a group. At least one family has one."""
    usual_optional: ClassVar[tuple[str, ...]] = ()
    """Optional arguments that ComfyUI always passes."""
    usual_values: ClassVar[Mapping[str, float]] = {}
    """Arguments that have a usual value; others are noise in a forward that is made up."""
    downscale: ClassVar[int] = 8
    """Pixels per latent cell, along each side."""
    image_models: ClassVar[tuple[str, ...]]
    """The values of ``image_model`` in ComfyUI's ``unet_config`` that this family runs."""
    latent_format: LatentFormat | None = None
    """Of the latents that `sample` takes and gives; a family without one runs forwards alone."""
    process: ClassVar[Process]
    """What the output means."""
    heads: int
    """Attention heads: what Ulysses hands out to ranks."""
    width: int
    """Channels of a token, over all heads."""
    out_channels: int
    """Channels of the output."""
    usual: ClassVar[tuple[int, int]]
    """Images and text tokens of a usual forward; its latents are those of 1024 × 1024 pixels."""
    pace: Pace | None = None
    """What it was measured to do on these devices."""
    spellings: ClassVar[Mapping[str, str]] = {}
    """How else files, uploads and patches may end a parameter's name, and how that name ends here."""

    @classmethod
    def canonical(cls, name: str) -> str:
        """A parameter's name here, for its name in a file, an upload or a patch."""
        for theirs, ours in cls.spellings.items():
            if name.endswith(theirs):
                return name.removesuffix(theirs) + ours
        return name

    @classmethod
    @abc.abstractmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """The model's configuration in ComfyUI's ``unet_config`` vocabulary, read from a file's keys and shapes.

        ``None`` if the keys are not of this family.
        """

    @classmethod
    def diffusers_layout(cls, config: Mapping[str, Any]) -> dict[str, Place]:
        """Every parameter's name in diffusers' class for this family, and where it lies in the single file.

        ``config`` is as `detect` gives it. Empty for a family without such a class.
        """
        return {}

    @classmethod
    def diffusers_config(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """As much of a configuration as `diffusers_layout` needs, read from a file that has diffusers' names.

        ``None`` if the keys are not those of diffusers' class for this family.
        """
        return None

    @abc.abstractmethod
    def arguments(self) -> dict[str, Spec]:
        """The arguments that `forward` takes besides ``sequence``, ``x`` and ``timestep`` among them."""

    @property
    def canvas(self) -> tuple[int | str, ...]:
        """The shape of ``x``: batch, channels, and the sides of the latent."""
        spec = self.arguments()["x"]
        assert isinstance(spec, Argument)
        assert spec.shape is not None
        return spec.shape

    @abc.abstractmethod
    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """The token count of each stream (text, image, …) that these arguments make; it sums to the joint sequence."""

    @abc.abstractmethod
    def timestep(self, sigma: Tensor) -> Tensor:
        """What ComfyUI passes as ``timestep`` at noise level ``sigma`` (fp32, any shape)."""

    @abc.abstractmethod
    def forward(self, sequence: SequenceParallel, x: Tensor, timestep: Tensor, **arguments: Any) -> Tensor:
        """One forward with the meaning of ComfyUI's ``diffusion_model(x, timestep, …)``.

        ``x`` is [B, C, H, W] in the compute dtype, ``timestep`` [B] in fp32. Every rank passes the same arguments
        and gets the whole output, of ``x``'s dtype and shape, less the channels that an inpainting model takes besides.
        With a step cache among them (``step_cache``) it goes through its blocks by `last_tokens`.
        """

    def sampling(self) -> dict[str, Any]:
        """What a client has to know to begin a run: the latent's channels, and the noise process."""
        return {"channels": self.out_channels, **self.process.describe()}

    @property
    def blocks_at(self) -> list[str]:
        """The names of the lists that hold its blocks: here, every list of modules that it has itself."""
        return [name for name, child in self.named_children() if isinstance(child, nn.ModuleList)]

    @property
    def modulating(self) -> list[Any]:
        """The layers of all modulations that see the conditioning alone, in the order of their use."""
        return []

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype, which is that of the weights."""
        return next(self.parameters()).dtype


class Patches(nn.Module):
    """A latent [B, C, H, W], cut into patches, as tokens [B, N, width]."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Row by row."""
        tokens: Tensor = self.proj(x)
        return tokens.flatten(2).transpose(1, 2)


def sinusoid(t: Tensor, width: int = 256) -> Tensor:
    """The sinusoidal embedding of ``t`` [B], computed and returned in fp32 [B, width]: cosines, then sines.

    Vaswani et al., 2017, as in guided-diffusion. Rounding ``t`` to bf16 before it costs tens of percent of accuracy.
    """
    angles = t.float()[:, None] * _frequencies(width // 2, t.device)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@functools.cache
def _frequencies(count: int, device: torch.device) -> Tensor:
    """Falling geometrically from 1 to 1e-4, fp32.

    Computed on the CPU for every device: a GPU's exp differs in the last bit, which at t = 3500 shows in the sixth
    digit of the model's output.
    """
    return torch.exp(-math.log(10000) * torch.arange(count, dtype=torch.float32, device="cpu") / count).to(device)


def pad_to_patches(x: Tensor, patch: int) -> Tensor:
    """Pad [B, C, H, W] below and on the right to whole patches, circularly."""
    height, width = x.shape[-2:]
    below, right = -height % patch, -width % patch
    return functional.pad(x, (0, right, 0, below), mode="circular") if below or right else x


def grid(x: Any, patch: int, name: str = "x") -> tuple[int, int]:
    """Rows and columns of patches that the last two sizes of ``x`` make, the last ones padded.

    Raises `ArgumentError`, naming ``name``, if there is too little of ``x`` to pad it with (`pad_to_patches`).
    """
    height, width = x.shape[-2:]
    if -height % patch > height or -width % patch > width:
        raise ArgumentError(
            f"{name}: its latents are {height} by {width}, too small for patches of {patch} by {patch}; "
            f"make both sides {patch} or more",
            argument=name,
        )
    return -(-height // patch), -(-width // patch)


def unpatchify(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Tokens [B, rows * columns, patch, patch, C] as an image [B, C, rows * patch, columns * patch]."""
    image = torch.unflatten(tokens, 1, (rows, columns)).permute(0, 5, 1, 3, 2, 4)
    return image.flatten(4, 5).flatten(2, 3)


def whole(
    config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1, most: int = 1 << 20
) -> int:
    """A whole number from a model's configuration; raises `ModelUnsupported`, naming the key, for anything else."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ModelUnsupported(f"config key {key!r} is {value!r:.80}; expected a whole number from {least} to {most}")
    return value


def settle(config: Mapping[str, Any], key: str, *allowed: Any) -> Any:
    """A choice from a model's configuration, by default the first; raises `ModelUnsupported`, naming the key."""
    value = config.get(key, allowed[0])
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        choices = " or ".join(map(repr, allowed))
        raise ModelUnsupported(f"config key {key!r} is {value!r:.80}; this version runs {choices}")
    return value


def shape_of(tensors: Mapping[str, TensorInfo], key: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor that a family can't be without; raises `ModelUnsupported`, naming it."""
    info = tensors.get(key)
    if info is None or len(info.shape) != dims:
        found = "it is missing" if info is None else f"its shape is {list(info.shape)}"
        raise ModelUnsupported(f"{key}: expected a tensor of {dims} dimensions, but {found}; is the file complete?")
    return info.shape


def count_blocks(tensors: Mapping[str, TensorInfo], name: str) -> int:
    """How many blocks ``name.0``, ``name.1``, … a file holds, up to the first gap."""
    found = {key.removeprefix(f"{name}.").split(".")[0] for key in tensors if key.startswith(f"{name}.")}
    return next(n for n in range(len(found) + 1) if str(n) not in found)
