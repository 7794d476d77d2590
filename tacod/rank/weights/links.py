"""How fast ranks fetch weights, all at once: from each other's memory, and from the host's."""

from __future__ import annotations

import time

import torch

from tacod.rank.comm.group import Group
from tacod.rank.weights.depot import HostSlabs, MakeSlab, PeerSlabs, copy_bytes
from tacod.rank.weights.placement import Links

__all__ = ["measure_links"]

BYTES = 32 << 20
COPIES = 8


def measure_links(group: Group, device: torch.device, reaches: bool) -> Links:
    """Measure them on GPUs, from the slowest rank; what can't be measured, and CPUs, count as `Links` says.

    All ranks call it at once. It takes 32 MiB in each place that is measured, and milliseconds.
    """
    usual = Links()
    if device.type != "cuda":
        return usual
    peers = _measure(group, device, PeerSlabs(group)) if reaches and group.size > 1 else None
    host = _measure(group, device, HostSlabs(group, gpu=True))
    return Links(peers or usual.peer_bytes_s, host or usual.host_bytes_s, measured=host is not None)


def _measure(group: Group, device: torch.device, make_slab: MakeSlab) -> float | None:
    """Bytes that each rank fetches in a second of what the next one has there; None if there is no memory."""
    slab = target = None
    try:
        slab = make_slab([BYTES] * group.size)
        target = torch.empty(BYTES, dtype=torch.uint8, device=device)
    except (OSError, RuntimeError):
        pass
    if not group.agree(slab is not None and target is not None):
        return None
    assert slab is not None
    assert target is not None
    source = slab.segments[(group.rank + 1) % group.size]
    copy_bytes(source, target)
    torch.cuda.synchronize(device)
    # From here on all of them fetch.
    group.agree(True)
    started = time.perf_counter()
    for _ in range(COPIES):
        copy_bytes(source, target)
    torch.cuda.synchronize(device)
    took = torch.tensor([time.perf_counter() - started], dtype=torch.float32, device=device)
    # Nobody reads what is about to be freed.
    return BYTES * COPIES / float(group.maximum(took).item())
