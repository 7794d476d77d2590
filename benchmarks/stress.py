"""Clients that all ask at once, for a while: whether each gets its share, and what the wire costs then.

    PYTHONPATH=tests python benchmarks/stress.py [--clients N] [--seconds S] [--ranks N] [--loras [--room N]]

The daemon is a real one, with a tiny Flux.1 in fp32 on CPU ranks; each client is a process of its own that asks for one
forward after the other, and holds each result against its undisturbed one. *Wire* is all of a forward that is neither
waiting for a turn nor computing: both sockets, copies, the daemon, and the client's own turn on the processor. With
``--loras`` each client has a LoRA of its own on the one model, and with ``--room`` the ranks may hold so many of them
at once, so that clients take turns by loads. Exit code 1 says that a forward was lost or differed by more than 2e-6, or
that a client's share is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from clients import Call, clients, lora, quantile
from helpers import FLUX, FP32, Daemon

FAIR = 0.1


def main() -> int:
    """Load a daemon, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--loras", action="store_true", help="a LoRA for each client")
    parser.add_argument("--room", type=int, help="a memory budget (models.memory_bytes) that holds so many LoRAs")
    args = parser.parse_args()
    settings = {}
    if args.room is not None:
        weights = FLUX.model.state_dict()
        own = sum(weights[patch["key"]].nbytes for patch in lora(0))
        # With half of one to spare.
        settings["models.memory_bytes"] = sum(each.nbytes for each in weights.values()) + own * (2 * args.room + 1) // 2
    limit = ["--seconds", str(args.seconds), *(["--lora"] if args.loras else [])]
    with tempfile.TemporaryDirectory(prefix="tacod-") as models:
        FLUX.save(Path(models))
        with Daemon(args.ranks, [Path(models)], settings, cold=True) as daemon:
            with clients(daemon.endpoint, [limit] * args.clients) as asking:
                with daemon.client() as client:
                    before = client.stats()
                for each in asking:
                    each.begin()
                codes = [each.end() for each in asking]
            with daemon.client() as client:
                after = client.stats()
            made_room = daemon.log.count("to make room")
    # Only while all of them ask is there a share to be had.
    ends = min(each.calls[-1].at_s for each in asking)
    begins = max(each.calls[0].at_s for each in asking)
    shares = [sum(begins <= call.at_s <= ends for call in each.calls) for each in asking]
    calls = [call for each in asking for call in each.calls]
    done = after["forwards_total"] - before["forwards_total"]
    off = max(abs(share / (sum(shares) / len(shares)) - 1) for share in shares)
    fine = not any(codes) and done == len(calls) and max(call.error for call in calls) <= FP32
    print(f"{args.clients} clients, {args.ranks} CPU ranks, {os.cpu_count()} cores, {ends - begins:.0f} s\n")
    tell(calls)
    print(f"\n{len(calls)} forwards answered, {done} done by the ranks, {done / (ends - begins):.0f} a second")
    print(f"equal to the bit: {sum(call.bitwise for call in calls)}; begun again: {sum(c.attempts > 1 for c in calls)}")
    print(f"models that made room: {made_room}")
    print(f"shares: {min(shares)} to {max(shares)}, off by {off:.1%} at the most")
    return 0 if fine and off <= FAIR else 1


def tell(calls: list[Call]) -> None:
    """The table of times."""
    print("| ms | p50 | p95 | p99 | longest |\n| --- | --- | --- | --- | --- |")
    for name, values in (
        ("a forward", [call.seconds for call in calls]),
        ("its wire", [call.wire_s for call in calls]),
    ):
        cells = [f"{1e3 * quantile(values, share):.1f}" for share in (0.5, 0.95, 0.99, 1.0)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
