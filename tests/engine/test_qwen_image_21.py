"""What Qwen-Image-2.1 alone does, and the same forward in plain PyTorch, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FP32, read_golden, relative_error
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, scaled_dot_product_attention, silu

from tacod.checkpoint import TensorInfo
from tacod.rank.arguments import check_arguments
from tacod.rank.families import detect
from tacod.rank.families.qwen_image_21 import QwenImage21
from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client.errors import ArgumentError, ModelUnsupported
from tacod_client.tensors import to_wire

TINY = dict(QwenImage21.tiny)
WIDTH, HEADS, AXES = 48, 3, [4, 6, 6]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(**config: Any) -> QwenImage21:
    """A model whose parameters are all random."""
    model = QwenImage21({**TINY, **config}).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.normal_(0, 0.3)
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def inputs(
    side: tuple[int, int] = (5, 6), references: tuple[tuple[int, int], ...] = (), batch: int = 2, **more: Any
) -> dict[str, Any]:
    given = {
        "x": torch.randn(batch, 16, *side),
        "timestep": torch.linspace(0.9, 0.3, batch),
        "context": torch.randn(batch, 7, 32),
        **more,
    }
    if references:
        given["ref_latents"] = [torch.randn(batch, 16, *each) for each in references]
    return given


def forward(model: QwenImage21, arguments: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(SequenceParallel(), **arguments)
    return out


# --- the same forward in plain PyTorch --------------------------------------------------------------------------------


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """``x`` [B, S, H, D], of tokens at ``positions`` [S, 3], as complex numbers."""
    angles = torch.cat(
        [
            positions[:, axis, None].double() / 10000 ** (torch.arange(0, width, 2).double() / width)
            for axis, width in enumerate(AXES)
        ],
        dim=-1,
    )
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turns).flatten(-2).float()


def plain(model: QwenImage21, given: dict[str, Any]) -> Tensor:
    """One sequence of all tokens, with a dense mask."""
    w = model.state_dict()
    x, context = given["x"], given["context"]
    height, width = x.shape[-2:]
    normed = rms_norm(context, context.shape[-1:], 1 + w["txt_in.text_norm.weight"], 1e-6)
    text = linear(gelu(linear(normed, w["txt_in.in_layer.weight"]), approximate="tanh"), w["txt_in.out_layer.weight"])
    slots = (list(given.get("image_slots", ())) + [text.shape[1]] * 9)[: len(given.get("ref_latents", ()))]
    tokens, positions, images, place = [], [], [], 0
    pictures = [*zip(slots, given.get("ref_latents", ()), strict=True), (text.shape[1], x)]
    for at in range(text.shape[1] + 1):
        for number, (slot, picture) in enumerate(pictures):
            if slot != at:
                continue
            rows, columns = picture.shape[-2:]
            for row in range(rows):
                for column in range(columns):
                    tokens.append(linear(picture[:, :, row, column], w["img_in.weight"]))
                    middle = (rows - rows // 2, columns - columns // 2)
                    off = (rows % 2 - height % 2) / 2, (columns % 2 - width % 2) / 2
                    positions.append([place, row - middle[0] + off[0], column - middle[1] + off[1]])
                    images.append(number)
            place += max(rows, columns)
        if at < text.shape[1]:
            tokens.append(text[:, at])
            positions.append([place] * 3)
            images.append(-1)
            place += 1
    h, where, owner = torch.stack(tokens, dim=1), torch.tensor(positions), torch.tensor(images)
    count = height * width
    seen = torch.ones(len(where), len(where)).tril().bool() | ((owner[:, None] == owner) & (owner >= 0))

    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
    times = torch.stack((given["timestep"] * 1000 / 1000, torch.zeros(len(x))), dim=1)
    angles = 1000 * times[..., None] * frequencies
    embedder = "time_text_embed.timestep_embedder.linear_"
    vectors = linear(torch.cat((angles.cos(), angles.sin()), dim=-1), w[f"{embedder}1.weight"])
    vectors = silu(linear(silu(vectors), w[f"{embedder}2.weight"]))
    rows = torch.ones(len(where), dtype=torch.long)
    rows[-count:] = 0
    scale, gate, mlp_scale, mlp_gate = linear(vectors, w["modulation.1.weight"])[:, rows].chunk(4, dim=-1)
    for n in range(2):
        block = f"transformer_blocks.{n}."
        normed = layer_norm(h, (WIDTH,), eps=1e-6) * (1 + scale)
        q, k, v = (linear(normed, w[f"{block}attn.to_{each}.weight"]).unflatten(-1, (HEADS, -1)) for each in "qkv")
        q, k = (
            rotated(rms_norm(each, each.shape[-1:], w[f"{block}attn.norm_{name}.weight"], 1e-6), where)
            for name, each in (("q", q), ("k", k))
        )
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        attended = scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)
        h = h + gate.tanh() * linear(attended, w[f"{block}attn.to_out.0.weight"])
        normed = layer_norm(h, (WIDTH,), eps=1e-6) * (1 + mlp_scale)
        if f"{block}img_mlp.gate_up.weight" in w:
            opened, hidden = linear(normed, w[f"{block}img_mlp.gate_up.weight"]).chunk(2, dim=-1)
        else:
            opened, hidden = (linear(normed, w[f"{block}img_mlp.{name}.weight"]) for name in ("gate_layer", "proj"))
        h = h + mlp_gate.tanh() * linear(silu(opened) * hidden, w[f"{block}img_mlp.out.weight"])
    scale = linear(vectors[:, :1], w["norm_out.linear.weight"])
    out = linear(layer_norm(h[:, -count:], (WIDTH,), eps=1e-6) * (1 + scale), w["proj_out.weight"])
    return out.transpose(1, 2).unflatten(2, (height, width))


CASES = {
    "text alone": {},
    "one reference at the end": {"references": ((4, 6),)},
    "slots": {"references": ((4, 6), (3, 3)), "image_slots": [2, 5]},
    "two at one place, without text before them": {"references": ((2, 3), (5, 1)), "image_slots": [0, 0]},
    "the last slots left out": {"references": ((2, 3), (5, 1), (1, 1)), "image_slots": [4]},
    "slots to spare": {"references": ((2, 3),), "image_slots": [3, 6]},
    "slots of nothing": {"image_slots": [3, 6]},
    "other parities": {"side": (6, 3), "references": ((3, 4), (4, 3)), "image_slots": [1, 7]},
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_pytorch(case: str, fused: bool) -> None:
    model, given = made(fused_mlp=fused), inputs(**CASES[case])  # type: ignore[arg-type]
    with torch.inference_mode():
        expected = plain(model, given)
    assert relative_error(forward(model, given), expected) <= FP32


# --- files ------------------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, Any] = {
    "image_model": "qwen_image21",
    "in_channels": 64,
    "out_channels": 64,
    "num_layers": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 32,
    "context_in_dim": 4096,
    "mlp_ratio": 3,
}
SHAPES = {
    "img_in.weight": (4096, 64),
    "modulation.1.weight": (16384, 4096),
    "transformer_blocks.31.attn.to_q.weight": (4096, 4096),
    "transformer_blocks.31.attn.norm_k.weight": (128,),
    "transformer_blocks.31.img_mlp.out.weight": (4096, 12288),
    "txt_in.text_norm.weight": (4096,),
    "proj_out.weight": (64, 4096),
}
MLP = {
    True: {"transformer_blocks.0.img_mlp.gate_up.weight": (24576, 4096)},
    False: {"transformer_blocks.0.img_mlp.gate_layer.weight": (12288, 4096)},
}


@pytest.mark.parametrize("fused", [True, False])
def test_the_published_files_are_detected(fused: bool) -> None:
    config = {**PUBLISHED, "fused_mlp": fused}
    with torch.device("meta"):
        model = QwenImage21(config)
    tensors = {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    shapes = {**SHAPES, **MLP[fused]}
    assert {key: tensors[key].shape for key in shapes} == shapes
    assert detect(tensors) == (QwenImage21, config)
    assert model.axes == [16, 56, 56]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"axes_dims_rope": [4, 6, 4]}, "axes_dims_rope"),
        ({"attention_head_dim": 64, "axes_dims_rope": [16, 56, 56]}, "axes_dims_rope"),
        ({"eps": 1e-5}, "eps"),
        ({"causal_condition": False}, "causal_condition"),
        ({"fused_mlp": 1}, "fused_mlp"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
    ],
)
def test_a_configuration_that_can_not_be_is_refused_by_its_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelUnsupported, match=f"config key '{key}'"):
        QwenImage21({**TINY, **change})


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [[5, 2], [8], [-1], [1.0], 3])
def test_slots_that_can_not_be_are_refused(slots: Any) -> None:
    given = inputs(references=((2, 2), (2, 2)))
    sent = {name: to_wire(value, name) for name, value in given.items() if isinstance(value, Tensor)}
    with pytest.raises(ArgumentError, match=r"^image_slots: .*from 0 to L, which is 7 by context"):
        check_arguments({**sent, "image_slots": slots}, made().arguments(), "qwen_image_21")


def test_the_time_is_rounded_to_the_compute_dtype() -> None:
    """As the authors have it: in bf16 two times that are one there give one image."""
    golden = read_golden("qwen_image_21")
    model = golden.model(torch.bfloat16)
    given = {name: value.to(torch.bfloat16) for name, value in golden.inputs.items()}
    near = [torch.full((2,), time) for time in (0.7, 0.7001)]
    outs = [forward(model, {**given, "timestep": each}) for each in near]
    assert torch.equal(*outs)
    whole = golden.model()
    outs = [forward(whole, {**golden.inputs, "timestep": each}) for each in near]
    assert not torch.equal(*outs)
    assert torch.equal(whole.timestep(near[0]), near[0])


@pytest.mark.parametrize("name", ["qwen_image_21", "qwen_image_21_edit"])
def test_in_bf16_all_but_the_rounded_time_is_near(name: str) -> None:
    """The rounding alone is what the golden's metadata says of bf16, and the rest is as near as in other families."""
    golden = read_golden(name)
    given, time = golden.inputs, golden.inputs["timestep"]
    rounded = ((time * 1000).bfloat16() / 1000).bfloat16().float()
    exact = forward(golden.model(), {**given, "timestep": rounded})
    moved = relative_error(exact, golden.out)
    assert 0.04 < moved < golden.bf16 < 1.2 * moved
    sent = {**given, "x": given["x"].bfloat16(), "context": given["context"].bfloat16()}
    if "ref_latents" in given:
        sent["ref_latents"] = [each.bfloat16() for each in given["ref_latents"]]
    assert relative_error(forward(golden.model(torch.bfloat16), sent), exact) <= 1e-2


def test_latents_are_those_of_its_own_vae() -> None:
    """By the means and deviations of the first and the last channel."""
    latents = QwenImage21.latent_format
    latent = torch.ones(1, 64, 2, 2)
    inside = latents.into_model(latent)
    torch.testing.assert_close(inside[0, 0], torch.full((2, 2), (1 - 0.5126) / 3.2001))
    torch.testing.assert_close(inside[0, 63], torch.full((2, 2), (1 - 0.0304) / 3.8161))
    torch.testing.assert_close(latents.out_of_model(inside), latent)
