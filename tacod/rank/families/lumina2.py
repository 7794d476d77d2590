"""Z-Image (Tongyi-MAI: turbo, base, Omni), Lumina-Image 2.0 (Alpha-VLLM), and NewBie, which has a pooled text too.

Text and image are refined alone and then are one sequence (Qin et al., 2025, arXiv:2503.21758; Z-Image team, 2025,
arXiv:2511.22699). Parameters are named as in the authors' files (Alpha-VLLM/Lumina-Image-2.0, Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT, LatentFormat
from tacod.rank.families.config import (
    choice,
    count_blocks,
    fixed,
    integer,
    kv_heads_of,
    number,
    optional_integer,
    rope_axes,
    shape_of,
    width_of_heads,
)
from tacod.rank.families.inputs import Argument, Numbers, Spec, Unread
from tacod.rank.families.kit.attention import find
from tacod.rank.families.names import Names
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.families.trunk import finite
from tacod.rank.ops.fused import norm_modulate
from tacod.rank.ops.norm import Norm
from tacod_client.errors import ArgumentError, ModelUnsupported

__all__ = ["Lumina2"]

_EPSILON = 1e-5
_QK_EPSILON = torch.finfo(torch.float32).eps
"""Of the norms of queries and keys in ComfyUI, in every dtype; diffusers has 1e-5."""
_BLOCK = "{layers,noise_refiner,context_refiner,siglip_refiner}.*"


class Block(nn.Module):
    """Attention and SwiGLU, each between two RMS norms; modulated by scale and tanh of a gate, or not at all."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int, modulation: nn.Module | None = None) -> None:
        super().__init__()
        self.attention = kit.SelfAttention(
            width, heads, kv_heads=kv_heads, out="out", norm="head", bias=False, out_bias=False, epsilon=_QK_EPSILON
        )
        layers = {"w1": (width, hidden), "w2": (hidden, width), "w3": (width, hidden)}
        self.feed_forward = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in layers.items()})
        for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            self.add_module(name, nn.RMSNorm(width, _EPSILON))
        if modulation is not None:
            self.adaLN_modulation = modulation

    def forward(self, f: ForwardPass, stream: Stream | None = None) -> None:
        """A stream, by default ``f.joint``, one block further."""
        stream = stream or f.joint
        scale = gate = mlp_scale = mlp_gate = None
        if "adaLN_modulation" in self._modules:
            scale, gate, mlp_scale, mlp_gate = f.modulation(self.adaLN_modulation.linear, 4)
            gate, mlp_gate = gate.tanh(), mlp_gate.tanh()
        normed = stream.normed(None, scale, norm=self._norm("attention_norm1"))
        (attended,) = f.attend((stream, lambda: self.attention(normed, stream.rotation))).wait()
        out = finite(self.attention.project(attended))
        stream.add(gate, norm_modulate(out, norm=self._norm("attention_norm2")))
        normed, mlp = stream.normed(None, mlp_scale, norm=self._norm("ffn_norm1")), self.feed_forward
        out = kit.feed_forward(mlp["w1"], lambda hidden: mlp["w2"](finite(hidden)), normed, "swiglu", mlp["w3"])
        stream.add(mlp_gate, norm_modulate(finite(out), norm=self._norm("ffn_norm2")))

    def _norm(self, name: str) -> Norm:
        return Norm("rms", _EPSILON, find(self, f"{name}.weight"))


class FinalLayer(nn.Module):
    """A layer norm with a scale, and the projection to patches."""

    def __init__(self, width: int, conditioning: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = kit.AdaLN(conditioning, width)

    def forward(self, f: ForwardPass) -> Tensor:
        """The image's patches of all ranks, [B, N, outputs]."""
        (scale,) = f.modulation(self.adaLN_modulation.linear, 1)
        return f.gather(f.image, self.linear(f.image.normed(None, scale)))


@dataclass(frozen=True)
class Part:
    """A text or an image within its stream, with the padding behind it."""

    tensor: Any
    """None if there is only padding."""
    tokens: int
    pads: int
    index: int
    """Its position on the first axis; a text's first token is the next one."""
    now: bool
    """Whether it has the forward's timestep; references have time 0."""

    @property
    def length(self) -> int:
        """Its tokens with the padding."""
        return self.tokens + self.pads


class Lumina2(DiT):
    """``config`` is ComfyUI's ``unet_config``; its ``z_image_modulation`` distinguishes Z-Image from Lumina 2."""

    family: ClassVar[str] = "lumina2"
    title = "Z-Image, Lumina 2"
    models = ("Z-Image", "Z-Image-Turbo", "Z-Image-Omni", "Lumina-Image 2.0", "NewBie")
    lora_marks = r"(context|noise)_refiner[._]|(^|[._])layers[._]\d+[._](attention|feed_forward)[._]"
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 4,
        "dim": 48,
        "cap_feat_dim": 16,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "qk_norm": True,
        "n_heads": 4,
        "n_kv_heads": 2,
        "axes_dims": [4, 4, 4],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 2.0,
        "multiple_of": 32,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 4,
        "siglip_feat_dim": 16,
    }
    diffusers: ClassVar[Mapping[str, Any]] = {
        "ZImageTransformer2DModel": lambda c: {
            "n_layers": c.whole("n_layers", 30),
            "axes_dims": c.items("axes_dims", (32, 48, 48)),
            "rope_theta": c.get("rope_theta", 256.0),
            "time_scale": c.get("t_scale", 1000.0),
            "norm_eps": c.get("norm_eps", _EPSILON),
        },
        "Lumina2Transformer2DModel": lambda c: {
            "n_layers": c.whole("num_layers", 26),
            "axes_dims": c.items("axes_dim_rope", (32, 32, 32)),
            "norm_eps": c.get("norm_eps", _EPSILON),
        },
    }
    diffusers_optional = frozenset({"siglip_embedder.0", "siglip_embedder.1", "siglip_pad_token"})
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "H": 128, "W": 128, "L": 128}
    image_models: ClassVar[tuple[str, ...]] = ("lumina2",)
    process = Flow()
    latent_format = LatentFormat(0.3611, 0.1159)
    # Of diffusers' ZImageTransformer2DModel, then of its Lumina2Transformer2DModel.
    names = Names(
        """
        all_x_embedder.2-1                                x_embedder
        all_final_layer.2-1.{linear,adaLN_modulation.1}   final_layer.{linear,adaLN_modulation.1}
        {x,cap,siglip}_pad_token                          {x,cap,siglip}_pad_token
        t_embedder.mlp.{0,2}                              t_embedder.mlp.{0,2}
        {cap,siglip}_embedder.{0,1}                       {cap,siglip}_embedder.{0,1}
        BLOCK.attention.to_{q,k,v}                        BLOCK.attention.qkv[q,k,v]
        BLOCK.attention.{to_out.0,norm_q,norm_k}          BLOCK.attention.{out,q_norm,k_norm}
        BLOCK.feed_forward.w{1,2,3}                       BLOCK.feed_forward.w{1,2,3}
        BLOCK.{attention,ffn}_norm{1,2}                   BLOCK.{attention,ffn}_norm{1,2}
        BLOCK.adaLN_modulation.0                          BLOCK.adaLN_modulation.0
        """.replace("BLOCK", _BLOCK),
        """
        x_embedder                                        x_embedder
        norm_out.linear_{1,2}                             final_layer.{adaLN_modulation.1,linear}
        time_caption_embed.timestep_embedder.linear_{1,2} t_embedder.mlp.{0,2}
        time_caption_embed.caption_embedder.{0,1}         cap_embedder.{0,1}
        BLOCK.attn.to_{q,k,v}                             BLOCK.attention.qkv[q,k,v]
        BLOCK.attn.{to_out.0,norm_q,norm_k}               BLOCK.attention.{out,q_norm,k_norm}
        BLOCK.feed_forward.linear_{1,2,3}                 BLOCK.feed_forward.w{1,2,3}
        BLOCK.{norm2,ffn_norm1,ffn_norm2}                 BLOCK.{attention_norm2,ffn_norm1,ffn_norm2}
        {layers,noise_refiner}.*.norm1.norm               {layers,noise_refiner}.*.attention_norm1
        {layers,noise_refiner}.*.norm1.linear             {layers,noise_refiner}.*.adaLN_modulation.1
        context_refiner.*.norm1                           context_refiner.*.attention_norm1
        """.replace("BLOCK", _BLOCK),
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fixed(config, qk_norm=True, norm_eps=_EPSILON)
        self.width, self.heads = width, heads = width_of_heads(config, "dim", "n_heads")
        kv_heads = kv_heads_of(config, "n_kv_heads", heads)
        self.patch = integer(config, "patch_size", 2)
        self.channels = self.out_channels = integer(config, "in_channels")
        self.context_width = integer(config, "cap_feat_dim")
        self.axes = rope_axes(config, "axes_dims", 3, width // heads)
        self.theta = number(config, "rope_theta", 10000.0)
        self.time_scale = number(config, "time_scale", 1.0)
        self.z_image: bool = choice(config, "z_image_modulation", False, True)
        self.multiple = optional_integer(config, "pad_tokens_multiple")
        self.siglip_width = optional_integer(config, "siglip_feat_dim")
        self.pooled_width = optional_integer(config, "clip_text_dim")
        if self.siglip_width and not self.multiple:
            raise ModelUnsupported("config key 'pad_tokens_multiple' is missing; a model with 'siglip_feat_dim' has it")
        unit = integer(config, "multiple_of", 256)
        hidden = -(-int(number(config, "ffn_dim_multiplier", 4.0) * width) // unit) * unit
        inner = min(width, 1024)
        conditioning = min(width, 256) if self.z_image else inner
        layer = "0" if self.z_image else "1"
        refiners = integer(config, "n_refiner_layers", 2, least=0, most=1024)

        def blocks(count: int, modulated: bool) -> nn.ModuleList:
            sizes = width, heads, kv_heads, hidden
            modulations = (kit.Modulation(conditioning, 4 * width, layer) if modulated else None for _ in range(count))
            return nn.ModuleList(Block(*sizes, each) for each in modulations)

        def embedder(inputs: int) -> nn.Sequential:
            return nn.Sequential(nn.RMSNorm(inputs, _EPSILON), nn.Linear(inputs, width))

        self.x_embedder = nn.Linear(self.patch**2 * self.channels, width)
        self.t_embedder = kit.MLPEmbedder(256, conditioning, hidden=inner)
        self.cap_embedder = embedder(self.context_width)
        self.noise_refiner, self.context_refiner = blocks(refiners, True), blocks(refiners, False)
        self.layers = blocks(integer(config, "n_layers", most=1024), True)
        self.final_layer = FinalLayer(width, conditioning, self.patch**2 * self.channels)
        if self.multiple:
            self.x_pad_token, self.cap_pad_token = (nn.Parameter(torch.zeros(1, width)) for _ in range(2))
        if self.siglip_width:
            self.siglip_embedder, self.siglip_refiner = embedder(self.siglip_width), blocks(refiners, False)
            self.siglip_pad_token = nn.Parameter(torch.zeros(1, width))
        if self.pooled_width:
            pooled = self.pooled_width
            self.clip_text_pooled_proj = nn.Sequential(nn.RMSNorm(pooled, _EPSILON), nn.Linear(pooled, pooled))
            self.time_text_embed = nn.Sequential(nn.SiLU(), nn.Linear(conditioning + pooled, conditioning))
        # The authors' files hold it.
        self.norm_final = nn.Module()
        self.norm_final.register_buffer("weight", torch.zeros(width))

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`."""
        marks = "cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"
        if any(key not in tensors for key in marks) or "dec_net.cond_embed.weight" in tensors:
            return None
        width, inputs = shape_of(tensors, "x_embedder.weight", 2)
        (head_width,) = shape_of(tensors, marks[1], 1)
        rows, _ = shape_of(tensors, "noise_refiner.0.attention.qkv.weight", 2)
        hidden, _ = shape_of(tensors, "noise_refiner.0.feed_forward.w1.weight", 2)
        heads = width // max(head_width, 1)
        z_image = "noise_refiner.0.adaLN_modulation.0.weight" in tensors
        config: dict[str, Any] = {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": inputs // 4,
            "dim": width,
            "cap_feat_dim": shape_of(tensors, marks[0], 2)[1],
            "n_layers": count_blocks(tensors, "layers"),
            "n_refiner_layers": count_blocks(tensors, "noise_refiner"),
            "qk_norm": True,
            "n_heads": heads,
            "n_kv_heads": (rows // max(head_width, 1) - heads) // 2,
            "axes_dims": [32, 48, 48] if z_image else [32, 32, 32],
            "rope_theta": 256.0 if z_image else 10000.0,
            "ffn_dim_multiplier": hidden / max(width, 1),
            "multiple_of": math.gcd(hidden, 256),
        }
        if z_image:
            config |= {"z_image_modulation": True, "time_scale": 1000.0}
        if "cap_pad_token" in tensors:
            config["pad_tokens_multiple"] = 32
        for key, name in (("siglip_feat_dim", "siglip_embedder"), ("clip_text_dim", "clip_text_pooled_proj")):
            if f"{name}.0.weight" in tensors:
                (config[key],) = shape_of(tensors, f"{name}.0.weight", 1)
        return config

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`.

        ``ref_latents`` are clean images, each with the text before it (``ref_contexts``) and its features
        (``siglip_feats``); texts after those come behind ``context``. Without references both are unread. A model with
        a pooled text takes no references. ``rope_options`` stretch and shift references too.
        """
        specs: dict[str, Spec] = {
            "x": Argument(("B", self.channels, "H", "W")),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.context_width)),
            "num_tokens": Unread(),
            "attention_mask": Unread(),
            "rope_options": Numbers(kit.ROPE_OPTIONS),
            "rope_options_for": Argument(None, required=False, choices=("all",)),
            "clip_text_pooled": Unread(),
            "ref_contexts": Unread(),
            "siglip_feats": Unread(),
        }
        if self.pooled_width:
            return specs | {"clip_text_pooled": Argument(("B", self.pooled_width), required=False)}
        specs["ref_latents"] = Argument(("B", self.channels, "h", "w"), required=False, many=True)
        specs["ref_contexts"] = Argument(("B", "M", self.context_width), required=False, many=True)
        if self.siglip_width:
            specs["siglip_feats"] = Argument(("B", "u", "v", self.siglip_width), required=False, many=True)
        return specs

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """Tokens of the text, of references' features, and of the image with its references; each with its pads.

        Raises `ArgumentError` for references of odd sizes, and for one without text in a model that doesn't pad.
        """
        return tuple(sum(part.length for part in parts) for parts in self._parts(arguments) if parts)

    def _parts(self, arguments: Mapping[str, Any]) -> tuple[list[Part], list[Part], list[Part]]:
        """Of each stream, in order: texts; references' features; the image, then its references."""
        references = list(arguments.get("ref_latents") or ())
        contexts = list(arguments.get("ref_contexts") or ()) if references else []
        features = list(arguments.get("siglip_feats") or ()) if references and self.siglip_width else []
        texts: list[Part] = []
        siglip: list[Part] = []
        images: list[Part] = []
        index = 0
        for at, latent in enumerate([*references, arguments["x"]]):
            now = at == len(references)
            text = arguments["context"] if now else contexts[at] if at < len(contexts) else None
            if text is None and not self.multiple:
                raise ArgumentError("ref_contexts: this model needs one for each reference", argument="ref_contexts")
            if not now and any(side % self.patch for side in latent.shape[2:]):
                raise ArgumentError(
                    f"ref_latents: its latents are {latent.shape[2]} by {latent.shape[3]}; "
                    f"make both sides multiples of {self.patch}",
                    argument="ref_latents",
                )
            texts.append(self._part(text, 0 if text is None else text.shape[1], index, now))
            index += texts[-1].tokens if references and self.siglip_width else texts[-1].length
            if references and self.siglip_width:
                seen = features[at] if at < len(features) and not now else None
                count = 0 if seen is None else seen.shape[1] * seen.shape[2]
                siglip.append(self._part(seen, count, index + 2, False))
            images.append(self._part(latent, kit.Grid(latent, self.patch).length, index + 1, now))
            index += 2
        for text in contexts[len(references) :]:
            texts.append(self._part(text, text.shape[1], index, True))
            index += text.shape[1]
        return texts, siglip, [images[-1], *images[:-1]]

    def _part(self, tensor: Any, tokens: int, index: int, now: bool) -> Part:
        pads = -tokens % self.multiple if self.multiple else 0
        return Part(tensor, tokens, pads if tokens else self.multiple or 0, index, now)

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`. Text, features and image are refined here, each alone and shared by the ranks.

        A refiner is two blocks. One whole on every rank would save four exchanges, which take about as long as the
        arithmetic of 500 tokens; a longer text gains by being shared.
        """
        x, references = arguments["x"], bool(arguments.get("ref_latents"))
        self._modulate(f, arguments, references)
        f.grid = kit.Grid(x, self.patch)
        options = arguments.get("rope_options") or {}

        def text(part: Part) -> tuple[Tensor, Tensor]:
            tokens = x.new_zeros(len(x), 0, self.context_width) if part.tensor is None else part.tensor
            line = torch.arange(part.length, device=x.device, dtype=torch.float32) + (part.index + 1)
            return tokens, functional.pad(line[:, None], (0, 2))

        def image(part: Part) -> tuple[Tensor, Tensor]:
            grid = kit.Grid(part.tensor, self.patch)
            rows, columns = grid.positions(device=x.device).unbind(-1)
            rows = rows * options.get("scale_y", 1.0) + options.get("shift_y", 0.0)
            columns = columns * options.get("scale_x", 1.0) + options.get("shift_x", 0.0)
            places = torch.stack((torch.full_like(rows, part.index), rows, columns), dim=-1)
            return grid.patches(part.tensor, channels_last=True), places

        def features(part: Part) -> tuple[Tensor, Tensor]:
            if part.tensor is None:
                return x.new_zeros(len(x), 0, self.siglip_width or 0), x.new_zeros(0, 3, dtype=torch.float32)
            # ComfyUI brings the channels to the front, and then reads the numbers as tokens.
            tokens = part.tensor.movedim(-1, 1).reshape(len(x), part.tokens, -1)
            lines = [torch.linspace(0, 8 * n - 1, n, device=x.device).floor() for n in part.tensor.shape[1:3]]
            places = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flatten(0, 1)
            return tokens, functional.pad(places, (1, 0), value=part.index)

        streams = []
        kinds = ("cap", "context", text), ("siglip", "siglip", features), ("x", "noise", image)
        for (name, refiner, embedded), parts in zip(kinds, self._parts(arguments), strict=True):
            if parts:
                streams.append(self._stream(f, name, parts, embedded, references))
                for block in getattr(self, f"{refiner}_refiner"):
                    block(f, streams[-1])
        f.image = streams[-1]
        f.joint = f.join(*streams)

    def _modulate(self, f: ForwardPass, arguments: Mapping[str, Any], references: bool) -> None:
        """Compute all modulations; row 0 of the conditioning is the forward's time, row 1 time 0, if it is needed."""
        x, now = arguments["x"], arguments["timestep"]
        times = torch.stack((now, torch.zeros_like(now)), dim=1) if references else now
        c = self.t_embedder.numbers((1 - times) * self.time_scale, x.dtype)
        if self.pooled_width:
            pooled = arguments.get("clip_text_pooled")
            pooled = x.new_zeros(len(x), self.pooled_width) if pooled is None else self.clip_text_pooled_proj(pooled)
            c = self.time_text_embed(torch.cat((c, pooled), dim=-1))
        last = self.final_layer.adaLN_modulation.linear
        f.modulate([layer for layer in self.modulating if layer is not last], c if self.z_image else functional.silu(c))
        f.modulate([last], functional.silu(c))

    def _stream(
        self,
        f: ForwardPass,
        name: str,
        parts: Sequence[Part],
        described: Callable[[Part], tuple[Tensor, Tensor]],
        references: bool,
    ) -> Stream:
        """A stream of all parts and their pads, which are a learned token.

        ``described`` gives a part's tokens [B, n, C] and their positions [n, 3]; pads have 0, or theirs follow these.
        """
        embedder, pad = getattr(self, f"{name}_embedder"), getattr(self, f"{name}_pad_token", None)
        whole = [
            [functional.pad(each, (0, 0, 0, part.length - each.shape[-2])) for each in described(part)]
            for part in parts
        ]
        tokens, positions = torch.cat([each[0] for each in whole], dim=1), torch.cat([each[1] for each in whole])
        device = tokens.device
        real = torch.cat([torch.arange(part.length, device=device) < part.tokens for part in parts])
        old = torch.cat([torch.full((part.length,), int(not part.now), device=device) for part in parts])
        mine = f.sequence.shard(real, dim=0)[:, None]
        return f.shard(
            tokens,
            embedder if pad is None else lambda chunk: torch.where(mine, embedder(chunk), pad),
            lambda shard: kit.rope(shard(positions), self.axes, self.theta),
            old if references else None,
        )

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`."""
        return list(self.layers)

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`."""
        latent: Tensor = f.grid.latent(self.final_layer(f), channels_last=True)
        return -latent
