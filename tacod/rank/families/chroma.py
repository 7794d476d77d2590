"""Chroma (Lodestone Rock, 2025): Flux.1 without a pooled text, whose modulations come from one small network.

That network, the approximator, makes one vector at a time. Parameters are named as in the authors' files
(lodestone-rock/flow, Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT
from tacod.rank.families.config import choice, count_blocks, fixed, integer, number, rope_axes, shape_of, width_of_heads
from tacod.rank.families.flux import EMBEDDER, Flux
from tacod.rank.families.inputs import Argument, Number, Residuals, Spec, Unread
from tacod.rank.families.kit.attention import find, register
from tacod.rank.families.names import Names
from tacod.rank.families.stream import ForwardPass
from tacod_client.errors import ModelUnsupported

__all__ = ["Chroma", "rms_norm"]

_VECTORS = 344
"""Of the modulations that the approximator was made for: 3 for a single block, 12 for a double one, 2 for the end."""
_NUMBERS = 64
"""Into the approximator: a quarter is for the timestep, a quarter for the guidance, and half for the vector's place."""
_MOST_LAYERS = 16
_EPSILON = torch.finfo(torch.float32).eps
_MARK = "distilled_guidance_layer.norms.0.scale"
"""A tensor that only these models have."""


class Approximator(nn.Module):
    """Residual layers that make a modulation vector from its place and the conditioning."""

    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(_NUMBERS, hidden)
        self.layers = nn.ModuleList(kit.MLPEmbedder(hidden, hidden, EMBEDDER) for _ in range(layers))
        for i in range(layers):
            register(self, f"norms.{i}.scale", nn.Parameter(torch.ones(hidden)))
        self.out_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, 64] to [B, S, width]."""
        x = self.in_proj(x)
        for i, layer in enumerate(self.layers):
            x = x + layer(rms_norm(x, find(self, f"norms.{i}.scale")))
        vectors: Tensor = self.out_proj(x)
        return vectors


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """RMS norm over the last dimension, with PyTorch's smallest step of fp32 as epsilon."""
    return functional.rms_norm(x, x.shape[-1:], scale.to(x.dtype), _EPSILON)


class Chroma(Flux):
    """Chroma.

    ``config`` is ComfyUI's ``unet_config``, whose channels are those of a patch. Raises `ModelUnsupported`, naming the
    key, for a configuration that can't be.
    """

    family: ClassVar[str] = "chroma"
    title = "Chroma"
    models: ClassVar[tuple[str, ...]] = ("Chroma1 Base", "HD", "Flash")
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "chroma",
        "in_channels": 16,
        "out_channels": 16,
        "context_in_dim": 8,
        "hidden_size": 48,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "depth": 2,
        "depth_single_blocks": 1,
        "axes_dim": [4, 6, 6],
        "out_dim": 48,
        "hidden_dim": 16,
        "n_layers": 2,
    }
    usual_optional = ()
    usual_values: ClassVar[Mapping[str, float]] = {"guidance": 0.0}
    diffusers: ClassVar[Mapping[str, Any]] = {
        "ChromaTransformer2DModel": lambda c: {
            "depth": c.whole("num_layers", 19),
            "depth_single_blocks": c.whole("num_single_layers", 38),
            "axes_dim": c.items("axes_dims_rope", (16, 56, 56)),
            "patch_size": 2 * c.only("patch_size", 1),
            "n_layers": c.whole("approximator_layers", 5),
        }
    }
    usual: ClassVar[Mapping[str, int]] = {"B": 2, "H": 128, "W": 128, "L": 256}
    image_models: ClassVar[tuple[str, ...]] = ("chroma",)
    diffusers_optional = frozenset()
    # ComfyUI's, and so in what its nodes save or send.
    spellings: ClassVar[Mapping[str, str]] = {
        f".{norm}.weight": f".{norm}.scale"
        for norm in ("query_norm", "key_norm", "norm", *(f"norms.{number}" for number in range(_MOST_LAYERS)))
    }
    names = Names("""
        x_embedder                                          img_in
        context_embedder                                    txt_in
        proj_out                                            final_layer.linear
        distilled_guidance_layer.{in,out}_proj              distilled_guidance_layer.{in,out}_proj
        distilled_guidance_layer.layers.*.linear_{1,2}      distilled_guidance_layer.layers.*.{in,out}_layer
        distilled_guidance_layer.norms.*.weight             distilled_guidance_layer.norms.*.scale
        transformer_blocks.*.attn.to_{q,k,v}                double_blocks.*.img_attn.qkv[0,1,2]
        transformer_blocks.*.attn.add_{q,k,v}_proj          double_blocks.*.txt_attn.qkv[0,1,2]
        transformer_blocks.*.attn.norm_{q,k}.weight         double_blocks.*.img_attn.norm.{query,key}_norm.scale
        transformer_blocks.*.attn.norm_added_{q,k}.weight   double_blocks.*.txt_attn.norm.{query,key}_norm.scale
        transformer_blocks.*.attn.{to_out.0,to_add_out}     double_blocks.*.{img,txt}_attn.proj
        transformer_blocks.*.{ff,ff_context}.net.{0.proj,2} double_blocks.*.{img,txt}_mlp.{0,2}
        single_transformer_blocks.*.attn.to_{q,k,v}         single_blocks.*.linear1[0,1,2]
        single_transformer_blocks.*.proj_mlp                single_blocks.*.linear1[3:]
        single_transformer_blocks.*.attn.norm_{q,k}.weight  single_blocks.*.norm.{query,key}_norm.scale
        single_transformer_blocks.*.proj_out                single_blocks.*.linear2
    """)

    def __init__(self, config: Mapping[str, Any]) -> None:
        DiT.__init__(self)
        self.width, self.heads = width, heads = width_of_heads(config, "hidden_size", "num_heads")
        fixed(config, in_dim=_NUMBERS, out_dim=width, txt_ids_dims=[], vec_in_dim=None)
        self.patch = integer(config, "patch_size", 2)
        self.context_width, self.pooled_width = integer(config, "context_in_dim"), None
        self.axes = rope_axes(config, "axes_dim", 3, width // heads)
        self.text_axes = []
        self.theta = number(config, "theta", 10000)
        self.reference_index, self.epsilon = 1.0, _EPSILON
        qkv_bias: bool = choice(config, "qkv_bias", True, False)
        hidden = round(width * number(config, "mlp_ratio", 4.0))
        double, single = integer(config, "depth", most=1024), integer(config, "depth_single_blocks", least=0, most=1024)
        if 12 * double + 3 * single + 2 > _VECTORS:
            raise ModelUnsupported(
                f"config key 'depth' is {double} and 'depth_single_blocks' {single}, which take "
                f"{12 * double + 3 * single + 2} modulations; this version's approximator makes {_VECTORS}"
            )
        layers = integer(config, "n_layers", 5, most=_MOST_LAYERS)

        self.txt_in = nn.Linear(self.context_width, width)
        self.distilled_guidance_layer = Approximator(width, integer(config, "hidden_dim", 5120), layers)
        self.double_blocks = nn.ModuleList(
            kit.DoubleBlock(width, heads, hidden, qkv_bias, modulated=False) for _ in range(double)
        )
        self.single_blocks = nn.ModuleList(
            kit.SingleBlock(width, heads, hidden, modulated=False) for _ in range(single)
        )
        self.make_ends(config)

    def make_ends(self, config: Mapping[str, Any]) -> None:
        """Make the layers that are next to the image."""
        cells = self.patch**2
        inputs, outputs = integer(config, "in_channels"), integer(config, "out_channels", 64)
        for key, size in (("in_channels", inputs), ("out_channels", outputs)):
            if size % cells:
                raise ModelUnsupported(f"config key {key!r} is {size}; expected a multiple of {cells}, a patch's cells")
        self.channels, self.out_channels = inputs // cells, outputs // cells
        self.img_in = nn.Linear(inputs, self.width)
        register(self, "final_layer.linear", nn.Linear(self.width, outputs))

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`."""
        if _MARK not in tensors or "img_in.weight" not in tensors:
            return None
        return cls.detect_trunk(
            tensors,
            image_model="chroma",
            in_channels=shape_of(tensors, "img_in.weight", 2)[1],
            out_channels=shape_of(tensors, "final_layer.linear.weight", 2)[0],
            patch_size=2,
        )

    @classmethod
    def detect_trunk(cls, tensors: Mapping[str, TensorInfo], **ends: Any) -> dict[str, Any] | None:
        """`detect` of what all of its models have, with what is told of their ``ends``."""
        if _MARK not in tensors:
            return None
        width, context_width = shape_of(tensors, "txt_in.weight", 2)
        (head_width,) = shape_of(tensors, "double_blocks.0.img_attn.norm.key_norm.scale", 1)
        hidden, inputs = shape_of(tensors, "distilled_guidance_layer.in_proj.weight", 2)
        return {
            "context_in_dim": context_width,
            "vec_in_dim": None,
            "hidden_size": width,
            "mlp_ratio": shape_of(tensors, "double_blocks.0.img_mlp.2.weight", 2)[1] / max(width, 1),
            "num_heads": width // max(head_width, 1),
            "depth": count_blocks(tensors, "double_blocks"),
            "depth_single_blocks": count_blocks(tensors, "single_blocks"),
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "qkv_bias": "double_blocks.0.img_attn.qkv.bias" in tensors,
            "txt_ids_dims": [],
            "in_dim": inputs,
            "out_dim": shape_of(tensors, "distilled_guidance_layer.out_proj.weight", 2)[0],
            "hidden_dim": hidden,
            "n_layers": count_blocks(tensors, "distilled_guidance_layer.layers"),
            **ends,
        }

    def arguments(self) -> dict[str, Spec]:
        """See `Flux.arguments`. The guidance is 0 where ComfyUI isn't told of one."""
        blocks = {"input": len(self.double_blocks), "output": len(self.single_blocks), "middle": 0}
        return {
            "x": Argument(("B", self.channels, "H", "W")),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.context_width)),
            "guidance": Argument(("B",), fp32=True),
            "attention_mask": Argument(("B", "S", "S"), required=False, mask=True, shared=True),
            "qk_norm_eps": Number(0.0, 0.01),
            "control": Residuals(self.width, blocks, whole=True),
            **dict.fromkeys(("y", "ref_latents", "ref_latents_method", "rope_options"), Unread()),
        }

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        parts = torch.split(self._modulations(f, arguments), 1, dim=1)
        single, double = 3 * len(self.single_blocks), 6 * len(self.double_blocks)
        f.modulations = {block: parts[3 * i : 3 * i + 3] for i, block in enumerate(self.single_blocks)}
        for i, block in enumerate(self.double_blocks):
            image, text = single + 6 * i, single + double + 6 * i
            f.modulations[block] = parts[text : text + 6], parts[image : image + 6]
        f.final_modulation = parts[-2:]
        self.begin_streams(f, arguments, "offset")

    def _modulations(self, f: ForwardPass, arguments: Mapping[str, Any]) -> Tensor:
        """Every vector that is used, [B, N, width]; the ranks share them out."""
        timestep, guidance, x = arguments["timestep"], arguments["guidance"], arguments["x"]
        used = 12 * len(self.double_blocks) + 3 * len(self.single_blocks)
        places = torch.cat([torch.arange(*ends, device=x.device) for ends in ((0, used), (_VECTORS - 2, _VECTORS))])
        both = [kit.sinusoid(1000 * each.float(), _NUMBERS // 4) for each in (timestep, guidance)]
        place = kit.sinusoid(1000 * places.float(), _NUMBERS // 2)
        count = len(places)
        numbers = torch.cat((*(each[:, None].expand(-1, count, -1) for each in both), place.expand(len(x), -1, -1)), -1)
        mine = self.distilled_guidance_layer(f.sequence.shard(numbers.to(x.dtype)))
        return f.sequence.gather(mine, count)

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`."""
        patches = find(self, "final_layer.linear")(f.image.normed(*f.final_modulation))
        latent: Tensor = f.grid.latent(f.gather(f.image, patches))
        return latent
