"""Networks whose tokens look at each other without an attention that ranks could exchange: shared out, and whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.rank.comfyui.split import Split
from tacod.rank.comfyui.tables.base import Blocks, Cut, Heads, LinearAttention, Table
from tacod.rank.comfyui.tokens import Tokens
from tacod.rank.forward.run import relative_difference
from tacod.rank.parallel.sequence import SequenceParallel

WIDTH, HEADS = 12, 6


class Sums(nn.Module):
    """Linear attention, which also divides by a sum over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, dim=-1))
        summed = torch.matmul(functional.pad(v, (0, 1), value=1.0).mT, k.relu())
        out = torch.matmul(summed, q.relu().mT)
        return (out[:, :, :-1] / (out[:, :, -1:] + 1e-6)).flatten(1, 2).mT


class SumBlock(nn.Module):
    """Linear attention, and a convolution over neighbours."""

    def __init__(self, kernel: int, dilation: int) -> None:
        super().__init__()
        self.attn = Sums()
        padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv1d(WIDTH, WIDTH, kernel, padding=padding, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.conv(x.mT).mT


@dataclass
class Lengths:
    """How many tokens each image has, and each text."""

    video: Tensor
    text: Tensor


class Both(nn.Module):
    """A layer for each of video and text."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.video, self.text = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.video(video), self.text(text)


class Scale(nn.Module):
    """Scales each image's tokens."""

    def forward(self, video: Tensor, text: Tensor, scales: Tensor, lengths: Lengths) -> Tensor:
        return video * torch.repeat_interleave(scales, lengths.video, dim=0)[:, None]


class Windows(nn.Module):
    """Attention of windows of a packed sequence with a text that is in each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.proj_in, self.proj_out = Both(WIDTH, 3 * WIDTH), Both(WIDTH, WIDTH)

    def forward(self, video: Tensor, text: Tensor, order: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        qkv, words = (each.unflatten(-1, (3, self.heads, -1)) for each in self.proj_in(video, text))
        videos, texts = [], []
        for window in torch.split(qkv[order], sizes):
            q, k, v = torch.cat((window, words)).unbind(1)
            out = functional.scaled_dot_product_attention(*(each.transpose(0, 1) for each in (q, k, v)))
            mine, theirs = out.transpose(0, 1).flatten(1).split((len(window), len(text)))
            videos.append(mine)
            texts.append(theirs)
        both: tuple[Tensor, Tensor] = self.proj_out(torch.cat(videos)[order.argsort()], torch.stack(texts).mean(0))
        return both


class WindowBlock(nn.Module):
    """Windows, and a scale of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.scale = Windows(), Scale()

    def forward(
        self, video: Tensor, text: Tensor, order: Tensor, sizes: list[int], scales: Tensor, lengths: Lengths
    ) -> tuple[Tensor, Tensor]:
        scaled = self.scale(video, text, scales=scales, lengths=lengths)
        mine, theirs = self.attn(scaled, text, order, sizes)
        return video + mine, text + theirs


class CausalBlock(nn.Module):
    """Attention that it is given, with fewer heads of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        q = torch.unflatten(self.q(x), -1, (HEADS, -1)).transpose(1, 2)
        k, v = (torch.unflatten(each, -1, (HEADS // 2, -1)).transpose(1, 2) for each in self.kv(x).chunk(2, dim=-1))
        return x + attend(q, k, v, HEADS, mask=None, skip_reshape=True, enable_gqa=True)


def causal_first(text: int) -> Callable[..., Tensor]:
    """Attention that is causal among the first tokens, while the others attend to all."""

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any) -> Tensor:
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
        hidden[:text] = hidden[:text].tril()
        k, v = (each.repeat_interleave(2, dim=1) for each in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, hidden).transpose(1, 2).flatten(2)

    return attend


class Network(nn.Module):
    """Blocks one after the other, and a head."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, *tokens: Tensor, **others: Any) -> Tensor:
        for block in self.blocks:
            given = block(*tokens, **others)
            tokens = given if isinstance(given, tuple) else (given,)
        out: Tensor = self.head(tokens[0])
        return out


UNUSED: Any = None


def sums(length: int, kernel: int = 3, dilation: int = 1) -> tuple[Network, Table, tuple[Tensor, ...], dict[str, Any]]:
    """A network of linear attention."""
    blocks = Blocks("blocks", attention={"attn": LinearAttention()}, convolutions=("conv",))
    table = Table("", (blocks,), {"x": Cut(1, ("all",))}, ("head", ("all",)), *[UNUSED] * 4)
    return Network(lambda: SumBlock(kernel, dilation)), table, (torch.randn(2, length, WIDTH),), {}


def windows(*images: int) -> tuple[Network, Table, tuple[Tensor, ...], dict[str, Any]]:
    """A network of windows, over images of so many tokens."""
    blocks = Blocks(
        "blocks",
        attention={"attn": Heads("proj_in", "proj_out", "heads")},
        within=(Blocks("scale", counts={"lengths.video": "video"}),),
    )
    table = Table("", (blocks,), {"video": Cut(0, ("video",))}, ("head", ("video",)), *[UNUSED] * 4)
    total = sum(images)
    sizes = [3, *[5] * ((total - 3) // 5), *([(total - 3) % 5] if (total - 3) % 5 else [])]
    lengths = Lengths(torch.tensor(images), torch.tensor([7]))
    others = {"order": torch.randperm(total), "sizes": sizes, "scales": torch.randn(len(images)), "lengths": lengths}
    return Network(WindowBlock), table, (torch.randn(total, WIDTH), torch.randn(7, WIDTH)), others


def causal(text: int, image: int) -> tuple[Network, Table, tuple[Tensor, ...], dict[str, Any]]:
    """A network whose text attends causally."""
    runs = ("text", "image")
    table = Table("", (Blocks("blocks", causal="attend"),), {"x": Cut(1, runs)}, ("head", runs), *[UNUSED] * 4)
    return Network(CausalBlock), table, (torch.randn(2, text + image, WIDTH),), {"attend": causal_first(text)}


def error(sequence: SequenceParallel, kind: str, arguments: list[int]) -> tuple[float, bool, int]:
    """How far a forward of shared tokens is from a whole one, whether any were shared, and the heads afterwards."""
    torch.manual_seed(0)
    network, table, tokens, others = {"sums": sums, "windows": windows, "causal": causal}[kind](*arguments)
    split = Split(network, table)
    expected = network(*tokens, **others)
    with split.sharing(Tokens(sequence, leading=arguments[0]), {}):
        out = network(*tokens, **others)
    heads = int(network.blocks[0].attn.heads) if kind == "windows" else HEADS
    return relative_difference(out, expected), not split.unshared, heads
