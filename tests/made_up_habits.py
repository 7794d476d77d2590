"""Made-up networks with the habits that a CUDA graph could get wrong, for tests on CPUs and on GPUs."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 16
Way = Callable[["Habit", Tensor], Tensor]
_known: dict[Any, Tensor] = {}
_calls = [0]


class Habit(nn.Module):
    """Two layers, and between them what ``way`` does."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.begin, self.end = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))
        self.way = way
        self.calls = 0
        self.tables: dict[tuple[int, ...], Tensor] = {}
        self.table: Tensor | None = None
        self.pinned: Tensor | None = None
        self.generator = random.Random(0)

    def forward(
        self, x: Tensor, timestep: Tensor, context: Any = None, control: Any = None, transformer_options: Any = None
    ) -> Tensor:
        hidden = self.begin(x).tanh() * timestep[:, None, None] * self.scale
        factor = (transformer_options or {}).get("factor", 1.0)
        self.given = x
        try:
            out: Tensor = self.end(self.way(self, hidden) * factor)
        finally:
            del self.given
        return out

    def preprocess_text_embeds(self, embeds: Tensor) -> Tensor:
        """Changes a table in place."""
        for table in self.tables.values():
            table.add_(1)
        return embeds


def positions(x: Tensor) -> Tensor:
    """A table for a shape."""
    return torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None].cos()


@functools.lru_cache(maxsize=1)
def positions_once(length: int, device: torch.device) -> Tensor:
    return torch.arange(length, device=device)[:, None].sin()


def adds_positions(net: Habit, x: Tensor) -> Tensor:
    return x + positions(x)


def keeps_tables(net: Habit, x: Tensor) -> Tensor:
    if x.shape not in net.tables:
        net.tables[tuple(x.shape)] = positions(x)
    return x + net.tables[tuple(x.shape)]


def keeps_one_table(net: Habit, x: Tensor) -> Tensor:
    if net.table is None or len(net.table) != x.shape[1]:
        net.table = positions(x)
    return x + net.table


def keeps_a_global_table(net: Habit, x: Tensor) -> Tensor:
    if x.shape not in _known:
        _known[x.shape] = positions(x)
    return x + _known[x.shape]


def overwrites_its_table(net: Habit, x: Tensor) -> Tensor:
    """One table for all shapes, written anew where another shape comes."""
    if net.table is None:
        net.table = torch.zeros(1024, 1, device=x.device)
    if net.calls != x.shape[1]:
        net.table[: x.shape[1]] = positions(x) * x.shape[1]
        net.calls = x.shape[1]
    return x + net.table[: x.shape[1]]


def counts_its_calls(net: Habit, x: Tensor) -> Tensor:
    net.calls += 1
    return x * net.calls


def counts_in_a_global(net: Habit, x: Tensor) -> Tensor:
    _calls[0] += 1
    return x * (_calls[0] % 7)


def reads_a_number(net: Habit, x: Tensor) -> Tensor:
    return x * x.abs().max().item()


def decides_by_a_number(net: Habit, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else x.sin()


def catches_what_it_may_not_read(net: Habit, x: Tensor) -> Tensor:
    try:
        return x * x.abs().max().item()
    except Exception:
        return x


def selects(net: Habit, x: Tensor) -> Tensor:
    return x - x[x > 0].mean()


def copies_to_the_host(net: Habit, x: Tensor) -> Tensor:
    return x + x.abs().mean().cpu().to(x.device)


def copies_what_it_keeps(net: Habit, x: Tensor) -> Tensor:
    """From memory of the host that it writes to at each call."""
    net.pinned = torch.empty(1, pin_memory=x.is_cuda) if net.pinned is None else net.pinned
    net.pinned.fill_(x.shape[1])
    return x + net.pinned.to(x.device, non_blocking=True)


def copies_the_time(net: Habit, x: Tensor) -> Tensor:
    return x + torch.tensor(time.perf_counter()).to(x.device)


def copies_without_blocking(net: Habit, x: Tensor) -> Tensor:
    """From memory of the host that others get after the call."""
    table = torch.arange(x.shape[1], dtype=x.dtype)[:, None].sin()
    return x + table.to(x.device, non_blocking=True)


def copies_into_place(net: Habit, x: Tensor) -> Tensor:
    x = x.contiguous()
    x[:, 0].copy_(torch.linspace(0, 1, WIDTH))
    made = x.new_tensor([1.0, 2.0])
    made += 1
    return x * made.sum() + torch.as_tensor([3.0], device=x.device)


def makes_a_tensor_of_numbers(net: Habit, x: Tensor) -> Tensor:
    return x + torch.tensor([0.5, 1.5], device=x.device).repeat(WIDTH // 2)


def draws(net: Habit, x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def draws_on_the_host(net: Habit, x: Tensor) -> Tensor:
    return x * random.random()


def draws_of_its_own(net: Habit, x: Tensor) -> Tensor:
    return x * net.generator.random()


def writes_to_its_weights(net: Habit, x: Tensor) -> Tensor:
    net.begin.bias.data.add_(0.01)
    return x


def writes_to_a_buffer(net: Habit, x: Tensor) -> Tensor:
    net.scale.data.mul_(0.99)
    return x


def waits_for_the_device(net: Habit, x: Tensor) -> Tensor:
    """By the driver, which ends a capture by itself."""
    if x.is_cuda:
        torch.cuda.current_stream().synchronize()
    return x


def nothing(net: Habit, x: Tensor) -> Tensor:
    return x


def uses_an_lru_cache(net: Habit, x: Tensor) -> Tensor:
    return x + positions_once(x.shape[1], x.device)


def writes_to_its_input(net: Habit, x: Tensor) -> Tensor:
    net.given.mul_(2)
    return x + net.given


GRAPHS: dict[str, Way] = {
    each.__name__: each
    for each in (
        nothing,
        keeps_tables,
        keeps_a_global_table,
        uses_an_lru_cache,
        keeps_one_table,
        writes_to_its_input,
    )
}
"""Those that become graphs, if shapes don't alternate."""
FROM_HOST: dict[str, Way] = {
    each.__name__: each for each in (makes_a_tensor_of_numbers, copies_without_blocking, copies_into_place)
}
"""Those that do where the device isn't the host."""
NEVER: dict[str, tuple[Way, str]] = {
    "counts_its_calls": (counts_its_calls, "what the network keeps: calls"),
    "counts_in_a_global": (counts_in_a_global, "what the network keeps: made_up_habits._calls"),
    "reads_a_number": (reads_a_number, "the host reads numbers of the device"),
    "decides_by_a_number": (decides_by_a_number, "the host reads numbers of the device"),
    "catches_what_it_may_not_read": (catches_what_it_may_not_read, "the host reads numbers of the device"),
    "selects": (selects, "the host reads numbers of the device (index)"),
    "draws": (draws, "draws random numbers of "),
    "draws_on_the_host": (draws_on_the_host, "draws random numbers of Python"),
    "draws_of_its_own": (draws_of_its_own, "what the network keeps: generator"),
    "copies_what_it_keeps": (copies_what_it_keeps, "it writes to a tensor that it keeps"),
    "writes_to_its_weights": (writes_to_its_weights, "it writes to its weights"),
    "writes_to_a_buffer": (writes_to_a_buffer, "it writes to a tensor that it keeps"),
}
"""Those that never do, and what the log says of them."""
BETWEEN_DEVICES: dict[str, tuple[Way, str]] = {
    "copies_to_the_host": (copies_to_the_host, "it copies between the host and the device"),
    "copies_the_time": (copies_the_time, "it copies other tensors to the device at each call"),
}
"""Those that never do, where the device isn't the host."""


def network(habit: str) -> Habit:
    """One of these, always of the same random weights."""
    torch.manual_seed(3)
    ways = {**GRAPHS, **FROM_HOST, **{name: way for name, (way, _) in {**NEVER, **BETWEEN_DEVICES}.items()}}
    ways["waits_for_the_device"] = waits_for_the_device
    ways["overwrites_its_table"] = overwrites_its_table
    return Habit(ways[habit]).requires_grad_(False).eval()


def inputs(seed: int, length: int = 5, device: str = "cpu") -> dict[str, Any]:
    """A call's tensors."""
    generator = torch.Generator().manual_seed(seed)
    x, timestep = torch.randn(2, length, WIDTH, generator=generator), torch.rand(2, generator=generator)
    return {"x": x.to(device), "timestep": timestep.to(device)}
