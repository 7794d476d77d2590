"""Files of every format that ComfyUI keeps packed: through its loader with ours behind it, through ours, and sent.

ComfyUI's and comfy-kitchen's own functions pack them. The int formats round the inputs of their layers to steps, too. A
last bit of fp32 can turn one of those into another; so where layers follow each other the bar for them is a share of
what a reader is off that leaves inputs as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_graphs import FLUX, MODELS, Pair, TinyModel
from comfyui_server import PATH, PYTHON, ComfyUI, Outcome
from helpers import Daemon, relative_error
from image_cases import CASES as IMAGES
from image_cases import Sizes, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Both = Callable[..., Outcome]

EXACT = 1e-5
SHARE = 0.7
"""Of the error of a reader that leaves inputs as they are; ComfyUI's own order of summing comes to up to 0.4 of it."""
LORA = 0.1
"""How large a LoRA is beside the weights that it is added to."""
IMAGE_MODELS = {case.golden: case for case in IMAGES}


@dataclass(frozen=True)
class Packed:
    """A model, and how its layers are packed."""

    name: str
    model: str
    """One of `MODELS`, or a golden's of `image_cases`."""
    layers: dict[str, dict[str, Any]]
    """By a pattern that a layer's name matches: its format and that format's options, as `TestPack` takes them."""
    spelling: str = "tensors"
    steps: bool = False
    """Whether inputs are rounded to steps."""

    @property
    def formats(self) -> set[str]:
        """What ComfyUI has to know."""
        return {said["format"] for said in self.layers.values()}

    @property
    def file(self) -> str:
        """The packed file."""
        return f"{self.name}.safetensors"

    @property
    def exact(self) -> str:
        """A file of the weights that the packed ones come to, in fp32."""
        return f"{self.name}_unpacked.safetensors"

    @property
    def sizes(self) -> TinyModel:
        """What a graph asks of the model."""
        return MODELS.get(self.model) or Sizes(IMAGE_MODELS[self.model])  # type: ignore[return-value]

    @property
    def source(self) -> str:
        """The file that it is made of."""
        return MODELS[self.model].tiny.file if self.model in MODELS else IMAGE_MODELS[self.model].file


FP8 = {"format": "float8_e4m3fn"}
ROWS = {"format": "int8_tensorwise", "per_channel": True}


def rotated(size: int) -> dict[str, Any]:
    """Rows of int8, rotated in groups of this size."""
    return {**ROWS, "convrot": True, "convrot_groupsize": size}


Z_IMAGE = r"(layers|noise_refiner|context_refiner)\.\d\.(attention|feed_forward)\."
FLUX_BLOCKS = r"(double|single)_blocks\.\d\.(img_attn\.|txt_attn\.|img_mlp|txt_mlp|linear)"
# None in int8 with full_precision_matrix_mult: ComfyUI rounds its inputs in spite of it, and the daemon doesn't.
PACKED = [
    Packed("fp8_scaled", "z_image", {Z_IMAGE: FP8}),
    Packed(
        "fp8_mixed",
        "qwen_image",
        {
            r"transformer_blocks\.0\.attn\.": {**FP8, "input_scale": 0.02},
            r"transformer_blocks\.1\.img_mlp\.": {**FP8, "full_precision_matrix_mult": True},
            r"transformer_blocks\.1\.txt_mlp\.": {"format": "float8_e5m2"},
        },
        "metadata",
    ),
    Packed(
        "fp8_e5m2",
        "flux",
        {FLUX_BLOCKS: {"format": "float8_e5m2"}},
        "both",
    ),
    Packed("mxfp8", "chroma", {FLUX_BLOCKS: {"format": "mxfp8"}}),
    Packed(
        "nvfp4",
        "flux2_klein",
        {
            r"double_blocks\.": {"format": "nvfp4"},
            r"single_blocks\.0\.": {"format": "nvfp4", "input_scale": 0.004},
            r"single_blocks\.1\.linear1": {"format": "nvfp4", "pre_quant_scale": 0.5},
        },
    ),
    Packed(
        "int8_tensorwise",
        "qwen_image",
        {r"transformer_blocks\.\d\.(attn\.to_|img_mlp)": {"format": "int8_tensorwise"}},
        steps=True,
    ),
    Packed("int8_rowwise", "flux", {FLUX_BLOCKS: ROWS}, "metadata", steps=True),
    Packed(
        "int8_convrot",
        "krea2",
        {
            r"blocks\.0\.attn\.(wq|wk|wv)": rotated(16),
            r"blocks\.1\.mlp\.(gate|up)": rotated(16),
            r"blocks\.1\.mlp\.down": rotated(256),
        },
        steps=True,
    ),
    Packed(
        "int8_convrot_wide",
        "z_image",
        {
            r"layers\.1\.attention\.qkv": rotated(256),
            r"layers\.1\.feed_forward\.w2": rotated(64),
            r"context_refiner\.1\.feed_forward\.w1": rotated(16),
        },
        "both",
        steps=True,
    ),
    Packed(
        "convrot_w4a4",
        "z_image",
        {
            r"layers\.0\.attention\.": {"format": "convrot_w4a4", "convrot_groupsize": 256},
            r"layers\.1\.feed_forward\.w2": {"format": "convrot_w4a4", "convrot_groupsize": 64, "linear_dtype": "int8"},
        },
        steps=True,
    ),
    Packed(
        "asym_w4a8_int8",
        "krea2",
        {r"blocks\.\d\.(attn|mlp)\.": {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 16}},
        steps=True,
    ),
    Packed(
        "mixed",
        "krea2",
        {
            r"blocks\.0\.attn\.": {"format": "nvfp4"},
            r"blocks\.0\.mlp\.": {"format": "mxfp8"},
            r"blocks\.1\.attn\.": FP8,
            r"blocks\.1\.mlp\.down": {"format": "int8_tensorwise"},
        },
        steps=True,
    ),
]


@pytest.fixture(params=PACKED, ids=lambda packed: packed.name)
def packed(request: pytest.FixtureRequest, comfyui: ComfyUI, comfyui_models: Path) -> Packed:
    """A packed file where ComfyUI looks for it, with a LoRA of its packed layers."""
    packed: Packed = request.param
    pack(packed, comfyui, comfyui_models)
    return packed


def pack(packed: Packed, comfyui: ComfyUI, models: Path) -> None:
    """Have ComfyUI write the file, unless it is there; skip the test if it doesn't know the formats."""
    known = comfyui.nodes["TestPack"]["input"]["required"]["formats"][0]
    if not packed.formats <= set(known):
        pytest.skip(f"this version of ComfyUI has no {', '.join(sorted(packed.formats - set(known)))}")
    smoothed = any("pre_quant_scale" in said for said in packed.layers.values())
    if smoothed and "pre_quant_scale" not in Path(PATH, "comfy", "ops.py").read_text():
        pytest.skip("this version of ComfyUI leaves pre_quant_scale out of account")
    folder = models / "diffusion_models"
    if (folder / packed.file).exists():
        return
    if packed.model in IMAGE_MODELS:
        write(IMAGE_MODELS[packed.model], models)
    with safe_open(folder / packed.source, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    layers = {}
    for key, shape in shapes.items():
        layer = key.removesuffix(".weight")
        for pattern, said in packed.layers.items():
            if key.endswith(".weight") and len(shape) == 2 and re.match(pattern, layer):
                layers[layer] = said
    assert {pattern for pattern in packed.layers if any(re.match(pattern, layer) for layer in layers)} == {
        *packed.layers
    }
    made = {"unet_name": packed.source, "packed": packed.file, "unpacked": packed.exact, "spelling": packed.spelling}
    outcome = comfyui.run(
        {"pack": {"class_type": "TestPack", "inputs": {**made, "layers": json.dumps(layers), "formats": ""}}}
    )
    assert outcome.kind == "success", outcome.error
    (models / "loras").mkdir(exist_ok=True)
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in layers:
        outputs, inputs = shapes[f"{layer}.weight"]
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(outputs, 4, generator=random)
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = (
            LORA / inputs**0.5 * torch.randn(4, inputs, generator=random)
        )
    save_file(tensors, models / "loras" / packed.file)


def graph(packed: Packed, **endpoints: Any) -> Pair:
    """With the packed file."""
    run = Pair(packed.sizes, **endpoints)
    run.nodes["file"]["inputs"]["unet_name"] = packed.file
    return run


def sample(run: Pair) -> None:
    """One step without guidance: a step of int8 that jumps makes more of them in each layer behind it."""
    run.sample(steps=1, cfg=1.0)


def bar(packed: Packed, comfyui: ComfyUI) -> float:
    """How far a latent may be from stock ComfyUI's."""
    if not packed.steps:
        return EXACT
    errors = [latent(comfyui, packed, name) for name in (packed.file, packed.exact)]
    dequantized = relative_error(errors[1], errors[0])
    print(f"{packed.name}: weights alone {dequantized:.1e}")
    assert dequantized > 10 * EXACT
    return SHARE * dequantized


def latent(comfyui: ComfyUI, packed: Packed, file: str, lora: str = "") -> torch.Tensor:
    """What stock ComfyUI makes of a file."""
    run = graph(packed)
    run.nodes["file"]["inputs"]["unet_name"] = file
    if lora:
        run.on_model("LoraLoaderModelOnly", lora_name=lora, strength_model=1.0)
    sample(run)
    stock = {name: node for name, node in run.nodes.items() if not name.endswith("_taco")}
    outcome = comfyui.run(stock)
    assert outcome.kind == "success", outcome.error
    return comfyui.latent(run.file("stock"))


def shown(run: Pair) -> None:
    run.add("info", "TACODiTInfoDisplay", info="@loader#1")


def told(comfyui: ComfyUI, run: Pair) -> None:
    """Print how far each branch is."""
    stock = comfyui.latent(run.file("stock"))
    errors = {ranks: relative_error(comfyui.latent(run.file(branch)), stock) for branch, ranks in run.ranks.items()}
    print(", ".join(f"{ranks} ranks {error:.1e}" for ranks, error in errors.items()))


@pytest.mark.parametrize("loader", ["TACODiTModelLoader", "TACODiTUNETLoader"])
def test_read_by_the_daemon(
    comfyui: ComfyUI,
    both: Both,
    endpoints: Callable[[int], Daemon],
    comfyui_models: Path,
    packed: Packed,
    loader: str,
) -> None:
    most = bar(packed, comfyui)
    run = graph(packed, also={f"taco{ranks}": (ranks, endpoints(ranks).endpoint) for ranks in (1, 2)})
    run.load(loader, **({"unet_name": packed.file} if loader == "TACODiTUNETLoader" else {}))
    sample(run)
    shown(run)
    outcome = both(run, most=most)
    told(comfyui, run)
    path = (comfyui_models / "diffusion_models" / packed.file).resolve()
    assert f"Weights: read by the daemon from {path}" in outcome.texts["info"]
    assert "Quantized: " in outcome.texts["info"]


def test_sent(comfyui: ComfyUI, both: Both, comfyui_models: Path, tmp_path: Path, packed: Packed) -> None:
    """To a daemon that can't read the file: what arrives is the file, by what its tensors say."""
    most = bar(packed, comfyui)
    with Daemon(1, settings={"models.uploads": str(tmp_path)}) as far:
        run = graph(packed, endpoint=far.endpoint)
        run.ranks["taco"] = 1
        run.load()
        sample(run)
        shown(run)
        outcome = both(run, most=most)
    told(comfyui, run)
    assert "Weights: sent to " in outcome.texts["info"]
    (sent,) = tmp_path.glob("*.safetensors")
    check_same(sent, comfyui_models / "diffusion_models" / packed.file)


def check_same(sent: Path, written: Path) -> None:
    """All packed tensors as they were, and each layer's format said by a tensor."""
    theirs, ours = load_file(written), load_file(sent)
    with safe_open(written, framework="pt") as file:
        said = json.loads((file.metadata() or {}).get("_quantization_metadata", '{"layers": {}}'))["layers"]
    said |= {
        key.removesuffix(".comfy_quant"): note(theirs.pop(key)) for key in [*theirs] if key.endswith("comfy_quant")
    }
    assert said == {
        key.removesuffix(".comfy_quant"): note(ours.pop(key)) for key in [*ours] if key.endswith("comfy_quant")
    }
    # Networks have buffers of their own, and today's names of norms.
    beside = [key for key in theirs if key.rpartition(".")[0] in said]
    assert beside
    for key in beside:
        stored = theirs[key] if theirs[key].dtype.itemsize == 1 else theirs[key].to(ours[key].dtype)
        assert ours[key].shape == stored.shape
        assert torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (ours[key], stored))), key


def note(tensor: torch.Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_lora_is_nearer_to_the_exact_merge(comfyui: ComfyUI, packed: Packed, where: str) -> None:
    """That is of the weights that the packed ones come to, in fp32; ComfyUI packs the sum again, with noise."""
    exact = latent(comfyui, packed, packed.exact, packed.file)
    without = latent(comfyui, packed, packed.exact)
    run = graph(packed)
    if where == "after":
        run.load()
    run.on_model("LoraLoaderModelOnly", lora_name=packed.file, strength_model=1.0)
    if where == "before":
        run.load()
    sample(run)
    outcome = comfyui.run(run.nodes)
    assert outcome.kind == "success", outcome.error
    ours, theirs = (relative_error(comfyui.latent(run.file(branch)), exact) for branch in ("taco", "stock"))
    size = relative_error(without, exact)
    print(f"{packed.name}: LoRA {size:.1e}, ours {ours:.1e}, ComfyUI {theirs:.1e}")
    assert ours < theirs
    assert size > 2 * ours


# --- what tells one file from another ---------------------------------------------------------------------------------


CHANGED: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], None]]] = {}


def change(packed: str) -> Callable[[Callable[[dict[str, torch.Tensor]], None]], None]:
    """A file that differs from this packed one in nothing else."""

    def note(make: Callable[[dict[str, torch.Tensor]], None]) -> None:
        CHANGED[make.__name__.strip("_")] = packed, make

    return note


@change("int8_convrot_wide")
def _groups_of_another_size(tensors: dict[str, torch.Tensor]) -> None:
    said = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    tensors["layers.1.attention.qkv.comfy_quant"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


@change("fp8_scaled")
def _another_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.1.attention.out.weight_scale"] *= 2


@change("mxfp8")
def _a_scale_that_is_a_byte(tensors: dict[str, torch.Tensor]) -> None:
    tensors["double_blocks.1.img_mlp.0.weight_scale"][0, 0] ^= 1


@change("asym_w4a8_int8")
def _another_scale_of_a_row(tensors: dict[str, torch.Tensor]) -> None:
    tensors["blocks.0.mlp.up.weight_s_channel"][3] *= 1.5


@change("nvfp4")
def _inputs_of_another_scale(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["single_blocks.0.linear2.input_scale"]


@change("int8_rowwise")
def _other_bytes(tensors: dict[str, torch.Tensor]) -> None:
    tensors["double_blocks.0.txt_mlp.2.weight"][0, 1] ^= 3


@pytest.mark.parametrize("name", CHANGED)
def test_a_file_that_holds_other_weights(comfyui: ComfyUI, comfyui_models: Path, name: str) -> None:
    """A note on the MODEL leads to it, and the graph to the right one."""
    of, make = CHANGED[name]
    packed = next(each for each in PACKED if each.name == of)
    pack(packed, comfyui, comfyui_models)
    folder = comfyui_models / "diffusion_models"
    tensors = load_file(folder / packed.file)
    with safe_open(folder / packed.file, framework="pt") as file:
        metadata = dict(file.metadata())
    if packed.spelling == "both":
        del metadata["_quantization_metadata"]
    make(tensors)
    other = folder / f"{name}.safetensors"
    save_file(tensors, other, metadata=metadata)
    run = graph(packed)
    run.on_model("TestHints", paths=str(other))
    run.load()
    sample(run)
    shown(run)
    outcome = comfyui.run({key: node for key, node in run.nodes.items() if not key.endswith("_stock")})
    assert outcome.kind == "success", outcome.error
    assert f"Weights: read by the daemon from {(folder / packed.file).resolve()}" in outcome.texts["info"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def int8(comfyui: ComfyUI, comfyui_models: Path) -> Packed:
    """A Flux.1 in int8, whose file is there."""
    packed = next(each for each in PACKED if each.name == "int8_rowwise")
    pack(packed, comfyui, comfyui_models)
    return packed


@pytest.fixture
def spoilt(int8: Packed, comfyui_models: Path, tmp_path: Path) -> str:
    """A file of its own: what a test does to its MODEL stays on it."""
    folder = comfyui_models / "diffusion_models"
    name = f"{tmp_path.name}.safetensors"
    (folder / name).write_bytes((folder / int8.file).read_bytes())
    return name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"layout": "ForeignLayout"},
            "double_blocks.0.img_attn.qkv.weight, quantized as ForeignLayout: the daemon reads float8_e4m3fn",
        ),
        ({"says": "awq_w4a16"}, "layer double_blocks.0.img_attn.qkv in format 'awq_w4a16': the daemon reads"),
        (
            {"says": "nvfp4"},
            "double_blocks.0.img_attn.qkv.weight, quantized as TensorWiseINT8Layout in a layer of format 'nvfp4'",
        ),
    ],
    ids=["a layout", "a format", "a layout of another format"],
)
def test_what_nobody_knows_is_refused(
    comfyui: ComfyUI, int8: Packed, spoilt: str, changes: dict[str, str], named: str
) -> None:
    run = graph(int8)
    run.nodes["file"]["inputs"]["unet_name"] = spoilt
    inputs = {"layer": "double_blocks.0.img_attn.qkv", "says": "", "layout": "", **changes}
    run.on_model("TestLayout", **inputs)
    run.load()
    sample(run)
    outcome = comfyui.run({name: node for name, node in run.nodes.items() if not name.endswith("_stock")})
    assert outcome.kind == "error"
    assert outcome.error.startswith(f"TACO-DiT can't honour {named}")


@pytest.mark.parametrize("where", ["before", "after"])
def test_another_compute_dtype_is_refused(comfyui: ComfyUI, int8: Packed, where: str) -> None:
    """ComfyUI then leaves the inputs of quantized layers as they are."""
    run = graph(int8)
    if where == "after":
        run.load()
    run.on_model("ModelComputeDtype", dtype="fp32")
    if where == "before":
        run.load()
    sample(run)
    outcome = comfyui.run({name: node for name, node in run.nodes.items() if not name.endswith("_stock")})
    assert outcome.kind == "error"
    assert outcome.error.startswith("TACO-DiT can't honour ModelComputeDtype with layers in int8_tensorwise")


def test_a_note_that_is_no_json(comfyui: ComfyUI, int8: Packed, comfyui_models: Path) -> None:
    folder = comfyui_models / "diffusion_models"
    tensors = load_file(folder / int8.file)
    tensors["double_blocks.0.img_attn.qkv.comfy_quant"] = torch.tensor(list(b"int8"), dtype=torch.uint8)
    save_file(tensors, folder / "no_json.safetensors", metadata={"tacod.config": json.dumps(FLUX.tiny.config)})
    run = Pair(FLUX)
    run.load("TACODiTUNETLoader", unet_name="no_json.safetensors")
    sample(run)
    outcome = comfyui.run({name: node for name, node in run.nodes.items() if not name.endswith("_stock")})
    assert outcome.kind == "error"
    assert re.match(
        r"TACO-DiT: .*/no_json\.safetensors: double_blocks\.0\.img_attn\.qkv\.comfy_quant is not JSON", outcome.error
    )


def test_a_controlnet_that_copies_a_packed_layer(comfyui: ComfyUI, comfyui_models: Path) -> None:
    packed = Packed("packed_embedder", "sd3", {r"y_embedder\.mlp\.": FP8})
    pack(packed, comfyui, comfyui_models)
    run = graph(packed)
    run.add("net", "TestControlNet", sort="sd35", config=json.dumps(packed.sizes.tiny.config))
    run.add("image", "TestImage", height=112, width=128)
    run.add("vae", "TestImageVAE", channels=16)
    given = {"control_net": "@net", "image": "@image", "vae": "@vae", "positive": "@positive", "negative": "@negative"}
    run.add("led", "ControlNetApplyAdvanced", strength=0.9, start_percent=0.0, end_percent=1.0, **given)
    run.load()
    run.sample(steps=1, positive="@led", negative="@led#1")
    outcome = comfyui.run({name: node for name, node in run.nodes.items() if not name.endswith("_stock")})
    assert outcome.kind == "error"
    assert outcome.error.startswith("TACO-DiT can't honour a ControlNet that copies y_embedder, which is quantized")


def test_inputs_that_comfyui_would_round_are_said(comfyui_models: Path, tmp_path: Path) -> None:
    """As on a card that multiplies in fp8."""
    with (
        Daemon(1, [comfyui_models], settings={"models.uploads": str(tmp_path)}) as taking,
        ComfyUI(PATH, PYTHON, taking.endpoint, comfyui_models, "--supports-fp8-compute") as comfyui,
    ):
        run = Pair(FLUX)
        run.nodes["file"]["inputs"]["weight_dtype"] = "fp8_e4m3fn_fast"
        run.load()
        shown(run)
        outcome = comfyui.run({name: run.nodes[name] for name in ("file", "loader", "info")})
    assert outcome.kind == "success", outcome.error
    assert "Note: the daemon leaves the inputs of fp8 weights as they are" in outcome.texts["info"]
