"""The self-test: before a group counts as ready, a forward goes through all ranks and must come out right."""

from __future__ import annotations

import torch

from tacod.plan import Layout, Plan, Shape
from tacod.rank.engine import Engine
from tacod.rank.families import families
from tacod.rank.forward.run import Call, relative_difference, run
from tacod.rank.forward.warmup import random_inputs
from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["selftest"]

_SIZES = {"B": 1, "H": 14, "W": 10, "L": 5}
"""The free sizes of the inputs."""
_TOLERANCE = 1e-3
"""Coarse on purpose: a GPU's TF32 passes, but a token in the wrong place doesn't."""


def selftest(engine: Engine) -> None:
    """Run a tiny model with random weights on each rank alone, and on all together by Ulysses and by a ring.

    It is of the first family, by its `DiT.tiny` configuration.

    Raises `RuntimeError` if the outputs differ, which means that the collectives here can't be relied on.
    """
    topology = engine.topology
    generator = torch.Generator().manual_seed(0)
    family = families()[0]
    with torch.inference_mode():
        model = family(family.tiny).to(engine.device)
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        inputs = random_inputs(model, engine.device, generator, _SIZES)
        alone = model.run(SequenceParallel(), inputs)
        for layout in (Layout(1, topology.world_size, 1), Layout(1, 1, topology.world_size)):
            plan = Plan(layout, topology.world_size, Shape(model.heads, model.width))
            error = relative_difference(run(Call(model, plan, inputs), topology), alone)
            if not error <= _TOLERANCE:
                raise RuntimeError(
                    f"self-test: {layout} is off by {error:.1e} from one rank alone; the links between these devices "
                    "can't be relied on (on GPUs try NCCL_P2P_DISABLE=1)"
                )
    if engine.device.type == "cuda":
        topology.clock.wait()
    topology.clock.take_s()
