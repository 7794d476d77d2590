"""What a load may choose from, by its names in the protocol: compute dtypes, places of weights, attention kernels."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["ATTENTIONS", "COMPUTE_DTYPES", "WEIGHTS", "ComputeDtype", "Weights", "is_weight_only", "of_numbers"]

ComputeDtype = Literal["fp32", "bf16", "fp16", "fp8", "fp32_weight_only", "bf16_weight_only", "fp16_weight_only"]
"""fp8 is bf16 with the blocks' matrices multiplied in 8 bits. With ``_weight_only`` a quantized model's activations are
never quantized."""
Weights = Literal["auto", "replicated", "sharded", "host"]
"""Where a model's weights may lie; see `Client.load`."""
WEIGHTS: tuple[str, ...] = get_args(Weights)
COMPUTE_DTYPES: tuple[str, ...] = get_args(ComputeDtype)
ATTENTIONS = ("exact", "sage", "int8", "fa3")
"""What a plan's ``attention`` may be; see `Client.load`."""

_WEIGHT_ONLY = "_weight_only"


def is_weight_only(dtype: str) -> bool:
    """Whether activations are never quantized."""
    return dtype.endswith(_WEIGHT_ONLY)


def of_numbers(dtype: str) -> str:
    """What a model's numbers outside of its packed layers are in: fp32, bf16 or fp16."""
    return "bf16" if dtype == "fp8" else dtype.removesuffix(_WEIGHT_ONLY)
