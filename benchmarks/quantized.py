"""Packed formats beside bf16, in one run: single layers, and whole models on one to all GPUs.

    python benchmarks/quantized.py layers [--sizes 4608x3072x12288,…]
    python benchmarks/quantized.py models [--models flux,z_image,qwen_image] [--ranks 1,2,3] [--rounds 7]

Weights are random. Of a model, the layers of its blocks are packed as publishers pack them: those whose inputs and
outputs are many. With comfy-kitchen installed, its int8 layer and its unpacking of nvfp4 are measured beside ours.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from families import times_of
from published import Size, build, make_inputs
from torch import Tensor, multiprocessing, nn
from torch.nn import functional

from tacod.checkpoint.header import BLOCKS
from tacod.group.processes import ON_GPUS
from tacod.plan import AUTO, Shape, make_plan
from tacod.rank.comm import process_groups
from tacod.rank.comm.select import reach
from tacod.rank.families.base import DiT
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.ops.packed.float8 import Float8Linear, Mxfp8Linear, Nvfp4Linear
from tacod.rank.ops.packed.fp8 import Fp8Linear
from tacod.rank.ops.packed.gguf import BlockLinear
from tacod.rank.ops.packed.integers import Int4Linear, Int8Linear, W4A8Linear, quantize_tokens
from tacod.rank.ops.packed.rotation import rotate
from tacod.rank.parallel.topology import Topology
from tacod.rank.weights.load import weight_bytes

SIZES = (
    "4608x3072x12288",
    "4608x12288x3072",
    "4608x15360x3072",
    "1536x3072x12288",
    "1536x15360x3072",
    "4128x3840x10240",
    "4128x10240x3840",
    "1x3072x18432",
)
"""Tokens, inputs and outputs: Flux.1's and Qwen-Image's on one GPU, on each of three, Z-Image's, and a modulation."""
FEWEST = 1024
"""Layers with fewer inputs or outputs stay as they are."""
REPEATS = 20
MODELS = "flux,z_image,qwen_image"


def _bytes(*shape: int, device: torch.device) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, device=device)


def _float8(layer: nn.Linear, native: bool) -> PackedLinear:
    weight = layer.weight
    scale = weight.abs().amax().float() / 448
    return Float8Linear((weight / scale).to(torch.float8_e4m3fn), layer.bias, weight.dtype, scale, None, native)


def _int8(layer: nn.Linear, group: int, weight_only: bool = False) -> PackedLinear:
    data, scale = quantize_tokens(rotate(layer.weight, group) if group else layer.weight)
    return Int8Linear(data, layer.in_features, scale, group, layer.bias, layer.weight.dtype, weight_only)


def _mxfp8(layer: nn.Linear) -> PackedLinear:
    (rows, columns), device = layer.weight.shape, layer.weight.device
    powers = torch.full((rows, columns // 32), 119, dtype=torch.uint8, device=device)
    return Mxfp8Linear((layer.weight * 256).to(torch.float8_e4m3fn), powers, columns, layer.bias, layer.weight.dtype)


def _nvfp4(layer: nn.Linear) -> PackedLinear:
    (rows, columns), device = layer.weight.shape, layer.weight.device
    blocks = torch.ones(rows, columns // 16, device=device).to(torch.float8_e4m3fn)
    data, scale = _bytes(rows, columns // 2, device=device), torch.tensor(0.005, device=device)
    return Nvfp4Linear(data, blocks, scale, columns, layer.bias, layer.weight.dtype)


def _int4(layer: nn.Linear) -> PackedLinear:
    (rows, columns), device = layer.weight.shape, layer.weight.device
    scale = torch.full((rows, 1), 0.004, device=device)
    data = _bytes(rows, columns // 2, device=device).view(torch.int8)
    return Int4Linear(data, scale, 256, layer.bias, layer.weight.dtype)


def _w4a8(layer: nn.Linear) -> PackedLinear:
    (rows, columns), device = layer.weight.shape, layer.weight.device
    relative = torch.full((rows, columns // 16), 8.0, device=device).to(torch.float8_e4m3fn)
    data, scale = (
        _bytes(rows, columns // 2, device=device).view(torch.int8),
        torch.full((rows, 1), 0.0005, device=device),
    )
    book = torch.linspace(-8, 8, 16, device=device)
    return W4A8Linear(data, relative, book, scale, 256, layer.bias, layer.weight.dtype)


def _gguf(layer: nn.Linear, kind: str) -> PackedLinear:
    (rows, columns), (numbers, size) = layer.weight.shape, BLOCKS[kind]
    data = _bytes(rows, columns // numbers, size, device=layer.weight.device)
    # Scales in fp16 that are small and finite.
    for at in {"Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}[kind]:
        data[:, :, at + 1] = 0x08
    return BlockLinear(data.flatten(1), kind, layer.bias, layer.weight.dtype)


FORMATS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bf16": lambda layer: layer,
    "fp8 (dtype)": Fp8Linear.of,
    "fp8": lambda layer: _float8(layer, True),
    "fp8, weight only": lambda layer: _float8(layer, False),
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
    "int8": lambda layer: _int8(layer, 0),
    "int8 ConvRot": lambda layer: _int8(layer, 256),
    "int8 ConvRot, weight only": lambda layer: _int8(layer, 256, True),
    "int4 ConvRot": _int4,
    "W4A8": _w4a8,
    "Q8_0": lambda layer: _gguf(layer, "Q8_0"),
    "Q4_K": lambda layer: _gguf(layer, "Q4_K"),
    "Q6_K": lambda layer: _gguf(layer, "Q6_K"),
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "models"])
    parser.add_argument("--sizes", default=",".join(SIZES), help="of layers: tokens x inputs x outputs")
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--formats", default=";".join(FORMATS))
    parser.add_argument("--ranks", default=",".join(str(n + 1) for n in range(torch.cuda.device_count() or 2)))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    args.formats = args.formats.split(";")
    print(f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}\n")
    if args.what == "layers":
        layers(args)
    else:
        models(args)


def layers(args: argparse.Namespace) -> None:
    """Microseconds of a layer, in a row for each format."""
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
    rows: dict[str, list[str]] = {}
    for tokens, inputs, outputs in sizes:
        x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
        plain = nn.Linear(inputs, outputs, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        with torch.inference_mode():
            bf16 = 0.0
            for name in args.formats:
                layer = FORMATS[name](plain)
                took = microseconds(lambda layer=layer, x=x: layer(x))  # type: ignore[misc]
                bf16 = took if name == "bf16" else bf16
                rows.setdefault(name, []).append(f"{took:.0f} ({took / bf16:.2f})" if bf16 else f"{took:.0f}")
            for name, kitchen in kitchens(plain, x).items():
                rows.setdefault(name, []).append(attempt(kitchen, bf16))
    print(f"| µs (and times bf16) | {' | '.join(args.sizes.split(','))} |\n|{' --- |' * (len(sizes) + 1)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(row)} |")


def kitchens(plain: nn.Linear, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What comfy-kitchen has of the same, if it is installed."""
    try:
        import comfy_kitchen
    except ImportError:
        return {}
    rotated, packed = FORMATS["int8 ConvRot"](plain), FORMATS["nvfp4"](plain)
    data, scale = rotated.data, rotated.scale

    def int8(rotation: bool) -> Tensor:
        out: Tensor = comfy_kitchen.int8_linear(x, data, scale, plain.bias, x.dtype, rotation, 256)
        return out

    def nvfp4() -> Tensor:
        weight = comfy_kitchen.dequantize_nvfp4(packed.data, packed.scale, packed.blocks, x.dtype)
        return functional.linear(x, weight, plain.bias)

    return {
        "comfy-kitchen, int8": lambda: int8(False),
        "comfy-kitchen, int8 ConvRot": lambda: int8(True),
        "comfy-kitchen, nvfp4": nvfp4,
    }


def attempt(kitchen: Callable[[], Tensor], bf16: float) -> str:
    """What comfy-kitchen takes; a dash where it refuses."""
    try:
        kitchen()
    except RuntimeError:
        return "–"
    # Some of its products can't be captured.
    took = microseconds(kitchen, graphs=False)
    return f"{took:.0f} ({took / bf16:.2f})"


def microseconds(call: Callable[[], object], graphs: bool = True) -> float:
    """The least of five means over so many calls, in a CUDA graph or as they come."""

    def calls() -> None:
        for _ in range(REPEATS):
            call()

    calls()
    torch.cuda.synchronize()
    run: Callable[[], object] = calls
    if graphs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        run = graph.replay
    took: list[float] = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) / REPEATS * 1000)
    return min(took[1:])


def models(args: argparse.Namespace) -> None:
    """Milliseconds of a forward at 1024² and bytes of the weights, in a row for each format."""
    os.environ.update(ON_GPUS)
    counts = list(map(int, args.ranks.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            multiprocessing.spawn(rank_main, (args, count, folder), count)  # type: ignore[attr-defined,no-untyped-call]
        for name in args.models.split(","):
            found = {count: json.loads(Path(folder, f"{name}.{count}.json").read_text()) for count in counts}
            heads = [f"{name}, 1024²", "weights, GiB", *(f"{n} GPU{'s' * (n > 1)}, ms" for n in counts)]
            print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
            for kind in args.formats:
                row = [kind, f"{found[counts[0]][kind]['bytes'] / 2**30:.2f}"]
                for count in counts:
                    ms, plain = (found[count][each]["ms"] for each in (kind, args.formats[0]))
                    row.append(f"{ms:.1f} ({ms / plain:.2f})")
                print(f"| {' | '.join(row)} |")


def rank_main(rank: int, args: argparse.Namespace, count: int, folder: str) -> None:
    """One rank's life; rank 0 keeps what is found."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    make_group = process_groups.join(device, rank, count, f"{folder}/rendezvous{count}", local_rank=rank if cuda else 0)
    forwards = Forwards(Topology(rank, count, make_group, reach if cuda else None))
    dtype, side = (torch.bfloat16, 1024) if cuda else (torch.float32, 256)
    with torch.inference_mode():
        for name in args.models.split(","):
            found = {}
            for kind in args.formats:
                model = packed(build(name, device, dtype), kind)
                inputs = model.prepare(make_inputs(name, model, Size(side, side), device))
                shape = Shape(model.heads, model.width, inputs.batch, model.lengths(inputs))
                call = Call(model, make_plan(AUTO, count, shape), inputs)
                ms = times_of(lambda call=call: forwards(call), args.rounds)  # type: ignore[misc]
                found[kind] = {"ms": ms, "bytes": weight_bytes(model)}
                if rank == 0:
                    print(f"{name}, {kind}, on {count}: {ms:.1f} ms, {call.plan}", flush=True)
                forwards.clear()
                del model, call, inputs
                if cuda:
                    torch.cuda.empty_cache()
            if rank == 0:
                Path(folder, f"{name}.{count}.json").write_text(json.dumps(found))
    process_groups.leave()


def packed(model: DiT, kind: str) -> DiT:
    """A model with its large layers in blocks packed, one after the other."""
    for name, parent in list(model.named_modules()):
        for leaf, layer in list(parent.named_children()):
            large = isinstance(layer, nn.Linear) and min(layer.weight.shape) >= FEWEST
            if large and "mod" not in f"{name}.{leaf}" and any(part.isdigit() for part in name.split(".")):
                setattr(parent, leaf, FORMATS[kind](layer))
    return model


if __name__ == "__main__":
    main()
