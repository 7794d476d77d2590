"""Packed layers on a GPU: the kernels against the layers' own arithmetic, and whole models through the daemon."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import Daemon, quantized_golden_names, read_golden, relative_error
from packed_layers import FILES, Golden, layers

from tacod.checkpoint.header import BLOCKS
from tacod.rank.ops.packed import kitchen
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.ops.packed.float8 import Float8Linear, quantize_float8
from tacod.rank.ops.packed.fp8 import Fp8Linear
from tacod.rank.ops.packed.integers import Int4Linear, Int8Linear, IntegerLinear, W4A8Linear, quantize_tokens
from tacod.rank.ops.packed.rotation import rotate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]

WORLDS = [count for count in (1, 2, 3, 4) if count <= torch.cuda.device_count()]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 768, 40), (77, 256, 24), (300, 1280, 520), (40, 256, 20)]
FLOATS = ("z_image_fp8",)
"""Models whose activations are quantized on a GPU, and not on a CPU."""
MIXED = ("wan21_t2v_mixed",)
"""Models of which some layers' activations are quantized on both, and others' on a GPU only."""


@pytest.fixture(scope="module", params=WORLDS, ids=lambda count: f"{count}gpu")
def gpu_daemon(request: pytest.FixtureRequest, models: Path) -> Iterator[Daemon]:
    with Daemon(roots=[models], gpus=request.param) as daemon:
        yield daemon


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", layers(torch.float32))
@torch.inference_mode()
def test_kernels_unpack_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    layer = layers(dtype)[name].cuda()
    found, wanted = layer.unpacked_by_kernel(dtype), layer.numbers(slice(None), dtype)
    assert found is not None
    if isinstance(layer, IntegerLinear) and layer.group:
        # A rotation's sums have another order.
        assert relative_error(found, wanted) <= (1e-6 if dtype == torch.float32 else 4e-3)
    else:
        assert torch.equal(found, wanted)
    if isinstance(layer, Int4Linear | W4A8Linear):
        whole = layer.factor_by_kernel()
        assert whole is not None
        assert torch.equal(whole, layer.whole(slice(None)))


@pytest.mark.parametrize("rows", [slice(1, 6), slice(3, 4)], ids=["1-6", "3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
@torch.inference_mode()
def test_kernels_unpack_blocks_from_any_byte_on(kind: str, dtype: torch.dtype, rows: slice) -> None:
    """Rows of layers that are split: most are aligned to no more than two bytes."""
    layer = layers(dtype)[kind].cuda()
    assert torch.equal(layer.outputs(rows).unpacked_by_kernel(dtype), layer.numbers(rows, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@torch.inference_mode()
def test_kernels_quantize_to_the_same_floats(dtype: torch.dtype, target: torch.dtype) -> None:
    x, scale = (torch.randn(300, 500) * 300).to(dtype), torch.tensor(0.7)
    found = quantize_float8(x.cuda(), scale.cuda(), target).cpu()
    assert torch.equal(found.view(torch.uint8), quantize_float8(x, scale, target).view(torch.uint8))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("native", [False, True], ids=["by row", "one scale"])
@torch.inference_mode()
def test_fp8_of_any_number_of_tokens(native: bool, bias: bool) -> None:
    """A rank's share of a short text too: cuBLAS refuses some products of few tokens and many inputs."""
    plain = torch.nn.Linear(12288, 1024, bias=bias, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    layer: PackedLinear = Fp8Linear.of(plain)
    if native:
        scale = plain.weight.abs().amax().float() / 448
        layer = Float8Linear(
            (plain.weight / scale).to(torch.float8_e4m3fn), plain.bias, torch.bfloat16, scale, None, True
        )
    x = torch.randn(129, 12288, device="cuda", dtype=torch.bfloat16)
    exact = copy.deepcopy(plain).double()(x.double())
    for tokens in (0, 1, 2, 25, 33, 48, 64, 127, 128, 129):
        out = layer(x[:tokens])
        assert out.shape == (tokens, 1024)
        if tokens:
            assert relative_error(out, exact[:tokens]) <= 6e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "int8, rotated", "e4m3"])
@torch.inference_mode()
def test_a_token_that_is_no_number_stays_so(kind: str, dtype: torch.dtype) -> None:
    """As on a CPU: no kernel makes a number of it, and the other tokens are as they were."""
    width, scale = 256, torch.tensor(0.1).cuda()
    data = torch.randint(-127, 128, (32, width), dtype=torch.int8).cuda()
    layer: PackedLinear = Int8Linear(data, width, scale, 256 if kind == "int8, rotated" else 0, None, dtype)
    if kind == "e4m3":
        layer = Float8Linear(data.float().to(torch.float8_e4m3fn), None, dtype, scale, native=True)
    x = torch.randn(2, 20, width).cuda().to(dtype)
    wanted = layer(x)
    x[1, 2, 3] = torch.nan
    found = layer(x)
    assert found[1, 2].isnan().all()
    found[1, 2] = wanted[1, 2]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [0, 16, 256])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(1, 768, 40), (77, 256, 24), (300, 1280, 520), (40, 256, 20)]
)
@torch.inference_mode()
def test_products_of_whole_numbers(
    tokens: int, inputs: int, outputs: int, group: int, dtype: torch.dtype, bias: bool
) -> None:
    """Against the exact product of what is quantized in fp32; as near as the operations one by one, or nearer."""
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs).cuda().to(dtype)
    data = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8).cuda()
    scale = (torch.rand(outputs, 1) * 1e-3).cuda()
    added = torch.nn.Parameter(torch.randn(outputs).cuda().to(dtype)) if bias else None
    layer = Int8Linear(data, inputs, scale, group, added, dtype)
    quantized, scales = quantize_tokens(rotate(x.float(), group) if group else x.float())
    exact = (quantized.double() @ data.double().t()) * scales.double() * scale.double().t()
    exact = exact if added is None else exact + added.double()
    found = layer(x)
    assert found.dtype == dtype
    with torch.inference_mode(False), torch.enable_grad():
        plain = layer(x.clone())
    error = relative_error(found, exact)
    if dtype == torch.bfloat16:
        assert error <= relative_error(plain, exact)
    else:
        # The sums of a rotation have another order, and a last bit may move an activation by a step.
        assert error <= (1e-3 if group else 2e-6)


@pytest.mark.parametrize("group", [0, 16, 256])
@torch.inference_mode()
def test_products_by_comfy_kitchen(group: int) -> None:
    """What other GPUs than Hopper's use, if it is installed."""
    pytest.importorskip("comfy_kitchen")
    x = torch.randn(300, 768).cuda().to(torch.bfloat16)
    data = torch.randint(-127, 128, (512, 768), dtype=torch.int8).cuda()
    if not kitchen.takes(data):
        pytest.skip("comfy-kitchen has no kernels for this GPU or this CUDA")
    layer = Int8Linear(data, 768, (torch.rand(512, 1) * 1e-3).cuda(), group, None, torch.bfloat16)
    found = kitchen.int8_linear(x, data, layer.scale, None, group)
    assert relative_error(found, layer(x)) <= 1.2e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FILES)
@torch.inference_mode()
def test_layers_of_comfyui(name: str, dtype: torch.dtype) -> None:
    """Near what ComfyUI's layers give: with quantized activations where this GPU has products for them."""
    golden, kind = Golden(name), "fp32" if dtype == torch.float32 else "bf16"
    for each in golden.packed:
        layer = golden.layer(each, dtype)
        fast = isinstance(layer, Float8Linear) and torch.cuda.get_device_capability() >= (8, 9)
        native = golden.tensors.get(f"golden.{each}.native_{kind}") if fast else None
        if native is not None:
            side = golden.tensors.get(f"{each}.input_scale")
            layer = Float8Linear(layer.data, layer.bias, dtype, layer.scale, side, native=True)
        if isinstance(layer, Int4Linear):
            layer.int4_activations = torch.cuda.get_device_capability()[0] == 8
            if not layer.int4_activations:
                continue
        found = layer.cuda()(golden[f"{each}.x"].cuda().to(dtype)).cpu()
        if isinstance(layer, IntegerLinear):
            # Nearer to what fp32 gives with the same quantized activations than ComfyUI's on a CPU.
            exact = golden[f"{each}.y_fp32"]
            bar = relative_error(golden[f"{each}.y_{kind}"], exact)
            assert relative_error(found, exact) <= max(bar, 2e-3), each
        else:
            wanted = golden[f"{each}.y_{kind}"] if native is None else native
            assert relative_error(found, wanted) <= (2e-6 if dtype == torch.float32 else 1e-2), each


@pytest.mark.parametrize("name", quantized_golden_names())
def test_whole_models(gpu_daemon: Daemon, models: Path, name: str) -> None:
    """As near to ComfyUI's as a CPU's, where a GPU's arithmetic is a CPU's; as one GPU's on several elsewhere."""
    golden = read_golden(name)
    golden.save(models / "packed.safetensors")
    everyone = {"sequence_parallel_degree": len(gpu_daemon.rank_pids())}
    with gpu_daemon.client() as client:
        alike = not name.endswith(FLOATS)
        model = client.load("packed.safetensors", dtype="fp32" if alike else "fp32_weight_only", plan=everyone)
        outs = [model.forward(**golden.inputs) for _ in range(4)]
        assert all(torch.equal(out, outs[0]) for out in outs[1:])
        # A last bit of the timestep's embedding differs from a CPU's, and moves other activations by a step of int8.
        assert relative_error(outs[0], golden.out) <= (2e-2 if name.endswith(MIXED) else max(1.5 * golden.fp32, 2e-5))
        native = client.load("packed.safetensors", dtype="bf16", plan=everyone)
        together = relative_error(native.forward(**golden.inputs), outs[0])
        one = client.load("packed.safetensors", dtype="bf16", plan={"sequence_parallel_degree": 1})
        alone = relative_error(one.forward(**golden.inputs), outs[0])
        # What bf16 rounds moves activations by steps of 8 bits, with several GPUs others than with one: as far.
        assert together <= 1.25 * alone + 2e-3
        assert alone <= (8e-2 if name.endswith(FLOATS) else 4e-2)
        assert model.quantization == native.quantization != {}
        for each in {model.id, native.id}:
            client.unload(each)
    assert "no CUDA graph" not in gpu_daemon.log
