"""Two hosts of a Ray cluster beside one group of all their devices: what it costs that ranks are on two hosts.

    python benchmarks/ray_hosts.py [--ranks 2] [--runs 10] [--case flux:1024 --case flux:2048 --case qwen_image:1024x2]

Two raylets on this machine's loopback interface are the hosts, each with half of the devices, GPUs or CPUs. Forwards go
through daemon and client, by the plan that tacod chooses and by Ulysses over all ranks. The GPUs are those of one
machine, so NCCL exchanges through their links, as if hosts had a network as fast; what Ray itself costs is left.
`--sockets` has NCCL use sockets, as between hosts without InfiniBand. A case is a model, a size and, behind another x,
how many images a batch has: two are the halves of CFG. Models have random weights, and on CPUs a block or two; there
each host's ranks count on all cores, so times say little. TMPDIR holds the files. Needs Ray (`taco-dit[ray]`).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from published import PUBLISHED, Size, build, make_inputs
from served import daemon, write_model
from torch import Tensor

from tacod.group.processes import ON_GPUS
from tacod_client import Client

WARM_UPS = 4
"""Forwards before the first that counts: as they come, captured as a CUDA graph, and replayed."""
SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_METRICS_COLLECTION": "0"}


class Case(NamedTuple):
    """What is measured."""

    model: str
    size: Size
    batch: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Of ``flux:1024`` or ``qwen_image:1024x2``."""
        found = re.fullmatch(r"(\w[\w.]*):(\d+)(?:x(\d+))?", text)
        if found is None or found[1] not in PUBLISHED:
            raise argparse.ArgumentTypeError(
                f"expected MODEL:SIZE or MODEL:SIZExBATCH with one of {', '.join(sorted(PUBLISHED))}; got {text!r}"
            )
        return cls(found[1], Size.parse(found[2]), int(found[3] or 1))

    def __str__(self) -> str:
        return f"{self.model} {self.size}" + (f", batch of {self.batch}" if self.batch > 1 else "")


class Measured(NamedTuple):
    """The forwards of a case by one plan."""

    plan: str
    seconds: list[float]
    out: Tensor


def main() -> int:
    """Measure, and print a table."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2, help="of both hosts together")
    parser.add_argument("--case", type=Case.parse, action="append", help="MODEL:SIZE or MODEL:SIZExBATCH, repeatable")
    parser.add_argument("--runs", type=int, default=10, help="forwards that count")
    parser.add_argument("--sockets", action="store_true", help="NCCL uses sockets in the group on two hosts")
    args = parser.parse_args()
    if args.ranks < 2 or args.ranks % 2 or args.runs < 1:
        parser.error("two hosts need an even number of --ranks, and there must be a run")
    if cuda and args.ranks > torch.cuda.device_count():
        parser.error(f"{args.ranks} ranks need as many GPUs, and there are {torch.cuda.device_count()}")
    if importlib.util.find_spec("ray") is None:
        parser.error("Ray is not installed: pip install 'taco-dit[ray]'")
    default = ["flux:1024", "flux:2048", "qwen_image:1024x2"] if cuda else ["flux:256", "flux:256x2"]
    cases = args.case or list(map(Case.parse, default))
    os.environ.update(ON_GPUS if cuda else {})
    os.environ.update(QUIET)
    gpus = list(map(str, range(args.ranks))) if cuda else []
    devices = torch.cuda.get_device_name() if cuda else "CPU ranks"
    print(
        f"{args.ranks} × {devices}, NCCL {'by sockets' if args.sockets else 'as it finds'}\n"
        if cuda
        else f"{devices}\n"
    )
    print("| forward | plan asked for | plan | one group | two hosts by Ray | more | difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: save(name, Path(folder, f"{name}.safetensors")) for name in {case.model for case in cases}}
        inputs = {case: inputs_of(case, files[case.model]) for case in cases}
        plans = {"auto": "auto", f"Ulysses {args.ranks}": {"ulysses": args.ranks}}
        with daemon(gpus, args.ranks, folder) as endpoint:
            alone = {
                (case, plan): measure(endpoint, case, plans[plan], inputs[case], args.runs)
                for case in cases
                for plan in plans
            }
        with (
            cluster(gpus, args.ranks, SOCKETS if args.sockets else {}) as address,
            daemon(gpus, args.ranks, folder, ray_address=address) as endpoint,
        ):
            for (case, plan), one in alone.items():
                two = measure(endpoint, case, plans[plan], inputs[case], args.runs)
                print(row(case, plan, one, two), flush=True)
    return 0


def row(case: Case, plan: str, one: Measured, two: Measured) -> str:
    """A line of the table; times are medians, and their spread."""

    def text(seconds: Sequence[float]) -> str:
        return f"{1e3 * statistics.median(seconds):.1f} ms ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})"

    more = 1e3 * (statistics.median(two.seconds) - statistics.median(one.seconds))
    error = float((two.out - one.out).norm() / one.out.norm())
    used = one.plan if one.plan == two.plan else f"{one.plan} / {two.plan}"
    return f"| {case} | {plan} | {used} | {text(one.seconds)} | {text(two.seconds)} | {more:+.1f} ms | {error:.1e} |"


def save(name: str, path: Path) -> Any:
    """Write a model with random weights; returns it without any, for its arguments."""
    cuda = torch.cuda.is_available()
    model = build(name, torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32)
    config = {**PUBLISHED[name].config, **({} if cuda else PUBLISHED[name].cut)}
    write_model(path, model.state_dict(), config)
    return model.to("meta")


def inputs_of(case: Case, model: Any) -> dict[str, Any]:
    """The arguments of a forward; in a batch the images have noise and conditioning of their own."""
    one = dict(make_inputs(case.model, model, case.size, torch.device("cpu")).items())
    return {
        key: torch.cat([value * (1 + (0.1 * index if key != "timestep" else 0)) for index in range(case.batch)]).to(
            value.dtype
        )
        for key, value in one.items()
    }


def measure(endpoint: str, case: Case, plan: Any, inputs: dict[str, Any], runs: int) -> Measured:
    """Forwards of a case by a plan, one after the other, and the last one's result."""
    seconds = []
    with Client(endpoint) as client:
        model = client.load(f"{case.model}.safetensors", plan=plan)
        for _ in range(WARM_UPS):
            model.forward(**inputs)
        for _ in range(runs):
            began_s = time.monotonic()
            out = model.forward(**inputs)
            seconds.append(time.monotonic() - began_s)
        measured = Measured(model.stats.plan, seconds, out.float())
        client.unload(model.id)
    return measured


@contextmanager
def cluster(gpus: Sequence[str], ranks: int, environment: dict[str, str]) -> Iterator[str]:
    """Two raylets, each with half of these GPUs, or of so many CPUs; gives the address of the head."""
    from ray.cluster_utils import Cluster

    half = ranks // 2
    made: Any = Cluster()
    try:
        with mock.patch.dict(os.environ, environment):
            for number in range(2):
                resources = {"num_cpus": half}
                if gpus:
                    # A raylet counts its GPUs from 0 on, within those that it sees.
                    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number * half : (number + 1) * half])
                    resources = {"num_cpus": 1, "num_gpus": half}
                # Not 127.0.0.1, for which Ray puts the machine's own address.
                more = {} if number else {"include_dashboard": False}
                made.add_node(node_ip_address=f"127.0.0.{number + 2}", object_store_memory=1 << 30, **resources, **more)
        yield str(made.address)
    finally:
        made.shutdown()


if __name__ == "__main__":
    sys.exit(main())
