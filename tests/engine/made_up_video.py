"""A made-up video family, as small as a family can be: the example of docs/adding-a-family.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT, Output
from tacod.rank.families.config import count_blocks, integer, shape_of, width_of_heads
from tacod.rank.families.inputs import Argument, Residuals, Spec
from tacod.rank.families.names import Names
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass


class Block(nn.Module):
    """Self-attention over the video, cross-attention to text and image, SwiGLU."""

    def __init__(self, width: int, heads: int, kv_heads: int, context: int) -> None:
        super().__init__()
        self.modulation = kit.Modulation(width, 6 * width, bias=False)
        self.self_attn = kit.SelfAttention(
            width,
            heads,
            kv_heads=kv_heads,
            layers=("q", "k", "v"),
            out="o",
            norm="row",
            norms=("norm_q.weight", "norm_k.weight"),
            bias=False,
            out_bias=False,
        )
        self.cross_attn = kit.CrossAttention(
            width,
            heads,
            context_width=context,
            q="q",
            kv=(("k", "v"), ("k_img", "v_img")),
            out="o",
            norm="row",
            norms=("norm_q.weight", "norm_k.weight", "norm_k_img.weight"),
            bias=False,
        )
        self.w1 = nn.Linear(width, 2 * width, bias=False)
        self.w2 = nn.Linear(2 * width, width, bias=False)
        self.w3 = nn.Linear(width, 2 * width, bias=False)

    def forward(self, f: ForwardPass) -> None:
        """The video one block further."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = f.modulation(self.modulation.linear, 6)
        normed = f.image.normed(shift, scale)
        (attended,) = f.attend((f.image, lambda: self.self_attn(normed, f.image.rotation))).wait()
        f.image.add(gate, self.self_attn.project(attended))
        f.image.add(None, self.cross_attn(f.image.normed(), f.text, f.picture, masks=(f.text_mask,)))
        normed = f.image.normed(mlp_shift, mlp_scale)
        f.image.add(mlp_gate, kit.feed_forward(self.w1, self.w2, normed, "swiglu", gate=self.w3))


class Video(DiT):
    """``config`` is ComfyUI's ``unet_config``."""

    family: ClassVar[str] = "made_up_video"
    title = "Made-up Video"
    models = ("tiny",)
    image_models: ClassVar[tuple[str, ...]] = ("made_up_video",)
    diffusers: ClassVar[Mapping[str, Any]] = {
        "MadeUpVideoTransformer3DModel": lambda c: {
            "image_model": "made_up_video",
            "in_channels": c.whole("in_channels", 4),
            "dim": c.whole("num_attention_heads", 4) * c.whole("attention_head_dim", 8),
            "num_heads": c.whole("num_attention_heads", 4),
            "num_kv_heads": c.whole("num_key_value_heads", 2),
            "text_dim": c.whole("text_dim", 6),
            "num_layers": c.whole("num_layers", 2),
        }
    }
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "T": 3, "H": 16, "W": 16, "L": 8}
    downscale = 16
    process = Flow()
    names = Names("""
        patch_embedding                              patch_embed.proj
        condition_embedder.linear_{1,2}              time_in.mlp.{0,2}
        norm_out.linear                              final_layer.adaLN_modulation.1~
        proj_out                                     final_layer.linear
        blocks.*.norm1.linear                        blocks.*.modulation.lin
        blocks.*.{attn1,attn2}.to_{q,k,v}            blocks.*.{self_attn,cross_attn}.{q,k,v}
        blocks.*.{attn1,attn2}.to_out.0              blocks.*.{self_attn,cross_attn}.o
        blocks.*.{attn1,attn2}.norm_{q,k}            blocks.*.{self_attn,cross_attn}.norm_{q,k}
        blocks.*.attn2.add_{k,v}_proj                blocks.*.cross_attn.{k,v}_img
        blocks.*.attn2.norm_added_k                  blocks.*.cross_attn.norm_k_img
        blocks.*.ffn.{gate_proj,down_proj,up_proj}   blocks.*.{w1,w2,w3}
    """)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.width, self.heads = width_of_heads(config, "dim", "num_heads")
        self.channels = self.out_channels = integer(config, "in_channels")
        self.context_width = integer(config, "text_dim")
        kv_heads = integer(config, "num_kv_heads")
        self.patch_embed = kit.PatchEmbed(self.channels, (1, 2, 2), self.width)
        self.time_in = kit.MLPEmbedder(256, self.width, bias=False)
        self.blocks = nn.ModuleList(
            Block(self.width, self.heads, kv_heads, self.context_width) for _ in range(integer(config, "num_layers"))
        )
        self.final_layer = kit.FinalLayer(self.width, 4 * self.out_channels, bias=False)

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`. Published models have 8 channels a head."""
        if "blocks.0.cross_attn.k_img.weight" not in tensors:
            return None
        width, channels, *_ = shape_of(tensors, "patch_embed.proj.weight", 5)
        return {
            "image_model": "made_up_video",
            "in_channels": channels,
            "dim": width,
            "num_heads": width // 8,
            "num_kv_heads": shape_of(tensors, "blocks.0.self_attn.k.weight", 2)[0] // 8,
            "text_dim": shape_of(tensors, "blocks.0.cross_attn.k.weight", 2)[1],
            "num_layers": count_blocks(tensors, "blocks"),
        }

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`; each frame has a timestep of its own."""
        return {
            "x": Argument(("B", self.channels, "T", "H", "W")),
            "timestep": Argument(("B", "T"), fp32=True),
            "context": Argument(("B", "L", self.context_width)),
            "attention_mask": Argument(("B", "L"), required=False, keys=True),
            "clip_fea": Argument(("B", "K", self.context_width), required=False),
            "control": Residuals(self.width, {"input": len(self.blocks)}),
        }

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """See `DiT.lengths`. The text is whole on every rank, so it is no stream."""
        return (kit.Grid(arguments["x"], (1, 2, 2)).length,)

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma * 1000

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        x = arguments["x"]
        conditioning = self.time_in.numbers(arguments["timestep"], x.dtype)
        f.modulate(self.modulating, functional.silu(conditioning))
        f.text, f.text_mask = arguments["context"], arguments.get("attention_mask")
        f.picture = arguments.get("clip_fea")
        f.grid = grid = kit.Grid(x, (1, 2, 2))
        positions = grid.positions(device=x.device)
        f.image = f.shard(
            grid.patches(x),
            self.patch_embed,
            rotation=lambda shard: kit.rope(shard(positions), (2, 2, 2), 100.0, halves=True),
            segments=grid.segments((grid.counts[0], 1, 1), x.device),
        )

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`."""
        return list(self.blocks)

    @property
    def residual_blocks(self) -> Mapping[str, Sequence[Any]]:
        """See `DiT.residual_blocks`."""
        return {"input": list(self.blocks)}

    def end(self, f: ForwardPass) -> Output:
        """See `DiT.end`."""
        latent: Tensor = f.grid.latent(self.final_layer(f))
        return latent
