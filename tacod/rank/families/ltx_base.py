"""What LTX-Video and LTX-2 have in common: their video."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tacod.rank.families import kit
from tacod.rank.families.base import DiT, LatentFormat
from tacod.rank.families.config import choice, integer, number
from tacod.rank.families.inputs import Argument, Inputs, Number, Numbers, Spec, Unread
from tacod.rank.families.ltx_guides import GUIDE_ARGUMENTS, guide_bias, spans_of
from tacod.rank.families.ltx_parts import AdaLNSingle, Rope, latent_of, local_times
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass
from tacod.rank.families.trunk import BlockWatch, Trunk
from tacod_client.errors import ArgumentError, ModelUnsupported

__all__ = ["LATENTS", "LTX", "PATCH", "flag", "heads_of", "numbers"]

PATCH = (1, 1, 1)
LATENTS = LatentFormat(scale=1.0, shift=0.0)
_MARKERS = ("tokens_per_frame", "first_latent_frame", "num_keyframes")


class LTX(DiT):
    """The video of a model; ``config`` is ComfyUI's ``unet_config``.

    Raises `ModelUnsupported`, naming the key, for a configuration that can't be.
    """

    process = Flow()
    notes = True
    downscale = 32
    usual_values: ClassVar[Mapping[str, float]] = {"frame_rate": 24.0, "denoise_mask": 1.0}

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads, self.head_width = heads_of(config, "num_attention_heads", 32, "attention_head_dim", 64)
        self.width = width = self.heads * self.head_width
        self.same_width(config, "cross_attention_dim", 2048, width, "num_attention_heads times attention_head_dim")
        self.channels = self.out_channels = integer(config, "in_channels", 128)
        self.caption_width = integer(config, "caption_channels", 4096)
        self.multiplier = number(config, "timestep_scale_multiplier", 1000.0)
        self.lengths_of_axes = numbers(config, "positional_embedding_max_pos", [20, 2048, 2048])
        self.causal = flag(config, "causal_temporal_positioning")
        self.factors = [int(each) for each in numbers(config, "vae_scale_factors", [8, 32, 32])]
        middle = flag(config, "use_middle_indices_grid")
        self.rope_kind = {
            "double": choice(config, "frequencies_precision", "float32", "float64") == "float64",
            "halves": choice(config, "rope_type", "interleaved", "split") == "split",
        }
        self.rope = Rope(self.heads, self.head_width, self.lengths_of_axes, middle=middle, **self.rope_kind)
        self.adaptive = flag(config, "cross_attention_adaln")
        self.ff_bias = flag(config, "ff_bias", True)

        self.patchify_proj = nn.Linear(self.channels, width)
        self.keyframes_abs_pos_embedding = None
        if flag(config, "use_keyframes_abs_pos_embedding"):
            self.keyframes_abs_pos_embedding = nn.Parameter(kit.drawn(1, width))
        self.adaln_single = AdaLNSingle(width, 9 if self.adaptive else 6)
        self.scale_shift_table = kit.drawn(2, width)
        self.proj_out = nn.Linear(width, self.out_channels)

    @staticmethod
    def same_width(config: Mapping[str, Any], key: str, default: int, width: int, what: str) -> None:
        """Raise `ModelUnsupported` if a width is another than the one that ComfyUI's network needs there."""
        if integer(config, key, default) != width:
            raise ModelUnsupported(f"config key {key!r} is {config.get(key, default)}; it must be {width}, as {what}")

    def video_arguments(self) -> dict[str, Spec]:
        """What a forward takes for the video beside latents, times and text.

        Where a picture is given, each token has a timestep of its own. ``denoise_mask`` says with a negative number
        which tokens there aren't; what else it says is in the timesteps. ``generated_keyframes`` are latent frames that
        each are one frame of pixels.
        """
        marked = self.keyframes_abs_pos_embedding is not None
        return {
            "frame_rate": Number(0.01, 10000.0),
            "denoise_mask": Argument(("B", "C", "T", "H", "W"), required=False, shared=True),
            **GUIDE_ARGUMENTS,
            "generated_keyframes": Numbers(_MARKERS) if marked else Unread(),
            "control": Unread(),
        }

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`."""
        return list(self.transformer_blocks)  # type: ignore[arg-type]

    @staticmethod
    def prepare_text(inputs: Inputs) -> Inputs:
        """The inputs without hidden text. Raises `ArgumentError` if an image has no other."""
        mask = inputs.get("attention_mask")
        if mask is not None and not mask.any(dim=1).all():
            raise ArgumentError("attention_mask: it hides all of an image's text", argument="attention_mask")
        return kit.drop_hidden(inputs, "attention_mask", "context")

    def prepare(self, inputs: Inputs) -> Inputs:
        """See `DiT.prepare`: text that is hidden goes, and tokens get the rows of their timesteps."""
        inputs = self.prepare_text(inputs)
        # A run's forwards get their latents and timesteps later, and have no guides.
        return self.prepare_tokens(inputs) if "x" in inputs else inputs.replace(guide_attention_entries=None)

    @staticmethod
    def texts_of(f: ForwardPass, readers: Iterable[Any]) -> dict[Any, tuple[Tensor, Tensor]]:
        """For each attention to a text the keys and values, [B, L, H * D] each, that the prefix has in their order."""
        return dict(zip(readers, zip(f.prefix[::2], f.prefix[1::2], strict=True), strict=True))

    @abc.abstractmethod
    def prepare_tokens(self, inputs: Inputs) -> Inputs:
        """Find which tokens there are, and the different timesteps that they have; nothing is left if it is done.

        Without guides and timesteps for each token the host reads nothing of what is on the device.
        """

    def embed(self, f: ForwardPass, inputs: Inputs, watch: BlockWatch | None = None) -> Trunk:
        """See `DiT.embed`."""
        return super().embed(f, self.prepare_tokens(inputs), watch)

    def begin_video(self, f: ForwardPass, x: Tensor, timestep: Tensor, arguments: Mapping[str, Any]) -> None:
        """Make ``f.image`` of a video and its tokens' distinct timesteps [B, M]; with ``f.spans`` of its own tokens."""
        f.grid, f.kept = kit.Grid(x, PATCH), arguments.get("kept")
        patches, device = f.grid.patches(x), x.device
        spans = spans_of(f.grid, self.factors, self.causal, arguments, device)
        marked = self._marked(spans, arguments)

        def embed(chunk: Tensor) -> Tensor:
            embedded: Tensor = self.patchify_proj(chunk)
            if marked is None:
                return embedded
            assert self.keyframes_abs_pos_embedding is not None
            return embedded + f.sequence.shard(marked, dim=0)[:, None] * self.keyframes_abs_pos_embedding

        mine = f.sequence.shard(spans, dim=0).transpose(0, 1).float()
        seconds = mine[:, :, :1] * (1.0 / arguments.get("frame_rate", 25))
        f.spans = torch.cat((seconds, mine[:, :, 1:]), dim=2)
        f.image = f.shard(patches if f.kept is None else patches[:, f.kept], embed, lambda _: self.rope(f.spans))
        f.video_times, f.image.segments = local_times(f, timestep * self.multiplier, arguments.get("rows"))
        f.times, f.embedded = self.adaln_single.modulations(f.video_times, x.dtype)
        f.bias = guide_bias(arguments, len(spans))

    def end_video(self, f: ForwardPass) -> Tensor:
        """The video's latent; zeros where there are no tokens."""
        patches = f.gather(f.image, latent_of(f.image, self.scale_shift_table, f.embedded, self.proj_out))
        if f.kept is not None:
            whole = patches.new_zeros(len(patches), f.grid.length, patches.shape[-1])
            patches = whole.index_copy_(1, f.kept, patches)
        latent: Tensor = f.grid.latent(patches)
        return latent

    def check_markers(self, arguments: Mapping[str, Any], video: Any) -> None:
        """Raise `ArgumentError` for generated keyframes that aren't of a video of this shape."""
        markers = arguments.get("generated_keyframes")
        if markers is None or self.keyframes_abs_pos_embedding is None:
            return
        if set(markers) != set(_MARKERS) or any(
            value < 0 or not float(value).is_integer() for value in markers.values()
        ):
            raise ArgumentError(
                f"generated_keyframes: expected whole numbers {', '.join(_MARKERS)}", argument="generated_keyframes"
            )
        frame = video.shape[3] * video.shape[4]
        if markers["tokens_per_frame"] != frame:
            raise ArgumentError(
                f"generated_keyframes: they have {markers['tokens_per_frame']:g} tokens a frame, and x has {frame}; "
                "separate them before the latents change their size",
                argument="generated_keyframes",
            )

    def _marked(self, spans: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
        """Which tokens are of a latent frame that is one frame of pixels, boolean [K]; None if nothing marks them."""
        if self.keyframes_abs_pos_embedding is None:
            return None
        marked = spans[:, 0, 0, 0] == 0
        if "keyframe_idxs" in arguments:
            marked[len(marked) - arguments["keyframe_idxs"].shape[2] :] = False
        markers = arguments.get("generated_keyframes")
        if markers is None:
            return marked
        frame, first, count = (int(markers[name]) for name in _MARKERS)
        places = torch.arange(len(marked), device=marked.device) if "kept" not in arguments else arguments["kept"]
        return marked | ((places >= first * frame) & (places < (first + count) * frame))


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """A switch of a configuration."""
    return bool(choice(config, key, default, not default))


def heads_of(config: Mapping[str, Any], heads_key: str, heads: int, width_key: str, head_width: int) -> tuple[int, int]:
    """Attention heads and the channels of each, which are even; raises `ModelUnsupported`."""
    count, each = integer(config, heads_key, heads), integer(config, width_key, head_width)
    if each % 2:
        raise ModelUnsupported(f"config key {width_key!r} is {each}; expected an even number")
    return count, each


def numbers(config: Mapping[str, Any], key: str, default: list[float]) -> list[float]:
    """As many numbers above 0 as ``default`` has; raises `ModelUnsupported`, naming the key."""
    value = config.get(key, default)
    wrong = not isinstance(value, list | tuple) or len(value) != len(default)
    if wrong or any(isinstance(each, bool) or not isinstance(each, int | float) or not each > 0 for each in value):
        raise ModelUnsupported(f"config key {key!r} is {value!r:.80}; expected {len(default)} numbers above 0")
    return [float(each) for each in value]
