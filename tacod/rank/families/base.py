"""What a model family is: a module whose parameters have the names of the authors' single files.

ComfyUI has these names too. So weights are copied by name, weight patches (LoRA) apply by name, and the arithmetic is
in ComfyUI's order.

The engine owns the loop over the blocks (`tacod.rank.families.trunk`); a family gives what comes before and after it.
"""

from __future__ import annotations

import abc
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tacod.checkpoint import TensorInfo
from tacod.plan import DeviceRates, Plan, Request
from tacod.rank.families.inputs import Argument, Inputs, Residuals, Spec
from tacod.rank.families.kit.attention import find
from tacod.rank.families.kit.modulation import Modulation
from tacod.rank.families.names import Names, Place
from tacod.rank.families.noise import Process
from tacod.rank.families.stream import ForwardPass, Weights
from tacod.rank.families.trunk import BlockCache, BlockWatch, Trunk
from tacod.rank.ops.largest import sharing
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.shares import EQUAL, Shares
from tacod_client.errors import ArgumentError, TacodError
from tacod_client.wire import CHANGING

__all__ = ["DiT", "LatentFormat", "Method", "Output"]

Output = Tensor | list[Tensor]
"""The output of a forward: a tensor, or one for each of several latents."""


@dataclass(frozen=True)
class LatentFormat:
    """The affine map between users' latents (a VAE's) and the model's.

    ``scale`` and ``shift`` are numbers, or one number for each channel.
    """

    scale: float | tuple[float, ...]
    shift: float | tuple[float, ...]

    @property
    def channels(self) -> int | None:
        """How many channels have numbers of their own; None if one number is for all."""
        return next((len(each) for each in (self.scale, self.shift) if isinstance(each, tuple)), None)

    def into_model(self, latent: Tensor) -> Tensor:
        """A user's latent as the model sees it. Zeros are an empty canvas and stay zeros."""
        return (latent - _like(self.shift, latent)) * _like(self.scale, latent) if latent.any() else latent

    def out_of_model(self, x: Tensor) -> Tensor:
        """A sampler's result as a user's latent."""
        return x / _like(self.scale, x) + _like(self.shift, x)


@dataclass(frozen=True)
class Method:
    """A method of a network outside of the forward: its arguments' specs, and its function."""

    arguments: Mapping[str, Spec]
    run: Callable[..., Output]


def _like(values: float | tuple[float, ...], latent: Tensor) -> Tensor | float:
    """Numbers of channels as a tensor that broadcasts with a latent [B, C, ...]; one number stays a number."""
    return latent.new_tensor(values).view(-1, *[1] * (latent.ndim - 2)) if isinstance(values, tuple) else values


class DiT(nn.Module, abc.ABC):
    """A diffusion transformer; one subclass per model family.

    Files hold all of its parameters. Buffers are tensors that files may hold though no forward uses them.
    """

    family: ClassVar[str]
    """The name that users see: ``flux``, ``sd3``."""
    title: ClassVar[str]
    """What people call the family: ``Flux.1``."""
    models: ClassVar[tuple[str, ...]]
    """The names of its models: ``dev``, ``schnell``."""
    diffusers: ClassVar[Mapping[str, Any]] = {}
    """diffusers' classes for it. Each has a function of a `DiffusersConfig` that returns what shapes don't tell.

    These are keys of what `detect` returns, such as ``axes_dim``, and the number of blocks, so that a folder that lacks
    the last blocks is not taken for a smaller model.

    ``Transformer2DModel`` is a class of several models. It is named with its ``norm_type``: ``Transformer2DModel(…)``.
    """
    lora_marks: ClassVar[str] = ""
    """A regular expression that finds this family's module names in a LoRA file; empty if there are none to find."""
    tiny: ClassVar[Mapping[str, Any]]
    """The configuration of a tiny model, for the tests of all families and for the self-test.

    It holds what shapes don't tell. Widths are multiples of 16, as fp8 needs them.
    """
    usual_optional: ClassVar[tuple[str, ...]] = ()
    """Optional arguments that ComfyUI always passes."""
    usual_values: ClassVar[Mapping[str, float]] = {}
    """Values of arguments in made-up forwards; other arguments are noise."""
    clamps: ClassVar[bool] = False
    """Whether its residual streams overflow in fp16, and are clamped after each block, as ComfyUI clamps Flux.1's."""
    notes: ClassVar[bool] = False
    """Whether ComfyUI lets the metadata's ``config`` go before what it detects in a file."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Prefixes of tensors that files hold for other modules: a load leaves them out."""
    shares_output: ClassVar[bool] = True
    """Whether ranks that a plan leaves idle get the output too; where nobody samples here, rank 0 alone needs it."""
    is_ours: ClassVar[bool] = True
    """Whether all that it may raise is known here, and met by all ranks alike."""
    fp32_weights: str = ""
    """A regular expression for the names of weights that are fp32 in any compute dtype; empty if there are none."""
    downscale: int = 8
    """Pixels per latent cell, along each side."""
    image_models: ClassVar[tuple[str, ...]]
    """The values of ``image_model`` in ComfyUI's ``unet_config`` that this family runs."""
    latent_format: LatentFormat | tuple[LatentFormat, ...] | None = None
    """The format of the latents that `sample` takes and gives, or one format for each of several latents.

    A family without one has no `sample`.
    """
    unsampled: str = ""
    """In words, what this model's forwards need that `sample` doesn't give them; empty if it gives all."""
    process: ClassVar[Process]
    """What the output means."""
    usual: ClassVar[Mapping[str, int]]
    """The free sizes of a usual forward, by their names in `arguments`; the warm-up uses them."""
    names: ClassVar[Names] = Names("")
    """Each parameter's name in diffusers' class for this family; empty if diffusers has none."""
    lora_names: ClassVar[Names] = Names("")
    """Further names of its layers, which LoRA files alone have."""
    diffusers_optional: ClassVar[frozenset[str]] = frozenset()
    """Names of diffusers' layers, outside of blocks, that some models of the family lack."""
    spellings: ClassVar[Mapping[str, str]] = {}
    """Other ends of parameters' names in files, uploads and patches, each with the end that is used here."""

    heads: int
    """Attention heads, which Ulysses deals out to ranks."""
    width: int
    """Channels of a token, over all heads."""
    out_channels: int
    """Channels of the output."""
    _modulating: list[str] | None = None
    weights: Weights | None = None
    """Fetches the weights that this rank lacks; None if it has all."""
    rates: DeviceRates | None = None
    """Measured on these devices by the warm-up."""
    hosts: tuple[int, ...] = ()
    """The number of each rank's host; empty for one host."""
    shares: Shares = EQUAL
    """How much of its forwards each rank takes."""

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
        return cls.names.layout(cls.shapes(config))

    @classmethod
    def lora_layout(cls, config: Mapping[str, Any]) -> dict[str, Place]:
        """`diffusers_layout`, with the names that LoRA files alone have."""
        return {**cls.lora_names.layout(cls.shapes(config)), **cls.diffusers_layout(config)}

    @classmethod
    def shapes(cls, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shape of each weight and buffer of a model of this configuration, by its name."""
        return dict(_shapes(cls, json.dumps(config, sort_keys=True)))

    @abc.abstractmethod
    def arguments(self) -> dict[str, Spec]:
        """The arguments that a forward takes, ``x`` and ``timestep`` among them."""

    @property
    def network(self) -> str:
        """In words, what computes it and how it is shared out, if that isn't this family's own code."""
        return ""

    @property
    def shares_tokens(self) -> bool:
        """Whether ranks may share out an image's tokens."""
        return True

    def specs_for(self, given: Iterable[str]) -> dict[str, Spec]:
        """The specs of `arguments`, and of others of these names that this model passes on unseen."""
        return self.arguments()

    def limited(self, asked: Request, arguments: Mapping[str, Any]) -> Request:
        """A request for a plan, within what this model can do with these arguments.

        Raises `ArgumentError` for a plan that asks for more.
        """
        return asked

    def refusal(self, error: Exception) -> TacodError | None:
        """What ranks that didn't meet this error of a forward are told; None for one that ends this rank."""
        return error if isinstance(error, ArgumentError) else None

    def told(self, plan: Plan) -> str:
        """In words, how the last forward was split, which was planned like this."""
        return str(plan)

    def methods(self) -> Mapping[str, Method]:
        """What the network does outside of a forward, by ComfyUI's names of these methods.

        Each rank computes all of it, so it must be small, such as an adapter's work on a text, once for a run.
        """
        return {}

    def prepare(self, inputs: Inputs) -> Inputs:
        """The same inputs, simplified by their values before they are planned: a mask that hides nothing is dropped."""
        return inputs

    def of_run(self, condition: Inputs, seed: int) -> Inputs:
        """A condition of a sampling run, with what the run itself knows, such as its ``seed``.

        Raises `ArgumentError` for an argument that only single forwards have a use for.
        """
        return condition

    @abc.abstractmethod
    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """The token count of each stream (text, image, …) for these arguments; their sum is the joint sequence.

        It depends only on shapes. The image's stream comes last. Raises `ArgumentError` for a size that the model can't
        take.
        """

    def prefix(self, f: ForwardPass, **arguments: Any) -> Sequence[Tensor]:
        """What depends on neither the time nor the values of ``x``, such as a text's keys and values.

        The engine keeps it for later forwards with the same other arguments, and `begin` finds it as ``f.prefix``.
        There is no ``timestep``, and ``x`` has its shape and dtype alone, on the device ``meta``. Each rank gives what
        it holds itself; how much that is depends only on shapes. Most families have none.
        """
        return ()

    @property
    def has_prefix(self) -> bool:
        """Whether this family has a `prefix`."""
        return type(self).prefix is not DiT.prefix

    @abc.abstractmethod
    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """Embed the arguments, and shard tokens into streams: ``f.image``, and others that the blocks read from ``f``.

        ``x`` is [B, C, H, W] (or more sizes, or a list) in the compute dtype, ``timestep`` [B] in fp32.
        """

    @property
    def graphs(self) -> bool:
        """Whether forwards may be CUDA graphs; false if the host reads numbers within a forward."""
        return True

    @property
    @abc.abstractmethod
    def trunk(self) -> Sequence[Any]:
        """The blocks in order: callables that take the `ForwardPass` and change its streams."""

    @abc.abstractmethod
    def end(self, f: ForwardPass) -> Output:
        """Project the tokens of ``f.image`` and gather the output: of ``x``'s dtype and shape, with `out_channels`."""

    def forward(self, sequence: SequenceParallel, x: Any, timestep: Tensor, **arguments: Any) -> Output:
        """One forward with the meaning of ComfyUI's ``diffusion_model(x, timestep, …)``.

        Every rank passes the same arguments and gets the whole output. Raises `TypeError` for missing and unknown
        names.
        """
        specs = self.arguments()
        wrong = arguments.keys() - specs.keys() | {
            name for name, spec in specs.items() if spec.required and name not in ("x", "timestep", *arguments)
        }
        if wrong:
            raise TypeError(f"{self.family} takes {', '.join(specs)}; unknown or missing: {', '.join(sorted(wrong))}")
        return self.run(sequence, Inputs({"x": x, "timestep": timestep, **arguments}, specs))

    def compute_prefix(self, sequence: SequenceParallel, inputs: Inputs) -> Sequence[Tensor]:
        """This rank's `prefix` for these inputs."""
        if not self.has_prefix:
            return ()
        lasting = {name: value for name, value in inputs.items() if name not in CHANGING}
        x = inputs["x"]
        shape = [each.to("meta") for each in x] if isinstance(x, list) else x.to("meta")
        with sharing(sequence.whole.maximum, sequence.images.maximum):
            return self.prefix(ForwardPass(sequence, self.weights), x=shape, **lasting)

    def run(
        self,
        sequence: SequenceParallel,
        inputs: Inputs,
        cache: BlockCache | None = None,
        prefix: Sequence[Tensor] | None = None,
        watch: BlockWatch | None = None,
    ) -> Output:
        """`forward` of these inputs, with the step cache of their run, and what follows a long forward.

        ``prefix`` is what `compute_prefix` gives for them; it is computed if it is None.
        """
        f = self.start(sequence, inputs, prefix)
        ahead = nullcontext() if self.weights is None else self.weights.ahead(self.trunk)
        with ahead, sharing(sequence.whole.maximum, sequence.images.maximum):
            self.embed(f, inputs, watch).run(cache)
            return self.end(f)

    def start(self, sequence: SequenceParallel, inputs: Inputs, prefix: Sequence[Tensor] | None = None) -> ForwardPass:
        """A forward of which nothing but the prefix is computed."""
        f = ForwardPass(sequence, self.weights)
        f.prefix = self.compute_prefix(sequence, inputs) if prefix is None else prefix
        return f

    def embed(self, f: ForwardPass, inputs: Inputs, watch: BlockWatch | None = None) -> Trunk:
        """`begin` a forward that was started with these inputs; returns what runs its blocks."""
        values = {name: value for name, value in inputs.items() if not isinstance(inputs.specs.get(name), Residuals)}
        self.begin(f, **values)
        places = self._residual_places() if inputs.control else {}
        return Trunk(f, self.trunk, places, inputs.control, self.clamps, watch)

    def _residual_places(self) -> dict[int, tuple[str, int]]:
        """See ``kinds`` of `Trunk`."""
        return {id(block): (kind, i) for kind, blocks in self.residual_blocks.items() for i, block in enumerate(blocks)}

    @property
    def residual_blocks(self) -> Mapping[str, Sequence[Any]]:
        """The blocks after which a ControlNet's residuals are added, by the name of ComfyUI's list of them."""
        return {}

    @abc.abstractmethod
    def timestep(self, sigma: Tensor) -> Tensor:
        """What ComfyUI passes as ``timestep`` at noise level ``sigma`` (fp32, any shape)."""

    def sampling(self) -> dict[str, Any]:
        """What a client needs to begin a run: the latent's channels and shape, and the noise process."""
        shapes = [list(shape) for shape in self.latents]
        latent = {"channels": self.out_channels, "latent": shapes[0], "downscale": self.downscale}
        several = {"latents": shapes} if len(shapes) > 1 else {}
        return {**latent, **several, **self.process.describe()}

    def output_shapes(self, latents: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """The shape of each output, for the shape of each latent; a free size may be its name."""
        return [(batch, self.out_channels, *sides) for batch, _, *sides in latents]

    @property
    def canvas(self) -> tuple[int | str, ...]:
        """The shape of ``x``, the first one if there are several: batch, channels, and the sides of the latent."""
        return self.canvases[0]

    @property
    def canvases(self) -> list[tuple[int | str, ...]]:
        """The shape of each latent of ``x``."""
        spec = self.arguments()["x"]
        assert isinstance(spec, Argument)
        assert spec.shape is not None
        return [spec.shape, *spec.others]

    @property
    def fewest_latents(self) -> int:
        """How many latents ``x`` must have, if not all of `canvases`; else 0."""
        spec = self.arguments()["x"]
        return spec.fewest if isinstance(spec, Argument) else 0

    @property
    def latents(self) -> list[tuple[int | str, ...]]:
        """The shapes of the latents that `sample` takes and gives: the canvases with the output's channels."""
        return self.output_shapes(self.canvases)

    def own_weight(self, owner: nn.Module, leaf: str) -> Tensor | None:
        """The numbers of a weight that this model keeps packed in a way of its own; None for all others."""
        return None

    def put_own_weight(self, owner: nn.Module, leaf: str, key: str, tensor: Tensor) -> bool:
        """Replace such a weight, in its module and leaf, and say so; false for all others."""
        return False

    @property
    def blocks_at(self) -> list[str]:
        """The names of the trunk's blocks, whose matrices fp8 multiplies in 8 bits."""
        names = {id(module): name for name, module in self.named_modules()}
        return [names[id(block)] for block in self.trunk if id(block) in names]

    @property
    def modulating(self) -> list[Any]:
        """The linear layers whose input is the conditioning vector alone, which the ranks share out."""
        if self._modulating is None:
            self._modulating = [name for name, each in self.named_modules() if isinstance(each, Modulation)]
        modules: list[Modulation] = [find(self, name) for name in self._modulating]
        return [each.linear for each in modules]

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype, which is that of the weights but for `fp32_weights`."""
        return next(weight.dtype for name, weight in self.named_parameters() if not self._is_fp32(name))

    def dtype_of(self, name: str, compute: torch.dtype) -> torch.dtype:
        """The dtype of a weight where the model computes in ``compute``."""
        return torch.float32 if self._is_fp32(name) else compute

    def _is_fp32(self, name: str) -> bool:
        """Whether a weight is fp32 in any compute dtype."""
        return bool(self.fp32_weights) and re.match(self.fp32_weights, name) is not None


@lru_cache(maxsize=8)
def _shapes(family: Callable[[Any], DiT], config: str) -> dict[str, tuple[int, ...]]:
    # A load asks several times, and a large model takes a quarter of a second to make even without memory.
    with torch.device("meta"):
        return {name: tuple(each.shape) for name, each in family(json.loads(config)).state_dict().items()}
