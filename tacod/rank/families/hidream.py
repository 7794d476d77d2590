"""HiDream-I1 and E1: text and image in double and single blocks, with a mixture of experts (arXiv:2505.22705).

Parameters are named as in its authors' files (HiDream-ai/HiDream-I1, MIT), which are diffusers' names too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT, LatentFormat
from tacod.rank.families.config import count_blocks, fixed, integer, rope_axes, shape_of
from tacod.rank.families.inputs import Argument, Spec, Unread
from tacod.rank.families.kit.attention import find, register
from tacod.rank.families.names import Names
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.ops.experts import mixture, stays_on_gpu
from tacod.rank.ops.qkv import QKV, QKNorm
from tacod_client.errors import ModelUnsupported

__all__ = ["HiDream"]

_HEAD_WIDTH = 128
_PATCH = 2
_LAYERS = "w1", "w2", "w3"
"""Of an expert: first, second and gate."""
_LLAMA_LAYERS = 32
"""Of Llama 3.1 8B; blocks after the 32nd get the last one's states."""
_EXPERT = "double_stream_blocks.0.block.ff_i.{}.w1.weight"
_BLOCK = (
    "adaLN_modulation.1",
    "attn1.to_{q,k,v,out}",
    "attn1.{q,k}_rms_norm",
    "ff_i.gate",
    "ff_i.{experts.0,experts.1,experts.2,experts.3,shared_experts}.w{1,2,3}",
)
_NAMES = [
    "x_embedder.proj",
    "{t_embedder.timestep,p_embedder.pooled}_embedder.linear_{1,2}",
    "caption_projection.*.linear",
    "final_layer.{linear,adaLN_modulation.1}",
    *(f"{kind}_stream_blocks.*.block.{part}" for kind in ("double", "single") for part in _BLOCK),
    "double_stream_blocks.*.block.attn1.to_{q,k,v,out}_t",
    "double_stream_blocks.*.block.attn1.{q,k}_rms_norm_t",
    "double_stream_blocks.*.block.ff_t.w{1,2,3}",
]


def _swiglu(width: int, hidden: int) -> kit.MLP:
    return kit.MLP(width, hidden, _LAYERS, "swiglu", bias=False)


class Experts(nn.Module):
    """A mixture of experts beside one that all tokens share (DeepSeekMoE: Dai et al., 2024, arXiv:2401.06066).

    Each token goes to the ``active`` experts of the highest probabilities, by which their outputs are multiplied; these
    don't sum to 1.
    """

    def __init__(self, width: int, experts: int, active: int, hidden: int, shared: int) -> None:
        super().__init__()
        self.active = active
        self.shared_experts = _swiglu(width, shared)
        self.experts = nn.ModuleList(_swiglu(width, hidden) for _ in range(experts))
        register(self, "gate.weight", kit.drawn(experts, width))

    @property
    def layers(self) -> list[Any]:
        """The experts' layers, as `mixture` takes them."""
        return [tuple(find(expert, name) for name in _LAYERS) for expert in self.experts]

    def forward(self, x: Tensor) -> Tensor:
        """Of ``x`` [B, S, W]."""
        tokens = x.flatten(0, 1)
        weights, chosen = functional.linear(tokens, find(self, "gate").weight).softmax(-1).topk(self.active, dim=-1)
        each = mixture(tokens, chosen, self.layers, list(self.experts))
        out: Tensor = (each * weights[..., None]).sum(1).view(x.shape) + self.shared_experts(x)
        return out


class Attention(nn.Module):
    """Queries, keys and values of the image, and of the text by layers of its own, whose names end in ``_t``."""

    def __init__(self, width: int, heads: int, kinds: Sequence[str]) -> None:
        super().__init__()
        self.heads = heads
        for kind in kinds:
            for name in ("to_q", "to_k", "to_v", "to_out"):
                self.add_module(name + kind, nn.Linear(width, width))
            for name in ("q_rms_norm", "k_rms_norm"):
                self.add_module(name + kind, nn.RMSNorm(width, 1e-5))

    def forward(self, stream: Stream, shift: Tensor, scale: Tensor, kind: str = "") -> Any:
        """What gives a stream's, after the modulated norm."""

        def project() -> QKV:
            x = stream.normed(shift, scale)
            q, k, v = (find(self, f"to_{name}{kind}")(x) for name in "qkv")
            query, key = (find(self, f"{name}_rms_norm{kind}.weight") for name in "qk")
            return QKV((q, k, v), self.heads, QKNorm(query, key, 1e-5, across_heads=True), stream.rotation)

        return stream, project


class Block(nn.Module):
    """A block of one attention: of image, text and a text of its own, which is a layer's states of Llama.

    In a double block the text has weights of its own, in a single one image and text are one sequence, ``f.joint``.
    """

    def __init__(self, width: int, heads: int, number: int, text_hidden: int | None, **experts: int) -> None:
        super().__init__()
        self.number, self.streams = number, 1 if text_hidden is None else 2
        self.adaLN_modulation = kit.AdaLN(width, 6 * self.streams * width)
        self.attn1: Any = Attention(width, heads, ("", "_t")[: self.streams])
        self.ff_i = Experts(width, **experts)
        if text_hidden is not None:
            self.ff_t = _swiglu(width, text_hidden)

    def forward(self, f: ForwardPass) -> None:
        """Image and text one block further. The block's own text is only attended to."""
        states, mod = f.states[self.number], f.modulation(self.adaLN_modulation.linear, 6 * self.streams)
        if self.streams == 2:
            image, text = mod[:6], mod[6:]
            own = self.attn1(states, *text[:2], "_t"), self.attn1(f.text, *text[:2], "_t")
            _, to_text, to_image = f.attend(*own, self.attn1(f.image, *image[:2])).wait()
            kit.after_attention(f.image, image, self.attn1.to_out(to_image), self.ff_i)
            kit.after_attention(f.text, text, self.attn1.to_out_t(to_text), self.ff_t)
        else:
            _, attended = f.attend(self.attn1(states, *mod[:2]), self.attn1(f.joint, *mod[:2])).wait()
            kit.after_attention(f.joint, mod, self.attn1.to_out(attended), self.ff_i)


class HiDream(DiT):
    """HiDream-I1 full, dev and fast, and E1, which edits a picture beside the image.

    ``config`` is ComfyUI's ``unet_config``, and ``expert_width`` and ``shared_width``, the hidden widths of the
    experts. Raises `ModelUnsupported`, naming the key, for a configuration that can't be.
    """

    family: ClassVar[str] = "hidream"
    title = "HiDream"
    models = ("I1 full", "I1 dev", "I1 fast", "E1")
    lora_marks = r"(double|single)_stream_blocks[._]\d+[._]block[._]"
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "hidream",
        "in_channels": 4,
        "patch_size": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "axes_dims_rope": [8, 4, 4],
        "caption_channels": [24, 16],
        "text_emb_dim": 8,
        "llama_layers": [0, 1, 2, 2],
        "num_routed_experts": 4,
        "num_activated_experts": 2,
        "num_layers": 2,
        "num_single_layers": 2,
        "expert_width": 64,
        "shared_width": 32,
    }
    diffusers: ClassVar[Mapping[str, Any]] = {
        "HiDreamImageTransformer2DModel": lambda c: {
            "patch_size": c.only("patch_size", _PATCH),
            "attention_head_dim": c.whole("attention_head_dim", _HEAD_WIDTH),
            "num_attention_heads": c.whole("num_attention_heads", 20),
            "axes_dims_rope": c.items("axes_dims_rope", (32, 32)),
            "llama_layers": c.items("llama_layers", ()),
            "num_activated_experts": c.whole("num_activated_experts", 2),
            "num_layers": c.whole("num_layers", 16),
            "num_single_layers": c.whole("num_single_layers", 32),
        }
    }
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "H": 128, "W": 128, "L": 128, "M": 128}
    image_models: ClassVar[tuple[str, ...]] = ("hidream",)
    process = Flow()
    latent_format = LatentFormat(0.3611, 0.1159)
    names = Names("\n".join(_NAMES))

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fixed(config, patch_size=_PATCH)
        self.heads = heads = integer(config, "num_attention_heads", most=1024)
        self.width = width = heads * integer(config, "attention_head_dim", most=1024)
        self.axes = rope_axes(config, "axes_dims_rope", 3, width // heads)
        self.channels = integer(config, "in_channels")
        self.out_channels = integer(config, "out_channels", self.channels)
        self.pooled_width = integer(config, "text_emb_dim", 2048)
        double, single = integer(config, "num_layers", most=1024), integer(config, "num_single_layers", most=1024)
        self.layers = _whole_numbers(config, "llama_layers", double + single, least=0)
        self.context_width, self.states_width = _whole_numbers(config, "caption_channels", 2, least=1)
        count = integer(config, "num_routed_experts", 4, most=1024)
        experts = {
            "experts": count,
            "active": integer(config, "num_activated_experts", 2, most=count),
            "hidden": (hidden := integer(config, "expert_width", _rounded(4 * width))),
            "shared": integer(config, "shared_width", _rounded(2 * width)),
        }

        register(self, "x_embedder.proj", nn.Linear(self.channels * _PATCH**2, width))
        self.t_embedder = kit.MLPEmbedder(256, width, _linears("timestep_embedder"))
        self.p_embedder = kit.MLPEmbedder(self.pooled_width, width, _linears("pooled_embedder"))
        for number in range(double):
            register(self, f"double_stream_blocks.{number}.block", Block(width, heads, number, hidden, **experts))
        for number in range(single):
            block = Block(width, heads, double + number, None, **experts)
            register(self, f"single_stream_blocks.{number}.block", block)
        self.final_layer = kit.FinalLayer(width, self.out_channels * _PATCH**2)
        for number, inputs in enumerate([self.states_width] * (double + single) + [self.context_width]):
            register(self, f"caption_projection.{number}.linear", nn.Linear(inputs, width, bias=False))

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`. Published models have 128 channels a head, and two experts for a token."""
        if "caption_projection.0.linear.weight" not in tensors or "x_embedder.proj.weight" not in tensors:
            return None
        double, single = (count_blocks(tensors, f"{kind}_stream_blocks") for kind in ("double", "single"))
        width, inputs = shape_of(tensors, "x_embedder.proj.weight", 2)
        captions = [
            shape_of(tensors, f"caption_projection.{number}.linear.weight", 2)[1] for number in (double + single, 0)
        ]
        return {
            "image_model": "hidream",
            "in_channels": inputs // _PATCH**2,
            "out_channels": shape_of(tensors, "final_layer.linear.weight", 2)[0] // _PATCH**2,
            "patch_size": _PATCH,
            "attention_head_dim": _HEAD_WIDTH,
            "num_attention_heads": width // _HEAD_WIDTH,
            "axes_dims_rope": [64, 32, 32],
            "caption_channels": captions,
            "text_emb_dim": shape_of(tensors, "p_embedder.pooled_embedder.linear_1.weight", 2)[1],
            "llama_layers": [min(number, _LLAMA_LAYERS - 1) for number in range(double + single)],
            "num_routed_experts": count_blocks(tensors, "double_stream_blocks.0.block.ff_i.experts"),
            "num_activated_experts": 2,
            "num_layers": double,
            "num_single_layers": single,
            "expert_width": shape_of(tensors, _EXPERT.format("experts.0"), 2)[0],
            "shared_width": shape_of(tensors, _EXPERT.format("shared_experts"), 2)[0],
        }

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`.

        ``context`` is T5's text, ``encoder_hidden_states_llama3`` the states of Llama's layers, ``image_cond`` the
        latents of E1's picture.
        """
        return {
            "x": Argument(("B", self.channels, "H", "W")),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.context_width)),
            "encoder_hidden_states_llama3": Argument(("B", max(self.layers) + 1, "M", self.states_width)),
            "y": Argument(("B", self.pooled_width)),
            "image_cond": Argument(("B", self.channels, "H", "w"), required=False),
            "control": Unread(),
        }

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """Tokens of a block's own text, of the text, and of the image with the picture beside it."""
        states = arguments["encoder_hidden_states_llama3"].shape[2]
        return states, arguments["context"].shape[1] + states, self._grid(arguments).length

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma * 1000

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        x, picture = arguments["x"], arguments.get("image_cond")
        f.sides = x.shape[2:]
        f.grid = grid = self._grid(arguments)
        c = self.t_embedder.numbers(arguments["timestep"], x.dtype) + self.p_embedder(arguments["y"])
        f.modulate(self.modulating, functional.silu(c))

        def rotation(positions: Tensor) -> Any:
            return lambda shard: kit.rope(shard(positions), self.axes, 10000.0)

        patches = grid.patches(x if picture is None else torch.cat((x, picture), dim=-1))
        # A pixel's channels lie together here.
        patches = torch.unflatten(patches, -1, (self.channels, -1)).transpose(-1, -2).flatten(-2)
        positions = functional.pad(grid.positions(device=x.device), (1, 0))
        f.image = f.shard(patches, find(self, "x_embedder.proj"), rotation(positions))
        llama = arguments["encoder_hidden_states_llama3"]
        captions = self._members("caption_projection")
        f.states = [f.shard(llama[:, layer], captions[number]) for number, layer in enumerate(self.layers)]
        text = torch.cat((captions[-1](arguments["context"]), captions[-2](llama[:, self.layers[-1]])), dim=1)
        f.text = f.shard(text, rotation=rotation(positions.new_zeros(text.shape[1], 3)))

    @property
    def graphs(self) -> bool:
        """See `DiT.graphs`. Where no kernel serves the experts, the host waits for their numbers of tokens."""
        return all(stays_on_gpu(module.layers) for module in self.modules() if isinstance(module, Experts))

    @property
    def trunk(self) -> list[Any]:
        """See `DiT.trunk`."""
        return [*self._members("double_stream_blocks"), kit.join_streams, *self._members("single_stream_blocks")]

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`. The network gives the negative of a flow, and the picture's part is left out."""
        latent: Tensor = f.grid.latent(self.final_layer(f), channels_last=True)
        return -latent[..., : f.sides[-1]]

    def _members(self, name: str) -> list[Any]:
        """The one layer or block in each of a list's modules."""
        return [member for each in find(self, name).children() for member in each.children()]

    @staticmethod
    def _grid(arguments: Mapping[str, Any]) -> kit.Grid:
        """Of the image with the picture on its right."""
        *sides, width = arguments["x"].shape
        picture = arguments.get("image_cond")
        return kit.Grid(SimpleNamespace(shape=(*sides, width + (0 if picture is None else picture.shape[-1]))), _PATCH)


def _linears(embedder: str) -> tuple[str, str]:
    return f"{embedder}.linear_1", f"{embedder}.linear_2"


def _rounded(width: int) -> int:
    """The hidden width of an expert: two thirds, rounded up to a multiple of 256."""
    return -(-int(2 * width / 3) // 256) * 256


def _whole_numbers(config: Mapping[str, Any], key: str, count: int, least: int) -> list[int]:
    values = config.get(key)
    if not isinstance(values, list) or len(values) != count or any(type(n) is not int or n < least for n in values):
        raise ModelUnsupported(f"config key {key!r} is {values!r:.80}; expected {count} whole numbers from {least} on")
    return values
