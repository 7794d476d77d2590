"""A made-up family of joint attention: refined text with a key mask, references at time 0, gates after norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT, Output
from tacod.rank.families.config import count_blocks, integer, shape_of, width_of_heads
from tacod.rank.families.inputs import Argument, Inputs, Spec
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.ops.norm import Norm

EPSILON = 1e-5


class Layer(nn.Module):
    """One stream's part of a block: RMS norms with weights before and after each branch, tanh gates, exact GELU."""

    def __init__(self, width: int, heads: int, modulated: bool = True) -> None:
        super().__init__()
        norms = "q_norm.scale", "k_norm.scale"
        self.attn = kit.SelfAttention(width, heads, norm="head", norms=norms, epsilon=EPSILON)
        self.norms = nn.ParameterList(1 + 0.3 * torch.randn(width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        if modulated:
            self.modulation = kit.AdaLN(width, 4 * width)

    def norm(self, index: int) -> Norm:
        """One of its norms."""
        return Norm("rms", EPSILON, self.norms[index])

    def project(self, stream: Stream, scale: Tensor | None = None) -> Any:
        """What gives the stream's queries, keys and values: a scale, but no shift."""
        return lambda: self.attn(stream.normed(None, scale, norm=self.norm(0)), stream.rotation)

    def after(self, stream: Stream, attended: Tensor, parts: Sequence[Tensor | None] = (None,) * 4) -> None:
        """The stream after its attention; ``parts`` are scale and gate, twice."""
        _, gate, scale, mlp_gate = parts
        stream.add(_tanh(gate), self.norm(1)(self.attn.project(attended)))
        hidden = kit.feed_forward(self.fc1, self.fc2, stream.normed(None, scale, norm=self.norm(2)), "gelu_exact")
        stream.add(_tanh(mlp_gate), self.norm(3)(hidden))


def _tanh(gate: Tensor | None) -> Tensor | None:
    return None if gate is None else gate.tanh()


class Block(nn.Module):
    """Text and image in one attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.txt, self.img = Layer(width, heads), Layer(width, heads)

    def forward(self, f: ForwardPass) -> None:
        """Both one block further."""
        text, image = f.modulation(self.txt.modulation.linear, 4), f.modulation(self.img.modulation.linear, 4)
        projections = (f.text, self.txt.project(f.text, text[0])), (f.image, self.img.project(f.image, image[0]))
        to_text, to_image = f.attend(*projections, mask=f.mask).wait()
        self.txt.after(f.text, to_text, text)
        self.img.after(f.image, to_image, image)


class Joint(DiT):
    """``config`` is ComfyUI's ``unet_config``."""

    family: ClassVar[str] = "made_up_joint"
    title = "Made-up Joint"
    models = ("tiny",)
    image_models: ClassVar[tuple[str, ...]] = ("made_up_joint",)
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "H": 16, "W": 16, "L": 8}
    process = Flow()
    spellings: ClassVar[Mapping[str, str]] = {f".{part}_norm.weight": f".{part}_norm.scale" for part in "qk"}

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.width, self.heads = width_of_heads(config, "dim", "num_heads")
        self.channels = self.out_channels = integer(config, "in_channels")
        self.context_width = integer(config, "text_dim")
        self.img_in = nn.Linear(4 * self.channels, self.width)
        self.txt_norm = nn.LayerNorm(self.context_width)
        self.txt_in = nn.Linear(self.context_width, self.width)
        self.time_in = kit.MLPEmbedder(256, self.width)
        self.refiner = nn.ModuleList([Layer(self.width, self.heads, modulated=False)])
        self.layers = nn.ModuleList(Block(self.width, self.heads) for _ in range(integer(config, "num_layers")))
        self.final_layer = kit.FinalLayer(self.width, 4 * self.out_channels, Norm("rms", EPSILON))

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`."""
        if "layers.0.img.attn.q_norm.scale" not in tensors:
            return None
        width, inputs = shape_of(tensors, "img_in.weight", 2)
        return {
            "image_model": "made_up_joint",
            "in_channels": inputs // 4,
            "dim": width,
            "num_heads": width // shape_of(tensors, "layers.0.img.attn.q_norm.scale", 1)[0],
            "text_dim": shape_of(tensors, "txt_in.weight", 2)[1],
            "num_layers": count_blocks(tensors, "layers"),
        }

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`."""
        return {
            "x": Argument(("B", self.channels, "H", "W")),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.context_width)),
            "attention_mask": Argument(("B", "L"), required=False, keys=True),
            "ref_latents": Argument(("B", self.channels, "h", "w"), required=False, many=True),
        }

    def prepare(self, inputs: Inputs) -> Inputs:
        """Without the text that no image sees. The text has no positions, so any token may go."""
        return kit.drop_hidden(inputs, "attention_mask", "context")

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """See `DiT.lengths`."""
        return arguments["context"].shape[1], sum(grid.length for grid in self._grids(arguments))

    def _grids(self, arguments: Mapping[str, Any]) -> list[kit.Grid]:
        references = arguments.get("ref_latents") or ()
        return [kit.Grid(arguments["x"], 2), *(kit.Grid(each, 2, "ref_latents") for each in references)]

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`. The text is refined here, before the first block: it attends to itself alone."""
        x, context, mask = arguments["x"], arguments["context"], arguments.get("attention_mask")
        grids, latents = self._grids(arguments), [x, *arguments.get("ref_latents", ())]
        time = 1000 * arguments["timestep"]
        now = functional.silu(self.time_in.numbers(time, x.dtype))
        of_image, segments = now, None
        if len(grids) > 1:
            # Row 0 is the image's, row 1 the references'.
            of_image = torch.stack((now, functional.silu(self.time_in.numbers(0 * time, x.dtype))), dim=1)
            segments = torch.cat([torch.full((grid.length,), at > 0).long() for at, grid in enumerate(grids)])
        of_text = [block.txt.modulation.linear for block in self.layers]
        f.modulate(of_text, now)
        f.modulate([layer for layer in self.modulating if layer not in of_text], of_image)

        f.grid = grids[0]
        patches = torch.cat([grid.patches(each) for grid, each in zip(grids, latents, strict=True)], dim=1)
        places = torch.cat([grid.positions((10.0 * at, 0.0)) for at, grid in enumerate(grids)])
        f.image = f.shard(patches, self.img_in, lambda shard: kit.rope(shard(places), (4, 4), 100.0), segments)
        f.text = f.shard(context, lambda each: self.txt_in(self.txt_norm(each)))
        f.mask = alone = None
        if mask is not None:
            lengths = self.lengths(arguments)
            whole = torch.cat((mask, mask.new_ones(len(mask), lengths[1])), dim=1)
            f.mask = f.sequence.in_order_of_ranks(whole, lengths)
            alone = f.sequence.in_order_of_ranks(mask, lengths[:1])
        for layer in self.refiner:
            (attended,) = f.attend((f.text, layer.project(f.text)), mask=alone).wait()
            layer.after(f.text, attended)

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`."""
        return list(self.layers)

    def end(self, f: ForwardPass) -> Output:
        """See `DiT.end`. The grid leaves the references' tokens out."""
        latent: Tensor = f.grid.latent(self.final_layer(f))
        return latent
