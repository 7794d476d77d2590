"""The warm-up: a model's first forwards, at its load, so that no user's step pays for what is made once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tacod.plan import AUTO, DeviceRates, Layout, Plan, Request, Shape, make_plan, measured_rates
from tacod.rank.families.base import DiT
from tacod.rank.families.inputs import Argument, Inputs
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call, run
from tacod.rank.oom import clear_tracebacks, describe_oom
from tacod.rank.parallel.topology import Topology
from tacod_client.errors import ArgumentError

__all__ = ["SIGMA", "random_inputs", "usual_inputs", "warm_up"]

SMALLEST = 8
"""The shortest side of a latent that is tried."""
SIGMA = 0.7
"""The noise level of made-up forwards."""


def warm_up(dit: DiT, forwards: Forwards, device: torch.device) -> DeviceRates | None:
    """Run usual forwards on one rank and on all, and measure them. All ranks return the same rates.

    None if there is only one rank, if one alone has no room for such a forward, or if the model takes no usual size.
    """
    inputs = usual_inputs(dit, device)
    if inputs is None:
        return None
    world = forwards.topology.world_size
    shape = Shape(dit.heads, dit.width, inputs.batch, dit.lengths(inputs))
    alone, shared = Layout(1, 1, 1), make_plan(Request(cfg_parallel=False), world, shape).layout
    fits = world == 1 or _fits_alone(dit, forwards.topology, inputs, shape)
    took = {}
    for layout in dict.fromkeys((*((alone,) if fits else ()), shared, make_plan(AUTO, world, shape).layout)):
        took[layout] = float("inf")
        # Without a CUDA graph, then captured, then as later ones will be.
        for _ in range(4):
            started = time.perf_counter()
            forwards(Call(dit, Plan(layout, world, shape), inputs, conditioning="warm-up"))
            if device.type == "cuda":
                forwards.topology.clock.wait()
            took[layout] = min(took[layout], time.perf_counter() - started)
    forwards.prefixes.drop(dit)
    if world == 1 or not fits:
        return None
    mine = torch.tensor([took[alone], took[shared]], dtype=torch.float64, device=device)
    alone_s, shared_s = forwards.topology.everyone.broadcast(mine, source=0).tolist()
    return measured_rates(alone_s, shared, shared_s, shape)


def _fits_alone(dit: DiT, topology: Topology, inputs: Inputs, shape: Shape) -> bool:
    """Whether rank 0 alone has room for the whole forward. No other rank waits for it while it tries."""
    fits = True
    if topology.rank == 0:
        try:
            run(Call(dit, Plan(Layout(1, 1, 1), 1, shape), inputs), Topology())
        except (RuntimeError, MemoryError) as error:
            if describe_oom(error) is None:
                raise
            fits = False
            clear_tracebacks(error)
            torch.cuda.empty_cache()
    return topology.everyone.agree(fits)


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
