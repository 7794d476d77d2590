"""Attention kernels of other packages, for plans that ask for one: faster than PyTorch's, and other numbers.

`KERNELS` is the one registry: a kernel is a class here and a name in `tacod_client.dtypes.ATTENTIONS`. A plan that asks
for none attends exactly (`tacod.rank.ops.sdpa`). There is no fallback: what a kernel can't compute is refused.
"""

from __future__ import annotations

import abc
import enum
import importlib
import inspect
import logging
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from tacod.rank.ops.sdpa import Part, attend_part
from tacod_client.errors import ArgumentError

__all__ = ["KERNELS", "FlashAttention3", "Int8Attention", "Kernel", "Obstacle", "SageAttention", "find_kernel"]

log = logging.getLogger(__name__)

_AGREES = 0.1
"""How far a kernel may be from exact attention on a small random case; 8 bits make errors of 1e-2 to 5e-2."""
_TRIED_HEADS, _TRIED_TOKENS = 2, 320
"""The small case: more than one tile of keys, the last one partial."""


class Obstacle(enum.IntEnum):
    """Why a rank can't use a kernel; ranks tell each other these numbers."""

    NONE = 0
    DEVICE = 1
    """The device isn't one that the kernel is for."""
    PACKAGE = 2
    """The package isn't installed, or doesn't load."""
    VERSION = 3
    """The package is there and lacks what is needed of it."""
    FAILS = 4
    """A small attention raises an error or differs from the exact one."""


class Kernel(abc.ABC):
    """One kernel; its subclass calls the package."""

    name: ClassVar[str]
    """What a plan asks for."""
    title: ClassVar[str]
    """What people call it."""
    package: ClassVar[str]
    """The module to import."""
    install: ClassVar[str]
    """What a user does to have it."""
    cards: ClassVar[str]
    """In words, the devices that it is for."""
    widest: ClassVar[int]
    """The most channels that a head may have."""
    takes_masks: ClassVar[bool] = False
    tells_lse: ClassVar[bool] = False
    """Whether `attend_part` works, which a ring needs."""
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)

    @abc.abstractmethod
    def suits(self, device: torch.device) -> bool:
        """Whether the device is one of `cards`."""

    @abc.abstractmethod
    def find(self, module: Any) -> Callable[..., Any] | None:
        """The package's function; None if this version of it lacks what is needed."""

    @abc.abstractmethod
    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See `attend`."""

    def compute_part(self, q: Tensor, k: Tensor, v: Tensor) -> Part:
        """Output [B, H, S, D] and log-sum-exp [B, H, S], for kernels that tell it."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention on [B, H, S, D], with as many key heads as query heads; ``mask`` as in `sdpa.attend`."""
        return self.compute(q, k, v, mask) if q.numel() else torch.empty_like(q)

    def attend_part(self, q: Tensor, k: Tensor, v: Tensor) -> Part:
        """Attention over some of the keys, as `sdpa.attend_part` without a mask."""
        if not q.numel() or not k.numel():
            return attend_part(q, k, v)
        out, lse = self.compute_part(q, k, v)
        return out.float(), lse.float()

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The package's function. Raises `ImportError` without the package, `AttributeError` if it lacks it."""
        found = self.find(importlib.import_module(self.package))
        if found is None:
            raise AttributeError(f"this version of {self.package} has no {self.title}")
        return found

    def check(self, dtype: torch.dtype, width: int, mask: object = None) -> None:
        """Raise `ArgumentError` for what the kernel computes on no device: alike on all ranks.

        ``mask`` is a tensor, or what no kernel takes, such as a `GroupBias`.
        """
        reason = ""
        if dtype not in self.dtypes:
            reason = "it computes in bf16 and fp16 only; load the model in one of these"
        elif width > self.widest:
            reason = f"its heads have at most {self.widest} channels, and this model's have {width}"
        elif mask is not None and not (self.takes_masks and isinstance(mask, Tensor)):
            reason = f"it takes no such mask as this forward's attention has ({type(mask).__name__})"
        if reason:
            raise ArgumentError(
                f"plan: attention {self.name!r} ({self.title}): {reason}; or ask for 'exact'", argument="plan"
            )

    def obstacle(self, device: torch.device, dtype: torch.dtype, width: int) -> Obstacle:
        """What keeps this rank from using the kernel; the log says more. Tried once for each kind of heads."""
        return _obstacle(self, device, dtype, width)

    def advice(self, obstacle: Obstacle) -> str:
        """What an obstacle means, and what to do."""
        return {
            Obstacle.DEVICE: f"this device can't run it: it needs {self.cards}",
            Obstacle.PACKAGE: f"the package {self.package} is missing: {self.install}",
            Obstacle.VERSION: f"this version of {self.package} lacks it: {self.install}",
            Obstacle.FAILS: f"it fails on a small attention here (the daemon's log says how): {self.install}",
        }[obstacle]


@cache
def _obstacle(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> Obstacle:
    if not kernel.suits(device):
        return Obstacle.DEVICE
    try:
        kernel.function  # noqa: B018
    except AttributeError as error:
        log.warning("attention %r: %s", kernel.name, error)
        return Obstacle.VERSION
    except Exception as error:
        # A package that was built for another PyTorch or CUDA raises all kinds of errors.
        log.warning("attention %r: %s: %s", kernel.name, type(error).__name__, error)
        return Obstacle.PACKAGE
    reason = _trouble(kernel, device, dtype, width)
    if reason:
        log.warning("attention %r: %s", kernel.name, reason)
    return Obstacle.FAILS if reason else Obstacle.NONE


def _trouble(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """What is wrong with a small attention; empty if nothing is."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(3, _TRIED_TOKENS, 1, _TRIED_HEADS, width, generator=generator).to(device, dtype)
    # As an exchange gives them: tokens first in memory.
    q, k, v = numbers.permute(0, 2, 3, 1, 4)
    expected, seen = attend_part(q, k, v)
    try:
        found = kernel.attend(q, k, v)
        error = float((found.float() - expected).norm() / expected.norm())
        if kernel.tells_lse:
            part, lse = kernel.attend_part(q, k, v)
            error = max(error, float((part - expected).norm() / expected.norm()), float((lse - seen).abs().max()))
        if kernel.takes_masks:
            keys = torch.arange(_TRIED_TOKENS, device=device)[None, None, None] % 3 > 0
            wanted, _ = attend_part(q, k, v, keys)
            error = max(error, float((kernel.attend(q, k, v, keys).float() - wanted).norm() / wanted.norm()))
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
    return "" if error <= _AGREES else f"a small attention differs by {error:.1e}"


def _capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU; (0, 0) for every other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


class SageAttention(Kernel):
    """SageAttention 2 (Zhang et al., 2024, arXiv:2411.10958): queries and keys in int8, values in fp8 or fp16.

    It chooses its kernel by the card, as it does where ComfyUI calls it.
    """

    name = "sage"
    title = "SageAttention 2"
    package = "sageattention"
    install = "build SageAttention 2 from github.com/thu-ml/SageAttention for this card in the daemon's environment"
    cards = "an NVIDIA GPU of compute capability 8.0 or more (Ampere or newer)"
    widest = 128
    tells_lse = True

    def suits(self, device: torch.device) -> bool:
        """See `Kernel.suits`."""
        return _capability(device) >= (8, 0)

    def find(self, module: Any) -> Callable[..., Any] | None:
        """See `Kernel.find`: version 1 doesn't tell the log-sum-exp."""
        function = getattr(module, "sageattn", None)
        known = function is not None and "return_lse" in inspect.signature(function).parameters
        return function if known else None

    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See `Kernel.attend`."""
        out: Tensor = self.function(q, k, v, tensor_layout="HND", is_causal=False)
        return out

    def compute_part(self, q: Tensor, k: Tensor, v: Tensor) -> Part:
        """See `Kernel.compute_part`."""
        out, lse = self.function(q, k, v, tensor_layout="HND", is_causal=False, return_lse=True)
        return out, lse


class Int8Attention(Kernel):
    """comfy-kitchen's attention in int8, which ComfyUI uses with ``--use-ck-attention``: queries, keys, values."""

    name = "int8"
    title = "comfy-kitchen's int8 attention"
    package = "comfy_kitchen"
    install = "pip install 'comfy-kitchen>=0.2.31' in the daemon's environment"
    cards = "an NVIDIA GPU of compute capability 7.5 or more (Turing or newer)"
    widest = 256
    takes_masks = True

    def suits(self, device: torch.device) -> bool:
        """See `Kernel.suits`."""
        return _capability(device) >= (7, 5)

    def find(self, module: Any) -> Callable[..., Any] | None:
        """See `Kernel.find`: older packages have no such attention."""
        function: Callable[..., Any] | None = getattr(module, "int8_attention", None)
        return function

    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See `Kernel.attend`."""
        out: Tensor = self.function(q, k, v, attn_mask=mask)
        return out


class FlashAttention3(Kernel):
    """FlashAttention 3 (Shah et al., 2024, arXiv:2407.08608), in the dtype of its inputs."""

    name = "fa3"
    title = "FlashAttention 3"
    package = "flash_attn_interface"
    install = (
        "build FlashAttention 3 from the folder hopper of github.com/Dao-AILab/flash-attention in the daemon's "
        "environment"
    )
    cards = "an NVIDIA GPU of compute capability 9.0 (Hopper)"
    widest = 256
    tells_lse = True

    def suits(self, device: torch.device) -> bool:
        """See `Kernel.suits`."""
        return _capability(device) == (9, 0)

    def find(self, module: Any) -> Callable[..., Any] | None:
        """See `Kernel.find`."""
        function: Callable[..., Any] | None = getattr(module, "flash_attn_func", None)
        return function

    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See `Kernel.attend`."""
        found = self.function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        # The first versions always return the log-sum-exp too.
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)

    def compute_part(self, q: Tensor, k: Tensor, v: Tensor) -> Part:
        """See `Kernel.compute_part`."""
        asked = inspect.signature(self.function).parameters
        more = {"return_attn_probs": True} if "return_attn_probs" in asked else {}
        out, lse, *_ = self.function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **more)
        return out.transpose(1, 2), lse


KERNELS: dict[str, Kernel] = {each.name: each for each in (SageAttention(), Int8Attention(), FlashAttention3())}
"""Every kernel that a plan may ask for, by its name there."""


def find_kernel(name: str) -> Kernel | None:
    """The kernel of a plan's policy; None for exact attention."""
    return None if name == "exact" else KERNELS[name]
