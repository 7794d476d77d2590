"""Before a group counts as ready, a forward has gone through all its ranks and come out right."""

from __future__ import annotations

import torch

from tacod.plan import Layout, Plan, Shape
from tacod.rank.engine import Engine
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.sd3 import SD3
from tacod.rank.forward.run import Call, relative_difference, run
from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["selftest"]

_CONFIG = {
    "image_model": "sd3",
    "in_channels": 4,
    "patch_size": 2,
    "depth": 2,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 8, "out_features": 128}},
    "adm_in_channels": 8,
    "pos_embed_max_size": 16,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [],
}
_TOLERANCE = 1e-3
"""Coarse on purpose: a GPU's TF32 passes, a token in the wrong place doesn't."""


def selftest(engine: Engine) -> None:
    """Run a tiny model with random weights on each rank alone, and on all together by Ulysses and by a ring.

    Raises `RuntimeError` if the outputs differ, which means that the collectives here can't be relied on.
    """
    topology = engine.topology
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(engine.device)

    with torch.inference_mode():
        model = SD3(_CONFIG).to(engine.device)
        for tensor in model.state_dict().values():
            tensor.copy_(randn(*tensor.shape) * 0.2)
        x, context, y = randn(1, 4, 14, 10), randn(1, 5, 8), randn(1, 8)
        timestep = torch.full((1,), 500.0, device=engine.device)
        inputs = Inputs({"x": x, "timestep": timestep, "context": context, "y": y}, model.arguments())
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
