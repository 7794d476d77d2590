"""Whether a network of ComfyUI's computes the same with its tokens shared out: tried at each load, before anyone asks.

A new version of ComfyUI may change a network so that a table is no longer true. Then an image stays on one rank.
"""

from __future__ import annotations

from typing import Any

import torch

from tacod.plan import Layout, Plan, Shape
from tacod.rank.comfyui.network import Network
from tacod.rank.comfyui.split import Ones
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.run import Call, relative_difference, run
from tacod.rank.oom import clear_tracebacks, describe_oom
from tacod.rank.parallel.topology import Topology

__all__ = ["LIMITS", "check_split", "small_inputs"]

LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far, in the norm, a forward with shared tokens may be from one rank's; sums are in another order."""


def check_split(network: Network, topology: Topology, device: torch.device) -> None:
    """Take up a network's table, if there is one, and give it up again if a small forward shows that it isn't true.

    All ranks call this at once, and come to the same result. The network's `Network.reason` says it.
    """
    network.use_table()
    if topology.world_size == 1 or not network.is_split:
        return
    try:
        shape = Shape(network.heads, network.width, 1, network.lengths(small_inputs(network, device)))
        # Each forward has inputs of its own, for a network may write to them.
        alone = run(Call(network, Plan(Layout(1, 1, 1), 1, shape), small_inputs(network, device)), Topology())
        failed = ""
    except Exception as error:  # whatever a network raises
        _reraise_lack_of_memory(error)
        failed = f"its own small forward failed ({type(error).__name__}: {error})"
    if not topology.everyone.agree(not failed):
        network.distrust(failed or "its small forward failed on another rank")
        return
    for layout in _layouts(topology.world_size):
        try:
            shared = run(
                Call(network, Plan(layout, topology.world_size, shape), small_inputs(network, device)), topology
            )
            difference = relative_difference(shared, alone)
            # Of what is no number nothing is known.
            fits = difference <= LIMITS[network.dtype]
            failed = "" if fits else f"with {layout} a small forward differed by {difference:.1e} from one rank's"
        except Exception as error:  # such as a table that misfits, on all ranks alike
            _reraise_lack_of_memory(error)
            topology.begin_anew()
            failed = f"with {layout} a small forward failed ({type(error).__name__}: {error})"
            clear_tracebacks(error)
        if not topology.everyone.agree(not failed):
            network.distrust(failed or f"with {layout} a small forward went wrong on another rank")
            return


def small_inputs(network: Network, device: torch.device) -> Inputs:
    """The arguments of a small forward of a network with a table, the same on every rank."""
    assert network.table is not None
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Any] = {"timestep": torch.full((1,), 0.5, device=device)}
    for name, shape in network.table.probe(network.inner).items():
        if isinstance(shape, int):
            values[name] = shape
        elif isinstance(shape, Ones):
            values[name] = torch.ones(shape, dtype=torch.int64, device=device)
        else:
            values[name] = torch.randn(shape, generator=generator).to(device, network.dtype)
    return Inputs(values, network.specs_for(values))


def _layouts(ranks: int) -> list[Layout]:
    """One of each kind: Ulysses, a ring, and both where that is possible."""
    both = [Layout(1, 2, ranks // 2)] if ranks >= 4 and ranks % 2 == 0 else []
    return [Layout(1, ranks, 1), Layout(1, 1, ranks), *both]


def _reraise_lack_of_memory(error: Exception) -> None:
    if describe_oom(error) is not None:
        raise error
