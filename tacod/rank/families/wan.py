"""Wan 2.1 and 2.2 (Alibaba, 2025, arXiv:2503.20314), and what Fun and camera control, VACE, Animate and SCAIL add.

Parameters are named as in the authors' files (Wan-Video/Wan2.1, Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT
from tacod.rank.families.config import (
    fixed,
    integer,
    optional_integer,
    width_of_heads,
)
from tacod.rank.families.inputs import Argument, Number, Numbers, Spec, Unread
from tacod.rank.families.latents import WAN21, WAN22
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.families.wan_animate import EVERY, FaceBlock, FaceEncoder, MotionEncoder
from tacod.rank.families.wan_files import (
    NAMES,
    OPTIONAL_LAYERS,
    POSED,
    SEEING,
    detect_config,
    of_diffusers,
    of_diffusers_vace,
    read_kind,
    vace_distance,
)
from tacod.rank.families.wan_parts import PATCH, Block, CameraAdapter, Clip, Head, VaceBlock, embed_patches
from tacod.rank.families.wan_scail import MASK_CHANNELS, scail_arguments
from tacod.rank.families.wan_sequence import (
    Video,
    check_fits,
    embed_videos,
    frames_before,
    list_places,
    list_videos,
    rotate,
    video_grid,
)
from tacod_client.errors import ArgumentError, ModelUnsupported

__all__ = ["Wan"]

_POSE_CHANNELS = 16


class Wan(DiT):
    """Text to video, image to video, first and last frame, Fun control, camera control, VACE, Animate and SCAIL.

    ``config`` is ComfyUI's ``unet_config``, and what its classes have fixed: ``clip_dim``, the channels of CLIP's
    tokens, and of Animate ``pose_dim``, those of poses, and ``face``, the sizes of `MotionEncoder` and `FaceEncoder`.
    Raises `ModelUnsupported`, naming the key, for a configuration that can't be.
    """

    family: ClassVar[str] = "wan"
    title = "Wan"
    models = (
        "2.1 T2V, I2V, FLF2V",
        "2.2 A14B and 5B",
        "2.2 Animate",
        "VACE",
        "Fun control and camera",
        "SCAIL and SCAIL-2",
    )
    notes = True
    fp32_weights = r"((vace_)?patch_embedding|patch_embedding_(pose|mask))\.(weight|bias)"
    lora_marks = r"(^|[._])(vace_)?blocks[._]\d+[._]((self|cross)_attn[._](q|k|v|o)(_img)?([._]|$)|ffn[._][02]([._]|$))"
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "wan2.1",
        "model_type": "i2v",
        "dim": 48,
        "num_heads": 3,
        "ffn_dim": 80,
        "num_layers": 2,
        "in_dim": 5,
        "out_dim": 4,
        "text_dim": 16,
        "clip_dim": 32,
        "flf_pos_embed_token_number": 9,
    }
    diffusers: ClassVar[Mapping[str, Any]] = {
        "WanTransformer3DModel": of_diffusers,
        "WanVACETransformer3DModel": of_diffusers_vace,
    }
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "T": 3, "H": 60, "W": 104, "L": 512, "V": 1}
    image_models: ClassVar[tuple[str, ...]] = ("wan2.1",)
    process = Flow()
    diffusers_optional = OPTIONAL_LAYERS
    names = NAMES

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fixed(config, patch_size=list(PATCH), freq_dim=256, window_size=[-1, -1], eps=1e-6)
        fixed(config, qk_norm=True, cross_attn_norm=True)
        self.kind = read_kind(config)
        self.width, self.heads = width, heads = width_of_heads(config, "dim", "num_heads")
        head_width = width // heads
        if head_width % 2:
            raise ModelUnsupported(
                f"config key 'num_heads' is {heads}; a head must have an even number of channels, of {width} in all"
            )
        side = head_width // 6 * 2
        self.axes = (head_width - 2 * side, side, side)
        self.channels = integer(config, "in_dim", 16)
        self.out_channels = integer(config, "out_dim", 16)
        self.latent_format = {16: WAN21, 48: WAN22}.get(self.out_channels)
        self.downscale = 16 if self.latent_format is WAN22 else 8
        self.context_width = integer(config, "text_dim", 4096)
        hidden, layers = integer(config, "ffn_dim"), integer(config, "num_layers", most=1024)
        sees_image = self.kind in SEEING

        self.patch_embedding = nn.Conv3d(self.channels, width, PATCH, stride=PATCH)
        self.text_embedding = kit.MLP(self.context_width, width, ("0", "2"), outputs=width)
        self.time_embedding = kit.MLPEmbedder(256, width, ("0", "2"))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden, sees_image) for _ in range(layers))
        self.head = Head(width, 4 * self.out_channels)
        self.img_emb = self.ref_conv = self.control_adapter = None
        self.most_clip = math.inf
        if sees_image:
            self.clip_width = integer(config, "clip_dim", 1280)
            positions = optional_integer(config, "flf_pos_embed_token_number")
            self.most_clip = self.most_clip if positions is None else positions
            self.img_emb = Clip(self.clip_width, width, positions)
        self.reference_channels = optional_integer(config, "in_dim_ref_conv")
        if self.reference_channels is not None:
            if self.kind not in ("t2v", "i2v"):
                raise ModelUnsupported(
                    f"config key 'in_dim_ref_conv': there is none where 'model_type' is {self.kind!r}"
                )
            self.ref_conv = nn.Conv2d(self.reference_channels, width, PATCH[1:], stride=PATCH[1:])
        if self.kind in ("camera", "camera_2.2"):
            self.control_adapter = CameraAdapter(integer(config, "in_dim_control_adapter", 24), width)
        self.patch_embedding_mask = None
        if self.kind in POSED:
            self.patch_embedding_pose = nn.Conv3d(self.channels, width, PATCH, stride=PATCH)
        if self.kind == "scail2":
            masks = integer(config, "mask_in_dim", MASK_CHANNELS)
            self.patch_embedding_mask = nn.Conv3d(masks, width, PATCH, stride=PATCH)
        if self.kind == "animate":
            self._add_face(config, layers)
        self.vace_blocks = nn.ModuleList()
        if self.kind == "vace":
            count = integer(config, "vace_layers")
            self.every = vace_distance(layers, count)
            self.vace_channels = integer(config, "vace_in_dim", 96)
            self.vace_patch_embedding = nn.Conv3d(self.vace_channels, width, PATCH, stride=PATCH)
            self.vace_blocks.extend(VaceBlock(width, heads, hidden, first=n == 0) for n in range(count))

    def _add_face(self, config: Mapping[str, Any], layers: int) -> None:
        """Animate's layers."""
        if layers % EVERY:
            raise ModelUnsupported(f"config key 'num_layers' is {layers}; with a face it must be a multiple of {EVERY}")
        sizes = config.get("face")
        if not isinstance(sizes, Mapping):
            raise ModelUnsupported(f"config key 'face' is {sizes!r:.80}; expected a map of sizes")
        self.pose_channels = integer(config, "pose_dim", _POSE_CHANNELS)
        self.pose_patch_embedding = nn.Conv3d(self.pose_channels, self.width, PATCH, stride=PATCH)
        self.motion_encoder = MotionEncoder(sizes)
        self.face_encoder = FaceEncoder(sizes, self.width)
        blocks = nn.ModuleList(FaceBlock(self.width, self.heads) for _ in range(layers // EVERY))
        self.face_adapter = nn.ModuleDict({"fuser_blocks": blocks})

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`. Published models have 128 channels a head."""
        return detect_config(tensors) if "head.modulation" in tensors else None

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`.

        Where a first image is given, each frame has a timestep of its own (``t2v`` and ``i2v``). ``clip_fea`` are
        tokens of CLIP, ``time_dim_concat`` frames behind those of ``x``, ``reference_latent`` a frame before them, and
        ``context_latents`` videos beside it. ``vace_context`` are VACE's given videos with their masks, and
        ``vace_strength`` a number for each, by default 1. Animate takes ``pose_latents``, for frames from the second
        on, and pictures of a face; `scail_arguments` has SCAIL's.
        """
        plain = self.kind in ("t2v", "i2v")
        specs: dict[str, Spec] = {
            "x": Argument(("B", self.channels, "T", "H", "W")),
            "timestep": Argument(("B",), fp32=True, per="T" if plain else ""),
            "context": Argument(("B", "L", self.context_width)),
            "clip_fea": Unread(),
            "reference_latent": Unread(),
            "rope_options": Numbers(kit.ROPE_OPTIONS),
            "denoise_mask": Unread(),
            "control": Unread(),
        }
        if self.img_emb is not None:
            specs["clip_fea"] = Argument(("B", "K", self.clip_width), required=False)
        if self.reference_channels is not None:
            specs["reference_latent"] = Argument(("B", self.reference_channels, "H", "W"), required=False)
        if plain:
            specs["time_dim_concat"] = Argument(("B", self.channels, "R", "H", "W"), required=False)
            specs["context_latents"] = Argument(("B", self.channels, "CT", "CH", "CW"), required=False, many=True)
        if self.control_adapter is not None:
            inputs = self.control_adapter.inputs
            specs["camera_conditions"] = Argument(("B", inputs, "T", "CH", "CW"), required=False)
        if self.kind in POSED:
            masks = None if self.patch_embedding_mask is None else self.patch_embedding_mask.in_channels
            specs |= scail_arguments(self.channels, masks)
        if self.kind == "animate":
            side = self.motion_encoder.side
            specs["time_dim_concat"] = Argument(("B", self.channels, "R", "H", "W"), required=False)
            specs["pose_latents"] = Argument(("B", self.pose_channels, "P", "H", "W"), required=False)
            specs["face_pixel_values"] = Argument(("B", 3, "F", side, side), required=False)
        if self.kind == "vace":
            specs["vace_context"] = Argument(("B", "V", self.vace_channels, "T", "H", "W"))
            specs["vace_strength"] = Number(-1000.0, 1000.0, many=True)
        return specs

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """See `DiT.lengths`: the tokens of a reference, the video and what is beside it, in this order.

        The texts are whole on every rank, so they are no streams.
        """
        check_fits(arguments, self.kind, self.downscale, self.most_clip)
        tokens = sum(place.grid.length for place in list_places(arguments, self.kind))
        timestep = arguments["timestep"]
        if len(timestep.shape) > 1 and timestep.shape[1] < tokens < 2 * timestep.shape[1]:
            raise ArgumentError(
                f"timestep: its {timestep.shape[1]} frames can't be told apart in {tokens} tokens; give one for all",
                argument="timestep",
            )
        return (tokens,)

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma * 1000

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        (tokens,) = self.lengths(arguments)
        first, last = f.sequence.place(tokens)
        x, timestep = arguments["x"], arguments["timestep"]
        times = kit.sinusoid(timestep, powers=True).to(x.dtype)
        f.conditioning = self.time_embedding(times).reshape(len(x), -1, self.width)
        f.times = self.time_projection(f.conditioning)
        f.text, f.picture = self._texts(arguments)
        segments = None
        if timestep.ndim > 1:
            # ComfyUI deals tokens out to frames evenly, a reference's and other videos' too.
            segments = f.sequence.shard(torch.arange(tokens, device=x.device) // -(-tokens // timestep.shape[1]), dim=0)
        places = list_places(arguments, self.kind)
        rotation = rotate(places, self.axes, lambda each: f.sequence.shard(each, dim=0), x.device)
        f.image = Stream(embed_videos(list_videos(self, arguments), first, last), (tokens,), rotation, segments)
        f.grid, f.frames = video_grid(arguments), x.shape[2]
        f.before = frames_before(arguments) * math.prod(f.grid.counts[1:])
        if "camera_conditions" in arguments:
            assert self.control_adapter is not None
            if first < last:
                f.image.tokens = f.image.tokens + self.control_adapter(arguments["camera_conditions"], first, last)
        if "pose_latents" in arguments and self.kind == "animate":
            self._add_poses(f, arguments["pose_latents"], first, last)
        f.face = f.prefix[0] if f.prefix else None
        if self.kind == "vace":
            f.start = f.image.tokens
            f.given = [self._given(f, each) for each in arguments["vace_context"].unbind(1)]
            f.strengths = arguments.get("vace_strength") or [1.0] * len(f.given)

    @property
    def has_prefix(self) -> bool:
        """See `DiT.has_prefix`: Animate has one."""
        return self.kind == "animate"

    def prefix(self, f: ForwardPass, **arguments: Any) -> Sequence[Tensor]:
        """See `DiT.prefix`: tokens of the face in each frame, [B, T, 5, width]. Ranks share the pictures out."""
        face = arguments.get("face_pixel_values")
        if face is None:
            return ()
        mine = f.sequence.shard(face.transpose(1, 2))
        motion = torch.unflatten(self.motion_encoder(mine.flatten(0, 1)), 0, mine.shape[:2])
        motion = f.sequence.gather(motion, face.shape[2])
        return (self.face_encoder(motion, video_grid(arguments).counts[0]),)

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`; blocks of VACE and of Animate's face follow those of the video."""
        order: list[Any] = []
        for number, block in enumerate(self.blocks):
            order.append(block)
            if self.vace_blocks and number % self.every == 0:
                order.append(self.vace_blocks[number // self.every])
            if self.kind == "animate" and number % EVERY == 0:
                order.append(self.face_adapter["fuser_blocks"][number // EVERY])  # type: ignore[index]
        return order

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`."""
        latent: Tensor = f.grid.latent(self.head(f)[:, f.before :], channels_last=True)
        return latent[:, :, : f.frames]

    def _texts(self, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """What the blocks attend to as text and as image, each [B, L, width]."""
        text = self.text_embedding(arguments["context"])
        if self.img_emb is None:
            return text, None
        # Without an image ComfyUI takes the text for both.
        return text, self.img_emb(arguments["clip_fea"]) if "clip_fea" in arguments else text

    def _add_poses(self, f: ForwardPass, poses: Tensor, first: int, last: int) -> None:
        """Add tokens of poses to those of the frames from the second on, as far as there are both."""
        video = Video(poses, self.pose_patch_embedding, rounded=True)
        frame = math.prod(f.grid.counts[1:])
        begin, end = max(first, frame), max(min(last, frame + video.length), frame)
        if begin < end:
            tokens = video.tokens(begin - frame, end - frame)
            f.image.tokens = f.image.tokens + functional.pad(tokens, (0, 0, begin - first, last - end))

    def _given(self, f: ForwardPass, video: Tensor) -> Stream:
        """A stream of one of VACE's videos [B, C, T, H, W], at the places of ``x``."""
        stream = f.shard(f.grid.patches(video), lambda chunk: embed_patches(self.vace_patch_embedding, chunk))
        stream.rotation = f.image.rotation
        return stream
