"""What it saves and costs to compute a prefix once a run: Qwen-Image-2.1 with a text, and with a reference too.

A step that computes its prefix and one that finds it take turns, in this process; medians. On a CPU one thread
computes, its own seconds count, and the model is smaller, with the published proportions of its layers and of text to
image; on a GPU it is wall time.

    python benchmarks/prefixes.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from tacod.plan import AUTO
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.qwen_image_21 import QwenImage21
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call, plan_for
from tacod.rank.parallel.topology import Topology

SMALL = {"num_attention_heads": 8, "num_layers": 8, "context_in_dim": 1024}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = QwenImage21({} if on_gpu else SMALL)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5)
    side, text = (64, 256) if on_gpu else (32, 64)
    where = torch.cuda.get_device_name() if on_gpu else "one CPU thread"
    print(f"{model.width} wide, {len(model.trunk)} blocks, {side * side} tokens of image, {text} of text; {where}\n")
    print("| prefix | tokens | of all | computes it, ms | finds it, ms | saved | kept, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, references in (("text", 0), ("text and a reference", 1), ("text and two references", 2)):
        print(row(name, model, _inputs(model, side, text, references, dtype, device), args.rounds))


def row(name: str, model: QwenImage21, inputs: Inputs, rounds: int) -> str:
    """A line of the table."""
    forwards = Forwards(Topology())
    call = Call(model, plan_for(model, AUTO, 1, inputs), inputs, conditioning=name)
    computing, finding = [], []
    with torch.inference_mode():
        # On a GPU the third forward is the first replay of a graph.
        for _ in range(3):
            forwards(call)
        kept = forwards.prefixes.nbytes
        for _ in range(rounds):
            forwards.prefixes.clear()
            computing.append(_seconds(forwards, call))
            finding.append(_seconds(forwards, call))
    prefix, image = model.lengths(inputs)
    one, other = statistics.median(computing), statistics.median(finding)
    return (
        f"| {name} | {prefix} | {100 * prefix / (prefix + image):.0f} % | {1000 * one:.1f} | {1000 * other:.1f} "
        f"| {100 * (1 - other / one):.0f} % | {kept / 2**20:.0f} |"
    )


def _seconds(forwards: Forwards, call: Call) -> float:
    clock = time.perf_counter if call.inputs.latents[0].is_cuda else time.process_time
    started = clock()
    out = forwards(call)
    assert isinstance(out, Tensor)
    if out.is_cuda:
        torch.cuda.synchronize()
    return clock() - started


def _inputs(
    model: QwenImage21, side: int, text: int, references: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    def latent() -> Tensor:
        return torch.randn(1, model.channels, side, side, device=device, dtype=dtype)

    values: dict[str, Any] = {"x": latent(), "timestep": torch.full((1,), 0.7, device=device)}
    values["context"] = torch.randn(1, text, model.context_width, device=device, dtype=dtype)
    if references:
        values["ref_latents"] = [latent() for _ in range(references)]
    return Inputs(values, model.arguments())


if __name__ == "__main__":
    main()
