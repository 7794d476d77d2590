"""FLUX.2 (Black Forest Labs, 2025): dev, and klein of 4B and 9B parameters; with references.

Flux.1 without biases and with SwiGLU, whose blocks share three modulations. A token is a cell of the latent, and text
advances along a fourth axis of positions. Parameters are named as in the authors' files (black-forest-labs/flux2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT, LatentFormat
from tacod.rank.families.config import choice, count_blocks, fixed, integer, number, rope_axes, shape_of, width_of_heads
from tacod.rank.families.flux import EMBEDDER, Flux
from tacod.rank.families.inputs import Argument, Spec, Unread
from tacod.rank.families.names import Names
from tacod.rank.families.stream import ForwardPass

__all__ = ["Flux2"]

_AT_ZERO = "index_timestep_zero"
"""Places references as ``"index"`` does, and tells the network that they are clean: their timestep is 0."""


class Flux2(Flux):
    """FLUX.2 dev, which takes a guidance, and klein.

    ``config`` is ComfyUI's ``unet_config``. Raises `ModelUnsupported`, naming the key, for a configuration that can't
    be.
    """

    family: ClassVar[str] = "flux2"
    title = "FLUX.2"
    models = ("dev", "klein 4B", "klein 9B")
    lora_marks = r"(double|single)_stream_modulation|[._]to_qkv_mlp_proj"
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "flux2",
        "in_channels": 4,
        "out_channels": 4,
        "context_in_dim": 8,
        "hidden_size": 48,
        "num_heads": 3,
        "mlp_ratio": 1.0,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [4, 4, 4, 4],
        "guidance_embed": True,
    }
    usual_optional = ("guidance",)
    usual_values: ClassVar[Mapping[str, float]] = {"guidance": 4.0}
    diffusers: ClassVar[Mapping[str, Any]] = {
        "Flux2Transformer2DModel": lambda c: {
            "depth": c.whole("num_layers", 8),
            "depth_single_blocks": c.whole("num_single_layers", 48),
            "axes_dim": c.items("axes_dims_rope", (32, 32, 32, 32)),
            "theta": c.whole("rope_theta", 2000),
            "patch_size": c.only("patch_size", 1),
            "guidance_embed": c.get("guidance_embeds", True),
        }
    }
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "H": 64, "W": 64, "L": 512}
    downscale = 16
    image_models: ClassVar[tuple[str, ...]] = ("flux2",)
    latent_format = LatentFormat(1.0, 0.0)
    diffusers_optional = frozenset(f"time_guidance_embed.guidance_embedder.linear_{n}" for n in (1, 2))
    names = Names("""
        x_embedder                                                       img_in
        context_embedder                                                 txt_in
        time_guidance_embed.{timestep,guidance}_embedder.linear_{1,2}    {time,guidance}_in.{in,out}_layer
        double_stream_modulation_{img,txt}.linear                        double_stream_modulation_{img,txt}.lin
        single_stream_modulation.linear                                  single_stream_modulation.lin
        norm_out.linear                                                  final_layer.adaLN_modulation.1~
        proj_out                                                         final_layer.linear
        transformer_blocks.*.attn.to_{q,k,v}                             double_blocks.*.img_attn.qkv[0,1,2]
        transformer_blocks.*.attn.add_{q,k,v}_proj                       double_blocks.*.txt_attn.qkv[0,1,2]
        transformer_blocks.*.attn.norm_{q,k}.weight         double_blocks.*.img_attn.norm.{query,key}_norm.scale
        transformer_blocks.*.attn.norm_added_{q,k}.weight   double_blocks.*.txt_attn.norm.{query,key}_norm.scale
        transformer_blocks.*.attn.{to_out.0,to_add_out}                  double_blocks.*.{img,txt}_attn.proj
        transformer_blocks.*.{ff,ff_context}.linear_{in,out}             double_blocks.*.{img,txt}_mlp.{0,2}
        single_transformer_blocks.*.attn.to_{qkv_mlp_proj,out}           single_blocks.*.linear{1,2}
        single_transformer_blocks.*.attn.norm_{q,k}.weight               single_blocks.*.norm.{query,key}_norm.scale
    """)

    def __init__(self, config: Mapping[str, Any]) -> None:
        DiT.__init__(self)
        fixed(config, global_modulation=True, mlp_silu_act=True, qkv_bias=False, ops_bias=False, vec_in_dim=None)
        fixed(config, yak_mlp=False, txt_norm=False)
        self.width, self.heads = width, heads = width_of_heads(config, "hidden_size", "num_heads")
        self.patch = integer(config, "patch_size", 1)
        self.channels, self.out_channels = integer(config, "in_channels"), integer(config, "out_channels", 128)
        self.context_width, self.pooled_width = integer(config, "context_in_dim"), None
        self.axes = rope_axes(config, "axes_dim", 4, width // heads)
        self.text_axes = choice(config, "txt_ids_dims", [3])
        self.theta = number(config, "theta", 2000)
        self.guided = choice(config, "guidance_embed", False, True)
        self.reference_method = choice(config, "default_ref_method", "index", "offset", "uxo", _AT_ZERO)
        self.reference_index = number(config, "ref_index_scale", 10.0)
        self.epsilon = torch.finfo(torch.float32).eps
        hidden = round(width * number(config, "mlp_ratio", 3.0))
        double, single = integer(config, "depth", most=1024), integer(config, "depth_single_blocks", least=0, most=1024)

        self.img_in = nn.Linear(self.channels * self.patch**2, width, bias=False)
        self.txt_in = nn.Linear(self.context_width, width, bias=False)
        self.time_in = kit.MLPEmbedder(256, width, EMBEDDER, bias=False)
        if self.guided:
            self.guidance_in = kit.MLPEmbedder(256, width, EMBEDDER, bias=False)
        self.double_stream_modulation_img = kit.Modulation(width, 6 * width, bias=False)
        self.double_stream_modulation_txt = kit.Modulation(width, 6 * width, bias=False)
        self.single_stream_modulation = kit.Modulation(width, 3 * width, bias=False)
        plain: dict[str, Any] = {"bias": False, "activation": "swiglu", "modulated": False}
        self.double_blocks = nn.ModuleList(kit.DoubleBlock(width, heads, hidden, False, **plain) for _ in range(double))
        self.single_blocks = nn.ModuleList(kit.SingleBlock(width, heads, hidden, **plain) for _ in range(single))
        self.final_layer = kit.FinalLayer(width, self.out_channels * self.patch**2, bias=False)

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`. A quarter of a head's channels turns with each axis."""
        if "double_stream_modulation_img.lin.weight" not in tensors:
            return None
        width, channels = shape_of(tensors, "img_in.weight", 2)
        (head_width,) = shape_of(tensors, "double_blocks.0.img_attn.norm.key_norm.scale", 1)
        return {
            "image_model": "flux2",
            "in_channels": channels,
            "out_channels": shape_of(tensors, "final_layer.linear.weight", 2)[0],
            "vec_in_dim": None,
            "context_in_dim": shape_of(tensors, "txt_in.weight", 2)[1],
            "hidden_size": width,
            "mlp_ratio": shape_of(tensors, "double_blocks.0.img_mlp.2.weight", 2)[1] / max(width, 1),
            "num_heads": width // max(head_width, 1),
            "depth": count_blocks(tensors, "double_blocks"),
            "depth_single_blocks": count_blocks(tensors, "single_blocks"),
            "axes_dim": [head_width // 4] * 4,
            "theta": 2000,
            "patch_size": 1,
            "qkv_bias": False,
            "ops_bias": False,
            "global_modulation": True,
            "mlp_silu_act": True,
            "guidance_embed": "guidance_in.in_layer.weight" in tensors,
            "default_ref_method": "index",
            "ref_index_scale": 10.0,
            "txt_ids_dims": [3],
            "yak_mlp": False,
            "txt_norm": False,
        }

    def arguments(self) -> dict[str, Spec]:
        """See `Flux.arguments`; the references' timestep may also be 0 (``"index_timestep_zero"``)."""
        methods = *kit.REFERENCE_METHODS, _AT_ZERO
        return {
            **super().arguments(),
            "y": Unread(),
            "ref_latents_method": Argument(None, required=False, choices=methods),
        }

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        timestep, method = arguments["timestep"], arguments.get("ref_latents_method") or self.reference_method
        c, segments = self.embed_times(timestep, arguments), None
        if method == _AT_ZERO and arguments.get("ref_latents"):
            c = torch.stack((c, self.embed_times(torch.zeros_like(timestep), arguments)), dim=1)
            image, *references = (grid.length for grid in self.grids(arguments))
            segments = torch.arange(image + sum(references), device=c.device).ge(image).long()
        f.modulate(self.modulating, functional.silu(c))
        image_mod = f.modulation(self.double_stream_modulation_img.linear, 6)
        # Of the two timesteps the text has the first.
        text_mod = [each[:, :1] for each in f.modulation(self.double_stream_modulation_txt.linear, 6)]
        f.modulations = dict.fromkeys(self.double_blocks, (text_mod, image_mod))
        single: tuple[Tensor, ...] = f.modulation(self.single_stream_modulation.linear, 3)
        f.modulations |= dict.fromkeys(self.single_blocks, single)
        self.begin_streams(f, arguments, "index" if method == _AT_ZERO else method, segments)
