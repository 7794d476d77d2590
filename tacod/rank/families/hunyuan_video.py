"""HunyuanVideo and 1.5 (Tencent, 2024 and 2025, arXiv:2412.03603, arXiv:2511.18870), and HunyuanImage 2.1.

A refined text, then the blocks of Flux.1. Parameters are named as in ComfyUI, whose names are those of Flux.1's
authors; `tacod.rank.families.hunyuan_video_files` has those of Tencent's files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT
from tacod.rank.families.config import choice, fixed, integer, number, optional_integer, rope_axes, width_of_heads
from tacod.rank.families.hunyuan_video_files import (
    NAMES,
    OPTIONAL_LAYERS,
    QK_NORM,
    SPELLINGS,
    detect_config,
    latents_of,
    of_diffusers,
    of_diffusers_15,
    of_diffusers_image,
    read_patch,
)
from tacod.rank.families.hunyuan_video_parts import EMBEDDER, ByT5Mapper, TokenRefiner
from tacod.rank.families.inputs import Argument, Inputs, Number, Residuals, Spec, Unread
from tacod.rank.families.kit.attention import find, register
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.families.wan_parts import Clip
from tacod_client.errors import ArgumentError

__all__ = ["HunyuanVideo"]

_REFINER_BLOCKS = 2
_ORDERS = "text_first", "image_first"
"""How the single blocks have their tokens in ComfyUI: from 0.14 on, and before."""
_GIVEN, _NOISY = 0, 1
"""The rows of the modulations where a first frame is given: that frame's, and those of all else."""


class HunyuanVideo(DiT):
    """Text to video and image to video, with their super-resolution, and text to image with its refiner.

    ``config`` is ComfyUI's ``unet_config``, and ``byt5_in_dim`` and ``byt5_hidden_dim``, the sizes of ByT5's mapper.
    Raises `ModelUnsupported`, naming the key, for a configuration that can't be.
    """

    family: ClassVar[str] = "hunyuan_video"
    title = "HunyuanVideo, HunyuanImage"
    models = ("HunyuanVideo T2V, I2V", "SkyReels V1", "HunyuanVideo 1.5 T2V, I2V, SR", "HunyuanImage 2.1 and refiner")
    lora_marks = r"individual_token_refiner[._]|(img|txt)_(attn_(qkv|proj)|mod[._]linear|mlp[._]fc[12])"
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "hunyuan_video",
        "in_channels": 5,
        "out_channels": 4,
        "patch_size": [1, 2, 2],
        "vec_in_dim": 16,
        "context_in_dim": 16,
        "hidden_size": 48,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "depth": 2,
        "depth_single_blocks": 1,
        "axes_dim": [4, 6, 6],
        "guidance_embed": True,
        "meanflow": True,
        "byt5": True,
        "byt5_in_dim": 16,
        "byt5_hidden_dim": 32,
        "vision_in_dim": 32,
        "use_cond_type_embedding": True,
    }
    clamps = True
    diffusers: ClassVar[Mapping[str, Any]] = {
        "HunyuanVideoTransformer3DModel": of_diffusers,
        "HunyuanVideo15Transformer3DModel": of_diffusers_15,
        "HunyuanImageTransformer2DModel": of_diffusers_image,
    }
    diffusers_optional = OPTIONAL_LAYERS
    names = NAMES
    spellings: ClassVar[Mapping[str, str]] = SPELLINGS
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "T": 3, "H": 60, "W": 104, "L": 256}
    usual_optional: ClassVar[tuple[str, ...]] = ("guidance",)
    usual_values: ClassVar[Mapping[str, float]] = {"guidance": 6.0}
    image_models: ClassVar[tuple[str, ...]] = ("hunyuan_video",)
    process = Flow()
    epsilon = torch.finfo(torch.float32).eps
    """Epsilon of the norms of queries and keys, unless a client says otherwise."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fixed(config, refiner_depth=_REFINER_BLOCKS, qk_norm=QK_NORM)
        self.width, self.heads = width, heads = width_of_heads(config, "hidden_size", "num_heads")
        self.patch = read_patch(config)
        self.channels, self.out_channels = integer(config, "in_channels"), integer(config, "out_channels")
        self.context_width = integer(config, "context_in_dim")
        self.pooled_width = optional_integer(config, "vec_in_dim")
        self.axes = rope_axes(config, "axes_dim", len(self.patch), width // heads)
        self.theta = number(config, "theta", 256)
        self.guided: bool = choice(config, "guidance_embed", False, True)
        self.meanflow: bool = choice(config, "meanflow", False, True)
        self.meanflow_sum: bool = choice(config, "meanflow_sum", False, True)
        self.tells_kinds: bool = choice(config, "use_cond_type_embedding", False, True)
        self.vision_width = optional_integer(config, "vision_in_dim")
        bias: bool = choice(config, "qkv_bias", True, False)
        hidden = int(width * number(config, "mlp_ratio", 4.0))
        double, single = integer(config, "depth", most=1024), integer(config, "depth_single_blocks", least=0, most=1024)

        self.img_in = kit.PatchEmbed(self.channels, self.patch, width)
        self.txt_in = TokenRefiner(self.context_width, width, heads, _REFINER_BLOCKS)
        self.time_in = kit.MLPEmbedder(256, width, EMBEDDER)
        if self.pooled_width is not None:
            self.vector_in = kit.MLPEmbedder(self.pooled_width, width, EMBEDDER)
        if self.guided:
            self.guidance_in = kit.MLPEmbedder(256, width, EMBEDDER)
        if self.meanflow:
            self.time_r_in = kit.MLPEmbedder(256, width, EMBEDDER)
        self.byt5_width: int | None = None
        if choice(config, "byt5", False, True):
            self.byt5_width = integer(config, "byt5_in_dim", 1472)
            self.byt5_in = ByT5Mapper(self.byt5_width, integer(config, "byt5_hidden_dim", 2048), width)
        if self.vision_width is not None:
            self.vision_in = Clip(self.vision_width, width, None)
        if self.tells_kinds:
            register(self, "cond_type_embedding.weight", kit.drawn(3, width))
        self.double_blocks = nn.ModuleList(kit.DoubleBlock(width, heads, hidden, bias) for _ in range(double))
        self.single_blocks = nn.ModuleList(kit.SingleBlock(width, heads, hidden) for _ in range(single))
        self.final_layer = kit.FinalLayer(width, self.out_channels * math.prod(self.patch))
        self.unsampled = "the next step's timestep (timestep_r)" if self.meanflow else ""
        self.latent_format, self.downscale = latents_of(len(self.patch), self.out_channels)

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`."""
        return detect_config(tensors)

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`.

        ``attention_mask`` says which tokens of ``context`` count, and ``text_mean`` is the mean of all of them, by
        default of those that are given. ``guiding_frame_index`` is the time of a first frame that ``x`` has as it is to
        be, 0 in ComfyUI. ``joint_order`` says how ComfyUI's single blocks have their tokens: there the modulation of
        that frame goes to as many of the first ones, which from 0.14 on are the text's. ``ref_latent`` is a video
        before ``x``. ``timestep_r`` is the time of the next step, for models distilled as MeanFlow (Geng et al., 2025,
        arXiv:2505.13447); without it they go by ``timestep`` alone. ``qk_norm_eps`` is added to the mean square in the
        norms of queries and keys, by default `epsilon`.
        """
        video = len(self.patch) == 3
        sides = ("T", "H", "W") if video else ("H", "W")
        blocks = {"input": len(self.double_blocks), "output": len(self.single_blocks), "middle": 0}
        specs: dict[str, Spec] = {
            "x": Argument(("B", self.channels, *sides)),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.context_width)),
            "attention_mask": Argument(("B", "L"), required=False, keys=True),
            "text_mean": Argument(("B", self.context_width), required=False),
            "y": Unread(),
            "guidance": Argument(("B",), required=False, fp32=True) if self.guided else Unread(),
            "txt_byt5": Unread(),
            "guiding_frame_index": Argument(("B",), required=False, fp32=True),
            "joint_order": Argument(None, required=False, choices=_ORDERS),
            "disable_time_r": Unread(),
            "qk_norm_eps": Number(0.0, 0.01),
            "control": Residuals(self.width, blocks, whole=True),
        }
        if self.pooled_width is not None:
            specs["y"] = Argument(("B", self.pooled_width))
        if self.byt5_width is not None:
            specs["txt_byt5"] = Argument(("B", "K", self.byt5_width), required=False)
        if self.vision_width is not None:
            specs["clip_fea"] = Argument(("B", "V", self.vision_width), required=False)
        if self.meanflow:
            specs["timestep_r"] = Argument(("B",), required=False, fp32=True)
        if video:
            specs["ref_latent"] = Argument(("B", self.channels, "RT", "RH", "RW"), required=False)
        return specs

    def prepare(self, inputs: Inputs) -> Inputs:
        """Leave out the tokens that a mask hides; they count for the mean of the text, which is kept beside it."""
        mask = inputs.get("attention_mask")
        if mask is None:
            return inputs
        if not mask.any(dim=1).all():
            raise ArgumentError(
                "attention_mask: it hides all of a text, of which ComfyUI's network makes NaN; leave a token",
                argument="attention_mask",
            )
        dropped = kit.drop_hidden(inputs, "attention_mask", "context")
        if "text_mean" in inputs or dropped["context"].shape == inputs["context"].shape:
            return dropped
        return dropped.replace(text_mean=_mean_of(inputs["context"]))

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """Tokens of each text, and of the video with what is before it.

        Raises `ArgumentError` for latents that ComfyUI can't put together again.
        """
        sides = arguments["x"].shape[2:]
        if any(side % size for side, size in zip(sides, self.patch, strict=True)):
            unit = self.patch[-1] * self.downscale
            raise ArgumentError(
                f"x: its latents are {' by '.join(map(str, sides))}, and ComfyUI's network takes multiples of "
                f"{' by '.join(map(str, self.patch))}; make width and height multiples of {unit} pixels",
                argument="x",
            )
        texts = [arguments[name].shape[1] for name in self._texts(arguments)]
        return (*texts, self._before(arguments) + kit.Grid(arguments["x"], self.patch).length)

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma * 1000

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        x, mask = arguments["x"], arguments.get("attention_mask")
        f.epsilon = arguments.get("qk_norm_eps", self.epsilon)
        refining = {block.adaLN_modulation.linear for block in self.txt_in.blocks}
        layers = [layer for layer in self.modulating if layer not in refining]
        f.modulate(layers, functional.silu(self._conditioning(arguments)))
        f.grid, f.before = kit.Grid(x, self.patch), self._before(arguments)
        f.image, f.text = self._video(f, arguments), self._text(f, arguments)
        f.mask = None
        if mask is not None:
            lengths = self.lengths(arguments)
            keys = [mask.new_ones(len(mask), length) for length in lengths]
            keys[self._texts(arguments).index("context")] = mask
            f.mask = f.sequence.in_order_of_ranks(torch.cat(keys, dim=1), lengths)
        f.joint_segments = None
        if "guiding_frame_index" in arguments:
            self._tell_first_frame(f, arguments.get("joint_order", _ORDERS[0]))

    @property
    def trunk(self) -> list[Any]:
        """See `DiT.trunk`."""
        joint = [_join, *self.single_blocks] if self.single_blocks else []
        return [*self.double_blocks, *joint]

    @property
    def residual_blocks(self) -> Mapping[str, Any]:
        """See `DiT.residual_blocks`."""
        return {"input": self.double_blocks, "output": self.single_blocks}

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`."""
        if f.before and f.image.segments is not None:
            # Without what is before it, the video's own first frame is the first.
            f.image.segments = self._first_frame(f, f.image.lengths[0], -f.before)
        latent: Tensor = f.grid.latent(self.final_layer(f)[:, f.before :])
        return latent

    def _conditioning(self, arguments: Mapping[str, Any]) -> Tensor:
        """The conditioning of the blocks, [B, width]; [B, 2, width] where a first frame has another one."""
        dtype, first = arguments["x"].dtype, arguments.get("guiding_frame_index")
        c: Tensor = self.time_in.numbers(arguments["timestep"], dtype)
        if "timestep_r" in arguments:
            c = c + self.time_r_in.numbers(arguments["timestep_r"], dtype)
            c = c if self.meanflow_sum else c / 2
        rows = [c] if first is None else [self.time_in.numbers(first, dtype), c]
        c = torch.stack(rows, dim=1)
        if self.pooled_width is not None:
            c = c + self.vector_in(arguments["y"])[:, None]
        if self.guided and "guidance" in arguments:
            c = c + self.guidance_in.numbers(1000 * arguments["guidance"].float(), dtype)[:, None]
        return c if first is not None else c[:, 0]

    def _texts(self, arguments: Mapping[str, Any]) -> list[str]:
        """The arguments that become the text's tokens, in ComfyUI's order."""
        texts = ("txt_byt5", "context") if self.tells_kinds else ("context", "txt_byt5")
        return [name for name in ("clip_fea", *texts) if name in arguments]

    def _text(self, f: ForwardPass, arguments: Mapping[str, Any]) -> Stream:
        """The stream of all texts; they have no positions."""
        context, mean = arguments["context"], arguments.get("text_mean")
        mean = _mean_of(context) if mean is None else mean
        parts = []
        for name in self._texts(arguments):
            if name == "context":
                part = self.txt_in(f, context, mean, arguments["timestep"], arguments.get("attention_mask"))
            else:
                part = f.shard(arguments[name], self.byt5_in if name == "txt_byt5" else self.vision_in)
            if self.tells_kinds:
                kind = ("context", "txt_byt5", "clip_fea").index(name)
                part.tokens = part.tokens + find(self, "cond_type_embedding.weight")[kind]
            parts.append(part)
        tokens = torch.cat([part.tokens for part in parts], dim=1)
        lengths = tuple(length for part in parts for length in part.lengths)
        places = torch.zeros(tokens.shape[1], len(self.axes), device=tokens.device)
        return Stream(tokens, lengths, kit.rope(places, self.axes, self.theta))

    def _before(self, arguments: Mapping[str, Any]) -> int:
        """How many tokens the video before ``x`` has."""
        reference = arguments.get("ref_latent")
        return 0 if reference is None else kit.Grid(reference, self.patch, "ref_latent").length

    def _video(self, f: ForwardPass, arguments: Mapping[str, Any]) -> Stream:
        """The stream of ``x``, and before it of a reference, which lies beside it in a frame of its own."""
        x, reference = arguments["x"], arguments.get("ref_latent")
        patches, positions = [f.grid.patches(x)], [f.grid.positions(device=x.device)]
        if reference is not None:
            grid = kit.Grid(reference, self.patch)
            patches.insert(0, grid.patches(reference))
            positions.insert(0, grid.positions((0.0, 0.0, f.grid.counts[-1]), device=x.device))
            positions[0][:, 0] = -1.0
        places = torch.cat(positions)
        return f.shard(
            torch.cat(patches, dim=1), self.img_in, lambda shard: kit.rope(shard(places), self.axes, self.theta)
        )

    def _tell_first_frame(self, f: ForwardPass, order: str) -> None:
        """Give tokens the rows of their modulations, of which a first frame has its own."""
        f.image.segments = self._first_frame(f, f.image.lengths[0])
        f.text.segments = f.image.segments.new_full((f.text.size,), _NOISY)
        if order == "text_first":
            segments, start = [], 0
            for length in (*f.text.lengths, *f.image.lengths):
                segments.append(self._first_frame(f, length, start))
                start += length
            f.joint_segments = torch.cat(segments)

    def _first_frame(self, f: ForwardPass, length: int, start: int = 0) -> Tensor:
        """The rows of this rank's tokens of ``length``, where those before a frame's end are given.

        The first token's place is ``start``.
        """
        rows, columns = f.grid.counts[-2:]
        places = f.sequence.shard(torch.arange(length, device=f.image.tokens.device), dim=0) + start
        return torch.where(places < rows * columns, _GIVEN, _NOISY)


def _mean_of(context: Tensor) -> Tensor:
    """The mean of a text's tokens, [B, W]."""
    return context.float().mean(dim=1).to(context.dtype)


def _join(f: ForwardPass) -> None:
    """Between double and single blocks: text and image become ``f.joint``, with modulations as ComfyUI gives them."""
    kit.join_streams(f)
    if f.joint_segments is not None:
        f.joint.segments = f.joint_segments
