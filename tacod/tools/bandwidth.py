"""How fast GPUs reach each other, for ``tacoctl doctor``: copies between each two of those that this process sees.

Prints a JSON array. It takes 64 MiB on each GPU, and milliseconds of each link.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

import torch

__all__ = ["main"]

BYTES = 32 << 20
COPIES = 8


def main() -> int:
    """Measure all pairs, in both directions; returns 0."""
    print(json.dumps([_link(a, b) for a, b in itertools.permutations(range(torch.cuda.device_count()), 2)]))
    return 0


def _link(source: int, target: int) -> dict[str, Any]:
    sent = torch.randint(0, 256, (BYTES,), dtype=torch.uint8, device=f"cuda:{source}")
    arrived = torch.empty_like(sent, device=f"cuda:{target}")
    # The first copy opens the link.
    arrived.copy_(sent)
    _settle(source, target)
    started = time.perf_counter()
    for _ in range(COPIES):
        arrived.copy_(sent)
    _settle(source, target)
    elapsed_s = time.perf_counter() - started
    return {
        "from": source,
        "to": target,
        "peer": torch.cuda.can_device_access_peer(source, target),
        "bytes_per_s": BYTES * COPIES / elapsed_s,
        "intact": bool(torch.equal(sent.cpu(), arrived.cpu())),
    }


def _settle(*gpus: int) -> None:
    for gpu in gpus:
        torch.cuda.synchronize(gpu)


if __name__ == "__main__":
    sys.exit(main())
