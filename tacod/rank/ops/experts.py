"""Mixtures of experts (Shazeer et al., 2017, arXiv:1701.06538): each token goes through a few of many feed-forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tacod.rank.ops.fused import has_kernels

__all__ = ["Layers", "mixture", "stays_on_gpu"]

Layers = tuple[Any, Any, Any]
"""An expert's linear layers without biases: second(silu(first(x)) * gate(x)) is first, second, gate."""


def stays_on_gpu(experts: Sequence[Layers]) -> bool:
    """Whether `mixture` needs no number on the host, so that a CUDA graph may hold it: a kernel multiplies all experts.

    The kernel takes plain layers in bf16 or fp16 on a GPU. For packed layers and fp32 there are PyTorch's products.
    """
    layers = [layer for expert in experts for layer in expert]
    return all(
        type(layer) is nn.Linear
        and layer.bias is None
        and layer.weight.is_cuda
        and layer.weight.is_contiguous()
        and layer.weight.dtype == layers[0].weight.dtype
        and layer.weight.dtype.itemsize == 2
        for layer in layers
    )


def mixture(
    x: Tensor, chosen: Tensor, experts: Sequence[Layers], apply: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """Each token by each of its experts, [n, active, W].

    Args:
        x: Tokens, [n, W].
        chosen: The experts of each, int64 [n, active].
        experts: Their layers.
        apply: The same experts as functions of tokens [m, W], for where the kernel doesn't serve (`stays_on_gpu`).
            The host then waits for the numbers of tokens that experts get.
    """
    active = chosen.shape[-1]
    # The places of a token's experts, expert by expert.
    counts = (chosen[..., None] == torch.arange(len(experts), device=x.device)).sum((0, 1))
    order = chosen.flatten().argsort()
    if has_kernels(x) and stays_on_gpu(experts) and experts[0][0].weight.dtype == x.dtype:
        from tacod.rank.ops import expert_kernels

        weights = [tuple(layer.weight for layer in layers) for layers in zip(*experts, strict=True)]
        return expert_kernels.feed_forward(x, order, counts, active, *weights)
    rows = torch.split(x[order // active], counts.tolist())
    outs = [expert(each) for expert, each in zip(apply, rows, strict=True)]
    return torch.unflatten(torch.cat([x[:0], *outs])[order.argsort()], 0, chosen.shape)
