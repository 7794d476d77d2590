"""Cosmos-Predict2 (NVIDIA, 2025) and Anima, which has its network: self-attention, cross-attention, feed-forward.

Parameters are named as in the authors' files (nvidia-cosmos/cosmos-predict2, Apache-2.0), behind ``net.``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.anima_adapter import Adapter
from tacod.rank.families.base import DiT, Method
from tacod.rank.families.config import count_blocks, fixed, integer, number, shape_of, width_of_heads
from tacod.rank.families.inputs import Argument, Spec, Unread
from tacod.rank.families.kit.attention import find, register
from tacod.rank.families.latents import WAN21
from tacod.rank.families.names import Names
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass
from tacod.rank.ops.qkv import Rotation
from tacod_client.errors import ModelUnsupported

__all__ = ["CosmosPredict2"]

_PATCH = (1, 2, 2)
_RATIOS = tuple(f"rope_{axis}_extrapolation_ratio" for axis in "thw")
_LEAST_HEAD = 12
"""Channels of a head: a sixth of them, twice rounded down, is what rows turn, and 2 of them could not be stretched."""


class LowRank(kit.Modulation):
    """A modulation through few channels, plus one that all blocks share.

    A layer's input is the conditioning [..., W], followed by the shared shift, scale and gate [..., 3 * W].
    """

    def __init__(self, width: int, rank: int, outputs: int) -> None:
        super().__init__(width, rank, "1", bias=False)
        register(self, "2", nn.Linear(rank, outputs, bias=False))
        self.width, self.out_features = width, outputs

    @property
    def linear(self) -> Any:
        """Both layers, as one."""
        return self

    def forward(self, c: Tensor) -> Tensor:
        """Shift, scale and gate, or the first of them."""
        low, shared = find(self, "1")(c[..., : self.width]), c[..., self.width : self.width + self.out_features]
        out: Tensor = find(self, "2")(low) + shared
        return out


class Block(nn.Module):
    """Self-attention over the video, cross-attention to the text, GELU; each with shift, scale and gate of its own."""

    def __init__(self, width: int, heads: int, context: int, rank: int, hidden: int) -> None:
        super().__init__()
        norms = "q_norm.weight", "k_norm.weight"
        self.self_attn = kit.SelfAttention(
            width,
            heads,
            layers=("q_proj", "k_proj", "v_proj"),
            out="output_proj",
            norm="head",
            norms=norms,
            bias=False,
            out_bias=False,
        )
        self.cross_attn = kit.CrossAttention(
            width,
            heads,
            context_width=context,
            q="q_proj",
            kv=(("k_proj", "v_proj"),),
            out="output_proj",
            norm="head",
            norms=norms,
            bias=False,
        )
        self.mlp = kit.MLP(width, hidden, ("layer1", "layer2"), "gelu_exact", bias=False)
        self.adaln_modulation_self_attn = LowRank(width, rank, 3 * width)
        self.adaln_modulation_cross_attn = LowRank(width, rank, 3 * width)
        self.adaln_modulation_mlp = LowRank(width, rank, 3 * width)

    def forward(self, f: ForwardPass) -> None:
        """The video one block further. Tokens may be fp32 where all else is fp16."""
        shift, scale, gate = f.modulation(self.adaln_modulation_self_attn, 3)
        normed = f.image.normed(shift, scale).to(f.dtype)
        (attended,) = f.attend((f.image, lambda: self.self_attn(normed, f.image.rotation))).wait()
        f.image.add(gate, self.self_attn.project(attended).to(f.image.dtype))
        shift, scale, gate = f.modulation(self.adaln_modulation_cross_attn, 3)
        attended = self.cross_attn(f.image.normed(shift, scale).to(f.dtype), f.text)
        f.image.add(gate, attended.to(f.image.dtype))
        shift, scale, gate = f.modulation(self.adaln_modulation_mlp, 3)
        out = self.mlp(f.image.normed(shift, scale).to(f.dtype))
        f.image.add(gate, out.to(f.image.dtype))


class CosmosPredict2(DiT):
    """Cosmos-Predict2 text-to-image and video-to-world, 2B and 14B, and Anima.

    ``config`` is ComfyUI's ``unet_config``, and ``llm_adapter``, the sizes of Anima's `Adapter` if the file has one.
    Raises `ModelUnsupported`, naming the key, for a configuration that can't be.
    """

    family: ClassVar[str] = "cosmos_predict2"
    title = "Anima and Cosmos-Predict2"
    models = ("Anima", "text2image 2B and 14B", "video2world 2B and 14B")
    lora_marks = r"blocks[._]\d+[._]((self|cross)_attn[._](q|k|v|output)_proj|adaln_modulation_|mlp[._]layer[12])"
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "cosmos_predict2",
        "in_channels": 5,
        "out_channels": 4,
        "model_channels": 48,
        "num_heads": 3,
        "num_blocks": 2,
        "crossattn_emb_channels": 16,
        "adaln_lora_dim": 16,
        "rope_t_extrapolation_ratio": 0.8,
        "rope_h_extrapolation_ratio": 2.0,
        "rope_w_extrapolation_ratio": 3.0,
    }
    diffusers: ClassVar[Mapping[str, Any]] = {
        "CosmosTransformer3DModel": lambda c: {
            "num_blocks": c.whole("num_layers", 28),
            "concat_padding_mask": c.get("concat_padding_mask", True),
            "extra_per_block_abs_pos_emb": c.get("extra_pos_embed_type", "learnable") is not None,
            **dict(zip(_RATIOS, c.several("rope_scale", (2.0, 1.0, 1.0)), strict=True)),
        }
    }
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "T": 1, "H": 128, "W": 128, "L": 512}
    image_models: ClassVar[tuple[str, ...]] = ("anima", "cosmos_predict2")
    beside = ("pos_embedder.", "accum_")
    process = Flow()
    latent_format = WAN21
    names = Names("""
        patch_embed.proj                                 x_embedder.proj.1
        time_embed.t_embedder.linear_{1,2}               t_embedder.1.linear_{1,2}
        time_embed.norm                                  t_embedding_norm
        norm_out.linear_{1,2}                            final_layer.adaln_modulation.{1,2}
        proj_out                                         final_layer.linear
        transformer_blocks.*.norm{1,2,3}.linear_1        blocks.*.adaln_modulation_{self_attn,cross_attn,mlp}.1
        transformer_blocks.*.norm{1,2,3}.linear_2        blocks.*.adaln_modulation_{self_attn,cross_attn,mlp}.2
        transformer_blocks.*.{attn1,attn2}.to_{q,k,v}    blocks.*.{self_attn,cross_attn}.{q,k,v}_proj
        transformer_blocks.*.{attn1,attn2}.norm_{q,k}    blocks.*.{self_attn,cross_attn}.{q,k}_norm
        transformer_blocks.*.{attn1,attn2}.to_out.0      blocks.*.{self_attn,cross_attn}.output_proj
        transformer_blocks.*.ff.net.{0.proj,2}           blocks.*.mlp.{layer1,layer2}
    """)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fixed(config, concat_padding_mask=True, pos_emb_cls="rope3d", patch_spatial=2, patch_temporal=1)
        fixed(config, use_adaln_lora=True, extra_per_block_abs_pos_emb=False, rope_enable_fps_modulation=False)
        self.width, self.heads = width, heads = width_of_heads(config, "model_channels", "num_heads")
        if width // heads < _LEAST_HEAD or width // heads % 2:
            raise ModelUnsupported(
                f"config key 'num_heads' is {heads}; expected an even number of channels a head from {_LEAST_HEAD} on, "
                f"of {width} in all ('model_channels')"
            )
        self.ratios = [number(config, key, 1.0) for key in _RATIOS]
        self.channels = integer(config, "in_channels")
        self.out_channels = integer(config, "out_channels", 16)
        self.context_width = integer(config, "crossattn_emb_channels", 1024)
        rank, hidden = integer(config, "adaln_lora_dim", 256), int(width * number(config, "mlp_ratio", 4.0))

        # One channel more: a mask of padding, which is 0 everywhere.
        inputs, outputs = 4 * (self.channels + 1), 4 * self.out_channels
        register(self, "x_embedder.proj.1", nn.Linear(inputs, width, bias=False))
        register(self, "t_embedder.1.linear_1", nn.Linear(width, width, bias=False))
        register(self, "t_embedder.1.linear_2", nn.Linear(width, 3 * width, bias=False))
        self.t_embedding_norm = nn.RMSNorm(width, 1e-6)
        self.blocks = nn.ModuleList(
            Block(width, heads, self.context_width, rank, hidden) for _ in range(integer(config, "num_blocks"))
        )
        register(self, "final_layer.linear", nn.Linear(width, outputs, bias=False))
        register(self, "final_layer.adaln_modulation", LowRank(width, rank, 2 * width))
        sizes = config.get("llm_adapter")
        self.llm_adapter = Adapter(sizes) if isinstance(sizes, Mapping) else None

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`. How positions are stretched is told by the kind and size of the model."""
        if "blocks.0.mlp.layer1.weight" not in tensors or "x_embedder.proj.1.weight" not in tensors:
            return None
        width, inputs = shape_of(tensors, "x_embedder.proj.1.weight", 2)
        (head_width,) = shape_of(tensors, "blocks.0.self_attn.q_norm.weight", 1)
        hidden, _ = shape_of(tensors, "blocks.0.mlp.layer1.weight", 2)
        channels = inputs // 4 - 1
        large = width >= 5120
        ratios = (1.0, 4.0, 4.0) if channels == 16 else (5 / 6, 2.0, 2.0) if large else (1.0, 3.0, 3.0)
        adapter = Adapter.detect(tensors)
        return {
            "image_model": "anima" if adapter else "cosmos_predict2",
            "in_channels": channels,
            "out_channels": shape_of(tensors, "final_layer.linear.weight", 2)[0] // 4,
            "model_channels": width,
            "num_heads": width // max(head_width, 1),
            "num_blocks": count_blocks(tensors, "blocks"),
            "mlp_ratio": hidden / max(width, 1),
            "crossattn_emb_channels": shape_of(tensors, "blocks.0.cross_attn.k_proj.weight", 2)[1],
            "adaln_lora_dim": shape_of(tensors, "blocks.0.adaln_modulation_mlp.1.weight", 2)[0],
            "concat_padding_mask": True,
            "extra_per_block_abs_pos_emb": False,
            **dict(zip(_RATIOS, ratios, strict=True)),
            **({"llm_adapter": adapter} if adapter else {}),
        }

    def methods(self) -> dict[str, Method]:
        """See `DiT.methods`: of Anima, what makes the context of forwards of a text."""
        adapter = self.llm_adapter
        return {} if adapter is None else {"preprocess_text_embeds": Method(adapter.arguments(), adapter)}

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`; where parts of a video are given, each frame has a timestep of its own."""
        return {
            "x": Argument(("B", self.channels, "T", "H", "W")),
            "timestep": Argument(("B",), fp32=True, per="T"),
            "context": Argument(("B", "L", self.context_width)),
            "denoise_mask": Unread(),
            "fps": Unread(),
            "control": Unread(),
        }

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """See `DiT.lengths`. The text is whole on every rank, so it is no stream."""
        return (kit.Grid(arguments["x"], _PATCH).length,)

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`. ComfyUI's levels of Cosmos-Predict2 are sigma / (1 - sigma), and mean the same."""
        return sigma

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        x, timestep, f.text = arguments["x"], arguments["timestep"], arguments["context"]
        f.dtype = x.dtype
        embedded = kit.sinusoid(timestep, self.width).to(x.dtype)
        first, second = (find(self, f"t_embedder.1.linear_{n}") for n in (1, 2))
        shared = second(functional.silu(first(embedded)))
        f.modulate(self.modulating, torch.cat((functional.silu(self.t_embedding_norm(embedded)), shared), dim=-1))

        f.grid = grid = kit.Grid(x, _PATCH)
        patches, positions = functional.pad(grid.patches(x), (0, 4)), grid.positions(device=x.device)
        f.image = f.shard(
            patches,
            find(self, "x_embedder.proj.1"),
            lambda shard: self._rotation(shard(positions)),
            grid.segments((grid.counts[0], 1, 1), x.device) if timestep.ndim > 1 else None,
        )
        if x.dtype == torch.float16:
            # Tokens grow beyond what fp16 holds.
            f.image.tokens = f.image.tokens.float()

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`."""
        return list(self.blocks)

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`."""
        shift, scale = f.modulation(find(self, "final_layer.adaln_modulation"), 2)
        patches = find(self, "final_layer.linear")(f.image.normed(shift, scale).to(f.dtype))
        latent: Tensor = f.grid.latent(f.gather(f.image, patches), channels_last=True)
        return latent

    def _rotation(self, positions: Tensor) -> Rotation:
        """Of tokens at (frame, row, column) [S, 3]. Angles are computed in fp32, as the authors do."""
        head = self.width // self.heads
        side = head // 6 * 2
        angles = []
        for axis, (width, ratio) in enumerate(zip((head - 2 * side, side, side), self.ratios, strict=True)):
            theta = 10000.0 * ratio ** (width / (width - 2))
            exponents = torch.arange(0, width, 2, device=positions.device).float() / width
            angles.append(positions[:, axis, None] * (1.0 / theta**exponents))
        angle = torch.cat(angles, dim=-1)
        return Rotation(angle.cos(), angle.sin(), halves=True)
