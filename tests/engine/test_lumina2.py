"""What Z-Image and Lumina 2 alone do: pads, references, a pooled text, and diffusers' two classes for them."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import in_diffusers, relative_error
from safetensors.torch import save_file
from torch import Tensor

from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.rank.arguments import check_arguments
from tacod.rank.families import detect, from_diffusers
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.lumina2 import Lumina2
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.load import load_model
from tacod_client.errors import ArgumentError, ModelUnsupported
from tacod_client.tensors import to_wire

OMNI: dict[str, Any] = {**Lumina2.tiny, "pad_tokens_multiple": 8}
Z_IMAGE: dict[str, Any] = {key: value for key, value in OMNI.items() if key != "siglip_feat_dim"}
LUMINA: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 4,
    "dim": 48,
    "cap_feat_dim": 16,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 6,
    "n_kv_heads": 2,
    "axes_dims": [2, 2, 4],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 2.0,
    "multiple_of": 32,
}
NEWBIE: dict[str, Any] = {**LUMINA, "clip_text_dim": 20}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def make(config: dict[str, Any]) -> Lumina2:
    return Lumina2(config).eval().requires_grad_(False)


def inputs(batch: int = 2, height: int = 6, width: int = 5, text: int = 3) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, 4, height, width),
        "timestep": torch.linspace(0.9, 0.2, batch),
        "context": torch.randn(batch, text, 16),
    }


def forward(model: Lumina2, **arguments: Any) -> Tensor:
    with torch.inference_mode():
        out = model.run(SequenceParallel(), Inputs(arguments, model.arguments()))
    assert isinstance(out, Tensor)
    return out


# --- detection --------------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, tuple[dict[str, Any], int, dict[str, tuple[int, ...]]]] = {
    "z_image_turbo": (
        {
            "dim": 3840,
            "cap_feat_dim": 2560,
            "n_layers": 30,
            "n_heads": 30,
            "n_kv_heads": 30,
            "axes_dims": [32, 48, 48],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        6_154_908_736,
        {
            "x_embedder.weight": (3840, 64),
            "t_embedder.mlp.0.weight": (1024, 256),
            "t_embedder.mlp.2.weight": (256, 1024),
            "cap_pad_token": (1, 3840),
            "layers.29.adaLN_modulation.0.weight": (15360, 256),
            "layers.29.attention.qkv.weight": (11520, 3840),
            "context_refiner.1.feed_forward.w3.weight": (10240, 3840),
            "final_layer.adaLN_modulation.1.weight": (3840, 256),
        },
    ),
    "lumina_2": (
        {
            "dim": 2304,
            "cap_feat_dim": 2304,
            "n_layers": 26,
            "n_heads": 24,
            "n_kv_heads": 8,
            "axes_dims": [32, 32, 32],
            "rope_theta": 10000.0,
            "ffn_dim_multiplier": 4.0,
        },
        2_609_769_152,
        {
            "t_embedder.mlp.2.weight": (1024, 1024),
            "layers.25.adaLN_modulation.1.weight": (9216, 1024),
            "noise_refiner.1.attention.qkv.weight": (3840, 2304),
            "layers.0.attention.k_norm.weight": (96,),
            "layers.0.feed_forward.w2.weight": (2304, 9216),
            "final_layer.linear.weight": (64, 2304),
        },
    ),
}
COMMON: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "n_refiner_layers": 2,
    "qk_norm": True,
    "multiple_of": 256,
}
MORE: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "z_image_omni": (
        "z_image_turbo",
        {"siglip_feat_dim": 1152},
        {"siglip_embedder.1.weight": (3840, 1152), "siglip_refiner.1.ffn_norm1.weight": (3840,)},
    ),
    "newbie": (
        "lumina_2",
        {"clip_text_dim": 1024, "cap_feat_dim": 2560, "n_layers": 36},
        {"clip_text_pooled_proj.1.weight": (1024, 1024), "time_text_embed.1.weight": (1024, 2048)},
    ),
}


def header(config: dict[str, Any]) -> dict[str, TensorInfo]:
    return {name: TensorInfo("BF16", shape) for name, shape in Lumina2.shapes(config).items()}


@pytest.mark.parametrize("name", [*PUBLISHED, *MORE])
def test_published_models_are_detected(name: str) -> None:
    """From the header alone, with or without the norm that no forward looks at; counts are those of diffusers."""
    base, more, shapes = MORE.get(name, (name, {}, {}))
    config, count, own = PUBLISHED[base]
    config = {**COMMON, **config, **more}
    tensors = header(config)
    wanted = shapes if name in MORE else own
    assert {key: tensors[key].shape for key in wanted} == wanted
    assert detect(tensors) == (Lumina2, config)
    del tensors["norm_final.weight"]
    assert detect(tensors) == (Lumina2, config)
    if name in PUBLISHED:
        assert sum(math.prod(info.shape) for info in tensors.values()) == count


def test_models_of_other_widths_are_detected_by_their_shapes() -> None:
    """All but the axes, theta and the padding, which shapes don't tell."""
    for config in (LUMINA, NEWBIE, Z_IMAGE, OMNI):
        _, found = detect(header(config))
        untold = {"axes_dims", "rope_theta", "pad_tokens_multiple"}
        assert {key: value for key, value in found.items() if key not in untold} == {
            key: value for key, value in config.items() if key not in untold
        }


def test_a_model_of_pixels_is_refused_by_name() -> None:
    with pytest.raises(ModelUnsupported, match="Z-Image of pixels"):
        detect({**header(Z_IMAGE), "dec_net.cond_embed.weight": TensorInfo("BF16", (48, 48))})


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (Z_IMAGE, "axes_dims", [32, 48, 48]),
        (Z_IMAGE, "axes_dims", None),
        (Z_IMAGE, "n_heads", 5),
        (Z_IMAGE, "n_kv_heads", 3),
        (Z_IMAGE, "qk_norm", False),
        (Z_IMAGE, "norm_eps", 1e-6),
        (Z_IMAGE, "z_image_modulation", 1),
        (Z_IMAGE, "time_scale", 0),
        (Z_IMAGE, "n_layers", 0),
        (Z_IMAGE, "ffn_dim_multiplier", None),
        (OMNI, "pad_tokens_multiple", None),
        (NEWBIE, "clip_text_dim", "20"),
    ],
)
def test_an_impossible_configuration_is_refused_by_its_key(config: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(ModelUnsupported, match=key):
        Lumina2({**config, key: value})


def test_a_files_unused_norm_is_read_and_may_lack(tmp_path: Path) -> None:
    model = make(Z_IMAGE)
    weights = model.state_dict()
    outs = []
    for name in ("with", "without"):
        path = tmp_path / f"{name}.safetensors"
        save_file(weights, path, {"tacod.config": json.dumps(Z_IMAGE)})
        loaded: Any = load_model(read_checkpoint(str(path)), torch.float32, torch.device("cpu"))
        torch.manual_seed(1)
        outs.append(forward(loaded, **inputs()))
        weights.pop("norm_final.weight", None)
    assert torch.equal(*outs)


# --- tokens and times -------------------------------------------------------------------------------------------------


def test_text_and_image_are_padded_each() -> None:
    """To multiples of 8 in Z-Image; Lumina 2 pads neither."""
    for text, height, width, padded in ((3, 6, 5, (8, 16)), (8, 8, 8, (8, 16)), (9, 1, 2, (16, 8))):
        given = inputs(1, height, width, text)
        assert make(Z_IMAGE).lengths(given) == padded
        assert make(LUMINA).lengths(given) == (text, math.ceil(height / 2) * math.ceil(width / 2))


@pytest.mark.parametrize("token", ["x_pad_token", "cap_pad_token", "siglip_pad_token"])
def test_pads_are_attended_to(token: str) -> None:
    """Without references there are no features to pad."""
    model = make(OMNI)
    given = inputs()
    before = forward(model, **given)
    getattr(model, token).fill_(3.0)
    assert torch.equal(forward(model, **given), before) == (token == "siglip_pad_token")


def embedded(model: Lumina2, **arguments: Any) -> Tensor:
    """The sinusoids of a forward's times."""
    seen: list[Tensor] = []
    model.t_embedder.get_submodule("mlp.0").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    forward(model, **arguments)
    return seen[0]


def test_a_timestep_is_what_is_left_of_the_noise() -> None:
    """1 - t is embedded, times 1000 in Z-Image, in fp32: cosines, then sines, of 128 falling frequencies."""
    assert Lumina2.timestep(make(LUMINA), torch.tensor([0.25])) == 0.25
    for config, phase in ((Z_IMAGE, 250.0), (LUMINA, 0.25)):
        clean, quarter = embedded(make(config), **{**inputs(), "timestep": torch.tensor([1.0, 0.75])})
        assert clean.tolist() == [1.0] * 128 + [0.0] * 128
        assert float(quarter[0]) == pytest.approx(math.cos(phase), abs=1e-5)
        assert float(quarter[128]) == pytest.approx(math.sin(phase), abs=1e-5)
        assert float(quarter[64]) == pytest.approx(math.cos(phase / 100), abs=1e-5)


def test_what_the_network_does_not_read_changes_nothing() -> None:
    for config in (Z_IMAGE, LUMINA, OMNI):
        model, given = make(config), inputs()
        unread: dict[str, Any] = {
            "num_tokens": 2,
            "attention_mask": torch.zeros(2, 3),
            "clip_text_pooled": torch.ones(2),
        }
        # Without references these are for nothing.
        unread["ref_contexts"] = [torch.randn(2, 4, 16)]
        unread["siglip_feats"] = [torch.randn(2, 2, 2, 16)]
        assert torch.equal(forward(model, **given, **unread), forward(model, **given))


def test_a_pooled_text_counts_where_the_model_has_one() -> None:
    model, given = make(NEWBIE), inputs()
    pooled = torch.randn(2, 20)
    without = forward(model, **given)
    assert relative_error(forward(model, **given, clip_text_pooled=pooled), without) > 1e-3
    assert not torch.equal(forward(make(NEWBIE), **given), without), "other weights"


@pytest.mark.parametrize("name", ["scale_y", "scale_x", "shift_y", "shift_x", "scale_t", "shift_t"])
def test_positions_are_stretched_in_the_image_alone(name: str) -> None:
    """ComfyUI's network doesn't look at those of the first axis."""
    model, given = make(LUMINA), inputs()
    moved = forward(model, **given, rope_options={name: 1.5})
    assert torch.equal(moved, forward(model, **given)) == name.endswith("_t")


def test_fp16_overflows_become_finite() -> None:
    model = make(Z_IMAGE)
    for layer in model.layers:
        layer.get_submodule("feed_forward.w3").weight.mul_(1e4)
        layer.get_submodule("feed_forward.w1").weight.mul_(1e4)
    given = {key: value if key == "timestep" else value.half() for key, value in inputs().items()}
    assert forward(model.half(), **given).isfinite().all()


# --- references -------------------------------------------------------------------------------------------------------


def references(*sides: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(2, 4, *each) for each in sides]


def test_references_bring_tokens_of_their_own() -> None:
    """Each its text, or pads in its place, and its features; what is more of texts comes behind the context."""
    given = {**inputs(text=9), "ref_latents": references((4, 6), (2, 2))}
    texts = [torch.randn(2, count, 16) for count in (5, 9, 17)]
    features = [torch.randn(2, 3, 3, 16)]
    assert make(Z_IMAGE).lengths(given) == (8 + 8 + 16, 16 + 8 + 8)
    assert make(Z_IMAGE).lengths({**given, "ref_contexts": texts}) == (8 + 16 + 16 + 24, 32)
    assert make(OMNI).lengths(given) == (32, 3 * 8, 32), "features that there aren't are pads"
    assert make(OMNI).lengths({**given, "ref_contexts": texts, "siglip_feats": features}) == (64, 16 + 8 + 8, 32)


def test_references_have_time_0_and_the_image_its_own() -> None:
    """Both are embedded; the second of each image is the same."""
    both = embedded(make(OMNI), **inputs(), ref_latents=references((4, 6)))
    assert both.shape == (2, 2, 256)
    assert both[:, 0, 0].tolist() == pytest.approx([math.cos(100), math.cos(800)], abs=1e-4)
    assert both[:, 1, 0].tolist() == pytest.approx([math.cos(1000)] * 2, abs=1e-4)


def checked(model: Lumina2, arguments: dict[str, Any]) -> tuple[int, ...]:
    """Tokens of arguments as a client sends them."""

    def sent(value: Any) -> Any:
        return list(map(sent, value)) if isinstance(value, list) else to_wire(value, "argument")

    check_arguments({key: sent(value) for key, value in arguments.items()}, model.arguments(), model.family)
    return model.lengths(arguments)


@pytest.mark.parametrize(
    ("config", "argument", "told"),
    [
        (Z_IMAGE, {"ref_latents": references((4, 4), (4, 5))}, "4 by 5; make both sides multiples of 2"),
        (LUMINA, {"ref_latents": references((4, 4))}, "one for each reference"),
        (NEWBIE, {"ref_latents": references((4, 4))}, "no such argument"),
        (Z_IMAGE, {"control": torch.ones(2, 4)}, "no such argument"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(config: dict[str, Any], argument: dict[str, Any], told: str) -> None:
    model, given = make(config), {**inputs(), **argument}
    with pytest.raises(ArgumentError, match=told) as caught:
        checked(model, given)
    assert caught.value.argument == ("ref_contexts" if config is LUMINA else next(iter(argument)))


# --- diffusers --------------------------------------------------------------------------------------------------------


def diffusers_class(name: str, **config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(pytest.importorskip("diffusers"), name, None)
        if kind is None:
            pytest.skip(f"this diffusers has no {name}")
        return kind(**config).eval()


@pytest.mark.parametrize(
    ("name", "ours", "more"),
    [
        ("ZImageTransformer2DModel", "z_image_turbo", {}),
        ("ZImageTransformer2DModel", "z_image_omni", {"siglip_feat_dim": 1152}),
        ("Lumina2Transformer2DModel", "lumina_2", {"cap_feat_dim": 2304, "ffn_dim_multiplier": 1.0}),
    ],
)
def test_diffusers_classes_have_these_names_at_published_sizes(name: str, ours: str, more: dict[str, Any]) -> None:
    with torch.device("meta"):
        theirs = diffusers_class(name, **more)
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    base, extra, _ = MORE.get(ours, (ours, {}, {}))
    config = {**COMMON, **PUBLISHED[base][0], **extra}
    layout = Lumina2.diffusers_layout(config)
    assert layout.keys() == shapes.keys()
    tensors = {key: TensorInfo("F32", shape) for key, shape in shapes.items()}
    told = from_diffusers("folder", {"_class_name": name, **more}, tensors)
    known = {key: value for key, value in told.items() if key != "norm_eps"}
    assert known == config


def test_diffusers_lumina_is_the_same_model_under_other_names() -> None:
    """Its norms of queries and keys add 1e-5, which is seen in the sixth digit; its output has the other sign."""
    theirs = diffusers_class(
        "Lumina2Transformer2DModel",
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=6,
        num_kv_heads=2,
        multiple_of=32,
        ffn_dim_multiplier=0.5,
        axes_dim_rope=[2, 2, 4],
        cap_feat_dim=16,
    )
    ours = make(LUMINA)
    theirs.load_state_dict(in_diffusers(ours))
    given = inputs(height=6, width=8)
    mask = torch.ones(2, 3, dtype=torch.long)
    with torch.inference_mode():
        expected = -theirs(given["x"], 1 - given["timestep"], given["context"], mask).sample
    assert relative_error(forward(ours, **given), expected) <= 1e-4
