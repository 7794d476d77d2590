"""LTX-Video 0.9 (Lightricks, 2024, arXiv:2501.00103)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.config import count_blocks, fixed, integer, shape_of
from tacod.rank.families.inputs import Argument, Inputs, Spec
from tacod.rank.families.ltx_base import LATENTS, LTX, PATCH
from tacod.rank.families.ltx_guides import check_guides, check_times, distinct, tokens_of
from tacod.rank.families.ltx_parts import RMS, CrossAttention, SelfAttention, feed_forward
from tacod.rank.families.names import Names
from tacod.rank.families.stream import ForwardPass

__all__ = ["LTXVideo"]


class Block(nn.Module):
    """Self-attention over the video, cross-attention to the text, GELU."""

    def __init__(self, width: int, heads: int, head_width: int, ff_bias: bool) -> None:
        super().__init__()
        self.attn1 = SelfAttention(width, heads, head_width)
        self.attn2 = CrossAttention(width, heads, head_width)
        self.ff = feed_forward(width, ff_bias)
        self.scale_shift_table = kit.drawn(6, width)

    def forward(self, f: ForwardPass) -> None:
        """The video one block further."""
        parts = (self.scale_shift_table.flatten() + f.times).chunk(6, dim=-1)
        normed = f.image.normed(*parts[:2], norm=RMS)
        (attended,) = f.attend((f.image, lambda: self.attn1(normed, f.image.rotation)), mask=f.bias).wait()
        f.image.add(parts[2], self.attn1.out(attended, normed))
        keys, values = f.texts[self.attn2]
        f.image.add(None, self.attn2.attend(f.image.tokens, keys, values, f.text_mask))
        f.image.add(parts[5], self.ff(f.image.normed(*parts[3:5], norm=RMS)))


class LTXVideo(LTX):
    """Text to video, image to video, keyframes and guides; see `LTX`."""

    family: ClassVar[str] = "ltxv"
    title = "LTX-Video"
    models = ("0.9 to 0.9.8, 2B and 13B",)
    image_models: ClassVar[tuple[str, ...]] = ("ltxv",)
    latent_format = LATENTS
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "ltxv",
        "num_layers": 2,
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "cross_attention_dim": 48,
        "in_channels": 4,
        "caption_channels": 16,
        "causal_temporal_positioning": True,
    }
    diffusers: ClassVar[Mapping[str, Any]] = {
        "LTXVideoTransformer3DModel": lambda c: {
            "num_attention_heads": c.whole("num_attention_heads", 32),
            "attention_head_dim": c.whole("attention_head_dim", 64),
            "num_layers": c.whole("num_layers", 28),
        }
    }
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "T": 13, "H": 16, "W": 24, "L": 256}
    names = Names("""
        proj_in                                              patchify_proj
        time_embed.emb.timestep_embedder.linear_{1,2}        adaln_single.emb.timestep_embedder.linear_{1,2}
        time_embed.linear                                    adaln_single.linear
        caption_projection.linear_{1,2}
        scale_shift_table
        proj_out
        transformer_blocks.*.scale_shift_table
        transformer_blocks.*.attn{1,2}.to_{q,k,v,out.0}
        transformer_blocks.*.attn{1,2}.norm_{q,k}            transformer_blocks.*.attn{1,2}.{q,k}_norm
        transformer_blocks.*.ff.net.{0.proj,2}
    """)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        fixed(config, cross_attention_adaln=False, caption_proj_before_connector=False)
        self.caption_projection = kit.MLP(self.caption_width, self.width, ("linear_1", "linear_2"), outputs=self.width)
        self.transformer_blocks = nn.ModuleList(
            Block(self.width, self.heads, self.head_width, self.ff_bias)
            for _ in range(integer(config, "num_layers", 28, most=1024))
        )

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`; the rest is in the metadata of newer files. There are 32 heads."""
        known = "adaln_single.emb.timestep_embedder.linear_1.bias", "patchify_proj.weight"
        if any(key not in tensors for key in known) or "audio_adaln_single.linear.weight" in tensors:
            return None
        width, context = shape_of(tensors, "transformer_blocks.0.attn2.to_k.weight", 2)
        return {
            "image_model": "ltxv",
            "num_layers": count_blocks(tensors, "transformer_blocks"),
            "attention_head_dim": width // 32,
            "cross_attention_dim": context,
            "in_channels": shape_of(tensors, "patchify_proj.weight", 2)[1],
            "caption_channels": shape_of(tensors, "caption_projection.linear_1.weight", 2)[1],
            "use_keyframes_abs_pos_embedding": "keyframes_abs_pos_embedding" in tensors,
        }

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments` and `LTX.video_arguments`."""
        return {
            "x": Argument(("B", self.channels, "T", "H", "W")),
            "timestep": Argument(("B",), fp32=True, per=("N", 1)),
            "context": Argument(("B", "L", self.caption_width)),
            "attention_mask": Argument(("B", "L"), required=False, keys=True),
            **self.video_arguments(),
        }

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """See `DiT.lengths`. The text is whole on every rank, so it is no stream."""
        check_guides(arguments)
        check_times(arguments.get("timestep"), kit.Grid(arguments["x"], PATCH).length)
        self.check_markers(arguments, arguments["x"])
        return (arguments.get("tokens") or kit.Grid(arguments["x"], PATCH).length,)

    def prepare_tokens(self, inputs: Inputs) -> Inputs:
        """See `LTX.prepare_tokens`."""
        if "tokens" in inputs:
            return inputs
        kept, changes = tokens_of(inputs, inputs["x"])
        times = inputs["timestep"].reshape(inputs.batch, -1)
        if kept is not None and times.shape[1] > 1:
            times = times[:, kept]
        changes["timestep"], changes["rows"] = distinct(times)
        return inputs.replace(**changes)

    def prefix(self, f: ForwardPass, **arguments: Any) -> Sequence[Tensor]:
        """See `DiT.prefix`: the keys and values of the text in each block."""
        text = self.caption_projection(arguments["context"])
        return [each for block in f.over(self.trunk) for each in block.attn2.keys_values(text)]

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        x, timestep = arguments["x"], arguments["timestep"]
        f.text_mask = arguments.get("attention_mask")
        f.texts = self.texts_of(f, (block.attn2 for block in self.trunk))
        self.begin_video(f, x, timestep.reshape(len(x), -1), arguments)

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`."""
        return self.end_video(f)
