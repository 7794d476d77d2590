"""Whether a network of ComfyUI's computes the same with its tokens shared out: tried at each load, before anyone asks.

A new version of ComfyUI may change a network so that a table is no longer true. Then an image stays on one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tacod.plan import Layout, Plan, Shape
from tacod.rank.comfyui.network import CONTROL, Network
from tacod.rank.comfyui.tables.base import Mask, Whole
from tacod.rank.families.control import Control
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.run import Call, relative_difference, run
from tacod.rank.oom import clear_tracebacks, describe_oom
from tacod.rank.parallel.topology import Topology
from tacod_client.tensors import to_wire
from tacod_client.text import encodable

__all__ = ["LIMITS", "check_split", "small_inputs"]

LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far, in the norm, a forward with shared tokens may be from one rank's; sums are in another order."""


def check_split(network: Network, topology: Topology, device: torch.device) -> None:
    """Take up a network's table, if there is one, and give it up again if a small forward shows that it isn't true.

    All ranks call this at once, and come to the same result. The network's `Network.reason` says it.
    """
    network.use_table(topology.world_size)
    if topology.world_size == 1 or not network.is_split:
        return
    for probe in network.probes:
        if failed := _failure(network, probe, topology, device):
            network.distrust(failed)
            return


class _FailedElsewhere(Exception):
    """Another rank has failed, so nobody goes on to the next exchange."""


def _failure(network: Network, probe: Mapping[str, Any], topology: Topology, device: torch.device) -> str:
    """Why a table isn't true of a small forward, the same on all ranks; empty if it is."""
    try:
        # Each forward has inputs of its own, for a network may write to them.
        inputs = small_inputs(network, probe, device)
        shape = Shape(network.heads, network.width, 1, network.lengths(inputs))
        if reason := network.unchecked(inputs):
            return f"its own small forward is none that may be split: {reason}"
        alone = run(Call(network, Plan(Layout(1, 1, 1), 1, shape), inputs), Topology())
        failed = ""
    except Exception as error:  # whatever a network raises
        _reraise_lack_of_memory(error)
        failed = f"its own small forward failed ({type(error).__name__}: {error})"
    if failed := _said(topology, failed):
        return failed

    def meet() -> None:
        # A rank that has failed says so in place of its next exchange, and others wait for it here.
        if not topology.everyone.agree(True):
            raise _FailedElsewhere

    for layout in _layouts(topology.world_size):
        elsewhere = False
        try:
            inputs = small_inputs(network, probe, device)
            with network.meeting(meet):
                shared = run(Call(network, Plan(layout, topology.world_size, shape), inputs), topology)
            difference = relative_difference(shared, alone)
            # Of what is no number nothing is known.
            fits = difference <= LIMITS[network.dtype]
            failed = "" if fits else f"with {layout} a small forward differed by {difference:.1e} from one rank's"
            if network.unshared:
                failed = f"{topology.world_size} ranks can't share its small forward: {network.unshared}"
        except _FailedElsewhere:
            elsewhere = True
        except Exception as error:  # such as a table that misfits, on all ranks or on this one
            _reraise_lack_of_memory(error)
            failed = f"with {layout} a small forward failed ({type(error).__name__}: {error})"
            clear_tracebacks(error)
        if failed := _said(topology, failed, elsewhere):
            topology.begin_anew()
            return failed
    return ""


def _said(topology: Topology, failed: str, elsewhere: bool = False) -> str:
    """What one of the ranks that ``failed`` says of it, on all ranks; empty if none has.

    Those that know already that it was ``elsewhere`` have agreed on that.
    """
    if not elsewhere and topology.everyone.agree(not failed):
        return ""
    told = topology.everyone.tell(encodable(failed).encode())
    return next(filter(None, told)).decode()


def small_inputs(network: Network, probe: Mapping[str, Any], device: torch.device) -> Inputs:
    """The arguments of a small forward, the same on every rank."""
    generator = torch.Generator().manual_seed(0)

    def made(value: Any) -> Any:
        if isinstance(value, Mask):
            mask = torch.ones(value.shape, dtype=torch.int64, device=device)
            mask[..., value.shape[-1] - value.hidden :] = 0
            return mask
        if isinstance(value, Whole):
            return torch.tensor(value.values, device=device)
        if isinstance(value, tuple):
            return torch.randn(value, generator=generator).to(device, network.dtype)
        return [made(each) for each in value] if isinstance(value, list) else value

    def residuals(shapes: Mapping[str, Any]) -> Control:
        return Control({name: [to_wire(each.cpu(), CONTROL) for each in made(some)] for name, some in shapes.items()})

    values: dict[str, Any] = {"timestep": torch.full((1,), 0.5, device=device)}
    values |= {name: residuals(value) if name == CONTROL else made(value) for name, value in probe.items()}
    return Inputs(values, network.specs_for(values))


def _layouts(ranks: int) -> list[Layout]:
    """One of each kind: Ulysses, a ring, and both where that is possible."""
    both = [Layout(1, 2, ranks // 2)] if ranks >= 4 and ranks % 2 == 0 else []
    return [Layout(1, ranks, 1), Layout(1, 1, ranks), *both]


def _reraise_lack_of_memory(error: Exception) -> None:
    if describe_oom(error) is not None:
        raise error
