"""The warm-up: a model's first forwards, at its load, so that no user's step pays for what is made once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tacod.plan import AUTO, DeviceRates, Layout, Plan, Request, Shape, fastest_alone, make_plan, measured_rates
from tacod.rank.families.base import DiT
from tacod.rank.families.inputs import Argument, Inputs
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call
from tacod.rank.oom import clear_tracebacks, describe_oom
from tacod.rank.parallel.topology import Topology
from tacod.shares import EQUAL, Shares, measured_shares
from tacod_client.errors import ArgumentError

__all__ = ["SIGMA", "Measured", "random_inputs", "usual_inputs", "warm_up"]

SMALLEST = 8
"""The shortest side of a latent that is tried."""
SIGMA = 0.7
"""The noise level of made-up forwards."""


class Measured(NamedTuple):
    """What a warm-up has found out; alike on all ranks."""

    rates: DeviceRates | None
    """None if there is only one rank, if one alone has no room for a usual forward, or if the model takes no usual
    size."""
    shares: Shares


def warm_up(
    dit: DiT,
    forwards: Forwards,
    device: torch.device,
    shares: Shares | None = None,
    known: Measured | None = None,
) -> Measured:
    """Run usual forwards on each rank alone and on all, and measure them.

    Ranks get ``shares`` of the forwards on all; if that is None, by how long each of them took alone. With what is
    ``known`` of an earlier load, forwards on all run as that says, and it is returned.
    """
    inputs = usual_inputs(dit, device)
    if inputs is None:
        return known or Measured(None, shares or EQUAL)
    world = forwards.topology.world_size
    shape = Shape(dit.heads, dit.width, inputs.batch, dit.lengths(inputs))
    seconds = _seconds_alone(dit, forwards, inputs, shape) if world > 1 and known is None else None
    if known is not None:
        shares = known.shares
    elif shares is None:
        shares = EQUAL if seconds is None else measured_shares(seconds)
    took: dict[Layout, float] = {}

    def run_in(layout: Layout) -> None:
        if layout not in took:
            took[layout] = _shortest_s(forwards, Call(dit, Plan(layout, world, shape), inputs, conditioning="warm-up"))

    shared = make_plan(Request(cfg_parallel=False), world, shape, shares=shares, hosts=dit.hosts).layout
    run_in(shared)
    run_in(make_plan(AUTO, world, shape, shares=shares, hosts=dit.hosts).layout)
    if known is None:
        rates = None
        if seconds is not None:
            shared_s = forwards.topology.everyone.numbers(took[shared])[0]
            alone_s = seconds[fastest_alone(shares).members[0]]
            rates = measured_rates(alone_s, shared, shared_s, shape, shares, dit.hosts)
        known = Measured(rates, shares)
    # As users' forwards will be, which may leave ranks idle.
    run_in(make_plan(AUTO, world, shape, known.rates, shares, dit.hosts).layout)
    forwards.prefixes.drop(dit)
    return known


def _shortest_s(forwards: Forwards, call: Call) -> float:
    """Seconds of a forward that isn't the first of its kind."""
    shortest = float("inf")
    # Without a CUDA graph, then captured, then as later ones will be.
    for _ in range(4):
        started = time.perf_counter()
        forwards(call)
        if call.inputs.latents[0].is_cuda:
            forwards.topology.clock.wait()
        shortest = min(shortest, time.perf_counter() - started)
    return shortest


def _seconds_alone(dit: DiT, forwards: Forwards, inputs: Inputs, shape: Shape) -> list[float] | None:
    """How long the whole forward takes on each rank alone, in the order of ranks; None if one has no room for it.

    All ranks try at the same time, and none waits for another meanwhile.
    """
    everyone = forwards.topology.everyone
    # Those that have loaded sooner wait, so that all are as busy.
    everyone.agree(True)
    took: float | None = None
    try:
        took = _alone_s(dit, forwards, inputs, shape)
    except (RuntimeError, MemoryError) as error:
        if describe_oom(error) is None:
            raise
        clear_tracebacks(error)
    if inputs.latents[0].is_cuda:
        torch.cuda.empty_cache()
    if not everyone.agree(took is not None):
        return None
    assert took is not None
    return everyone.numbers(took)


def _alone_s(dit: DiT, forwards: Forwards, inputs: Inputs, shape: Shape) -> float:
    """Seconds of the whole forward on this rank alone."""
    mine = Forwards(Topology(), forwards.graphs, forwards.prefixes.limit)
    try:
        return _shortest_s(mine, Call(dit, Plan(Layout(1, 1, 1), 1, shape), inputs, conditioning="warm-up"))
    finally:
        mine.clear()


def usual_inputs(dit: DiT, device: torch.device) -> Inputs | None:
    """The arguments of a usual forward, random: with smaller latents if the model wants them, None if it takes none."""
    sizes, sides = dict(dit.usual), [side for side in dit.canvas[2:] if isinstance(side, str)]
    generator = torch.Generator().manual_seed(0)
    while max(sizes[side] for side in sides) >= SMALLEST:
        inputs = random_inputs(dit, device, generator, sizes)
        try:
            dit.lengths(inputs)
        except ArgumentError:
            for side in sides:
                sizes[side] = max(sizes[side] // 2, 1)
        else:
            return inputs
    return None


def random_inputs(dit: DiT, device: torch.device, generator: torch.Generator, sizes: Mapping[str, int]) -> Inputs:
    """Random tensors for a forward's required arguments, at noise level `SIGMA`; ``sizes`` are the free sizes."""
    specs = dit.arguments()

    def tensor(spec: Argument) -> Tensor:
        assert spec.shape is not None
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        if spec.keys:
            return torch.ones(shape, dtype=torch.bool, device=device)
        return torch.randn(shape, generator=generator).to(device, torch.float32 if spec.fp32 else dit.dtype)

    values: dict[str, Any] = {}
    for name, spec in specs.items():
        if spec.required and isinstance(spec, Argument) and spec.shape is not None:
            values[name] = [tensor(each) for each in spec.members or [spec]] if spec.many else tensor(spec)
    made = Inputs(values, specs)
    times = [dit.timestep(torch.full(each.shape, SIGMA, device=device)).float() for each in made.timesteps]
    return made.replace(timestep=times if isinstance(values["timestep"], list) else times[0])
