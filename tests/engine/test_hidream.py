"""What only HiDream knows: its mixture of experts, the text of each block, pictures to edit, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, assert_same_model, in_diffusers, read_golden, relative_error
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.rank.families import detect, from_diffusers
from tacod.rank.families.hidream import Experts, HiDream
from tacod.rank.families.inputs import Inputs
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.load import load_model
from tacod_client.errors import ArgumentError, ModelUnsupported

TINY = dict(HiDream.tiny)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(config: dict[str, Any] = TINY) -> HiDream:
    return HiDream(config).eval().requires_grad_(False)


def inputs(height: int = 6, width: int = 8, picture: int = 0) -> dict[str, Any]:
    given = {
        "x": torch.randn(2, 4, height, width),
        "timestep": torch.tensor([737.0, 200.0]),
        "context": torch.randn(2, 5, 24),
        "encoder_hidden_states_llama3": torch.randn(2, 3, 7, 16),
        "y": torch.randn(2, 8),
    }
    return {**given, "image_cond": torch.randn(2, 4, height, picture)} if picture else given


def forward(model: HiDream, given: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        out = model.run(SequenceParallel(), Inputs(given, model.arguments()))
    assert isinstance(out, Tensor)
    return out


# --- files ------------------------------------------------------------------------------------------------------------

I1 = {
    "image_model": "hidream",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "axes_dims_rope": [64, 32, 32],
    "caption_channels": [4096, 4096],
    "text_emb_dim": 2048,
    "llama_layers": [*range(32), *[31] * 16],
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "num_layers": 16,
    "num_single_layers": 32,
    "expert_width": 6912,
    "shared_width": 3584,
}
PARAMETERS = 17_105_733_184
"""As ComfyUI's own network counts them at these sizes."""


def header(model: HiDream) -> dict[str, TensorInfo]:
    return {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


def test_the_published_model_is_detected() -> None:
    """From the header alone; what ComfyUI's own detection gives, and the widths of the experts."""
    with torch.device("meta"):
        model = HiDream({key: value for key, value in I1.items() if not key.endswith("_width")})
    tensors = header(model)
    shapes = {
        "double_stream_blocks.15.block.adaLN_modulation.1.weight": (30720, 2560),
        "double_stream_blocks.15.block.attn1.q_rms_norm_t.weight": (2560,),
        "double_stream_blocks.15.block.ff_t.w1.weight": (6912, 2560),
        "single_stream_blocks.31.block.ff_i.experts.3.w2.weight": (2560, 6912),
        "single_stream_blocks.31.block.ff_i.shared_experts.w3.weight": (3584, 2560),
        "single_stream_blocks.31.block.ff_i.gate.weight": (4, 2560),
        "caption_projection.48.linear.weight": (2560, 4096),
        "p_embedder.pooled_embedder.linear_1.weight": (2560, 2048),
        "final_layer.linear.weight": (64, 2560),
    }
    assert {name: tensors[name].shape for name in shapes} == shapes
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == PARAMETERS
    assert detect(tensors) == (HiDream, I1)


@pytest.mark.parametrize("missing", ["final_layer.linear.weight", "caption_projection.4.linear.weight"])
def test_an_incomplete_file_is_refused_by_the_missing_tensor(missing: str) -> None:
    tensors = header(made())
    del tensors[missing]
    with pytest.raises(ModelUnsupported, match=missing):
        detect(tensors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", 1),
        ("axes_dims_rope", [8, 4, 2]),
        ("axes_dims_rope", [8, 8]),
        ("llama_layers", [0, 1, 2]),
        ("llama_layers", [0, 1, 2, -1]),
        ("llama_layers", None),
        ("caption_channels", [24]),
        ("caption_channels", [24, 0]),
        ("num_routed_experts", 0),
        ("num_activated_experts", 5),
        ("num_attention_heads", "3"),
        ("expert_width", 0),
    ],
)
def test_an_impossible_configuration_is_refused_by_its_key(key: str, value: Any) -> None:
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=f"'{key}'"):
        HiDream({**TINY, key: value})


def test_a_diffusers_folder_is_the_same_model(tmp_path: Path) -> None:
    """The class's own names and widths; what shapes don't tell is in its config.json."""
    diffusers = pytest.importorskip("diffusers")
    told = {
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "axes_dims_rope": [8, 4, 4],
        "llama_layers": [0, 1, 2, 2],
        "num_layers": 2,
        "num_single_layers": 2,
        "patch_size": 2,
        "in_channels": 4,
        "caption_channels": [24, 16],
        "text_emb_dim": 8,
    }
    theirs = diffusers.HiDreamImageTransformer2DModel(**told)
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    ours = made({key: value for key, value in TINY.items() if not key.endswith("_width")})
    weights = in_diffusers(ours)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "HiDreamImageTransformer2DModel", **told}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(read_checkpoint(str(tmp_path)), torch.float32, torch.device("cpu"))
    assert isinstance(loaded, HiDream)
    given = inputs()
    assert_same_model(loaded, ours, forward(loaded, given), forward(ours, given))
    with pytest.raises(ModelUnsupported, match=r"config\.json: patch_size is 1"):
        from_diffusers("here", {**config, "patch_size": 1}, {})


# --- forwards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [1, 2, 4])
def test_each_token_goes_to_the_likeliest_experts(active: int) -> None:
    """By every expert on every token; probabilities of those that are chosen don't sum to 1."""
    experts = Experts(48, 4, active, 32, 16).requires_grad_(False)
    x = torch.randn(2, 9, 48)
    probabilities = functional.linear(x, experts.get_parameter("gate.weight")).softmax(-1)
    least = probabilities.sort(dim=-1).values[..., -active, None]
    kept = torch.where(probabilities >= least, probabilities, 0.0)
    every = torch.stack([expert(x) for expert in experts.experts], dim=-1)
    expected = (every * kept[..., None, :]).sum(-1) + experts.shared_experts(x)
    assert relative_error(experts(x), expected) <= FP32
    assert experts(x[:, :0]).shape == (2, 0, 48)


def test_each_block_has_a_text_of_its_own() -> None:
    """A layer's states that no block asks for change nothing; those of each that does do."""
    model, given = made({**TINY, "llama_layers": [0, 1, 3, 3]}), inputs()
    states = torch.randn(2, 4, 7, 16)
    out = forward(model, {**given, "encoder_hidden_states_llama3": states})
    for layer in range(4):
        changed = states.clone()
        changed[:, layer] += 1
        other = forward(model, {**given, "encoder_hidden_states_llama3": changed})
        assert torch.equal(other, out) == (layer == 2)


def test_too_few_layers_of_states_are_refused() -> None:
    golden = read_golden("hidream")
    states = golden.inputs["encoder_hidden_states_llama3"][:, :2]
    golden.inputs["encoder_hidden_states_llama3"] = states
    with pytest.raises(ArgumentError, match=r"^encoder_hidden_states_llama3: expected shape \[B, 3, M, 28\]"):
        golden.arguments(golden.model())


def test_a_picture_stands_on_the_right_of_the_image() -> None:
    """Its tokens are the image's, so what is given beside an image is as good as a wider image's right part."""
    model, given = made(), inputs(6, 7, picture=5)
    wide = {**given, "x": torch.cat((given["x"], given.pop("image_cond")), dim=-1)}
    del wide["image_cond"]
    given["image_cond"] = wide["x"][..., 7:]
    out = forward(model, given)
    assert out.shape == given["x"].shape
    assert torch.equal(out, forward(model, wide)[..., :7])
    assert model.lengths(given) == (7, 5 + 7, 3 * 6)
    assert model.lengths({**given, "image_cond": None}) == (7, 5 + 7, 3 * 4)


def test_no_graph_is_captured_where_the_host_counts_tokens() -> None:
    """On a CPU, as nothing runs without the host there; on a GPU a kernel counts."""
    assert not made().graphs


def test_timesteps_have_comfyuis_scale() -> None:
    assert made().timestep(torch.tensor([0.25])) == 250
