"""Single files under other names: diffusers' own, and behind prefixes that programs leave. Each is the plain file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import FLUX, SD3, Tiny
from safetensors.torch import save_file
from torch import Tensor

from tacod.checkpoint import TensorInfo, locate, read_checkpoint
from tacod.rank.families import is_known
from tacod.rank.families.base import DiT
from tacod.rank.weights import remap
from tacod.rank.weights.load import choose_dtype, load_model
from tacod.rank.weights.remap import identify
from tacod_client.errors import ModelCorrupt, ModelError, ModelUnsupported

CPU = torch.device("cpu")
PIXART = Tiny(
    "pixart",
    {
        "image_model": "pixart_sigma",
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 96,
        "depth": 2,
        "num_heads": 16,
        "caption_channels": 8,
        "pred_sigma": True,
        "micro_condition": False,
    },
)
BUFFERED = Tiny("buffered", {**PIXART.config, "model_max_length": 30, "num_patches": 64, "input_size": 16})
"""With what the authors' files hold and no forward looks at; diffusers' have no place for it."""
ALPHA = Tiny("alpha", {**PIXART.config, "image_model": "pixart_alpha", "micro_condition": True})
FLUX_128 = Tiny(
    "flux_128",
    {
        **FLUX.config,
        "hidden_size": 128,
        "num_heads": 1,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [16, 56, 56],
        "guidance_embed": False,
    },
)
"""Of the published head width, so that its shapes tell all."""
SD3_SMALL = Tiny(
    "sd3_small",
    {
        **SD3.config,
        "depth": 2,
        "context_embedder_config": {"params": {"in_features": 8, "out_features": 128}},
        "x_block_self_attn_layers": [0],
    },
)
"""For what is loaded again and again."""
SD3_PLAIN = Tiny("sd3_plain", {**SD3.config, "qk_norm": None, "x_block_self_attn_layers": []})
PREFIXES = [
    "model.diffusion_model.",
    "diffusion_model.",
    "model.",
    "model.model.",
    "net.",
    "module.",
    "transformer.",
    "_orig_mod.",
    "module._orig_mod.model.diffusion_model.",
    "base_model.model.",
    "of.nobody.",
]


def in_diffusers(tiny: Tiny, fused: bool = False) -> dict[str, Tensor]:
    """Its weights as diffusers would save them."""
    tensors = helpers.in_diffusers(tiny.model)
    return fuse(tensors, crossing=tiny in (PIXART, ALPHA, BUFFERED)) if fused else tensors


def fuse(tensors: dict[str, Tensor], crossing: bool) -> dict[str, Tensor]:
    """Queries, keys and values as `fuse_qkv_projections` leaves them; a second attention may be to the text."""
    for name in list(tensors):
        stem, layer, kind = name.rsplit(".", 2) if name.count(".") > 1 else ("", "", "")
        parts = {"to_q": ("to_q", "to_k", "to_v"), "add_q_proj": ("add_q_proj", "add_k_proj", "add_v_proj")}
        whole = {"to_q": "to_qkv", "add_q_proj": "to_added_qkv"}
        if layer in parts:
            cross = crossing and stem.endswith("attn2")
            names = [f"{stem}.{part}.{kind}" for part in parts[layer][cross:]]
            tensors[f"{stem}.{'to_kv' if cross else whole[layer]}.{kind}"] = torch.cat(list(map(tensors.pop, names)))
    return tensors


def save(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    metadata = None if config is None else {"tacod.config": json.dumps(config)}
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def load(path: Path) -> DiT:
    return load_model(read_checkpoint(str(path)), torch.float32, CPU)


def is_plain(model: DiT, tiny: Tiny) -> bool:
    """Whether all weights are those of the plain file, bit for bit."""
    ours, plain = model.state_dict(), tiny.model.state_dict()
    return ours.keys() == plain.keys() and all(torch.equal(ours[key], plain[key]) for key in ours)


def behind(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


# --- diffusers' names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", [FLUX, SD3, SD3_PLAIN, PIXART, ALPHA, BUFFERED], ids=lambda tiny: tiny.name)
def test_fused_layers_of_diffusers_are_the_plain_file(tiny: Tiny, tmp_path: Path) -> None:
    tensors = in_diffusers(tiny, fused=True)
    assert any("to_qkv" in name for name in tensors)
    assert is_plain(load(save(tmp_path / "m.safetensors", tensors, tiny.config)), tiny)


@pytest.mark.parametrize("prefix", ["transformer.", "model.diffusion_model.", "model."])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_diffusers_names_may_be_behind_a_prefix(fused: bool, prefix: str, tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", behind(prefix, in_diffusers(BUFFERED, fused)), BUFFERED.config)
    assert is_plain(load(path), BUFFERED)


@pytest.mark.parametrize("tiny", [FLUX_128, SD3, SD3_PLAIN, PIXART, ALPHA], ids=lambda tiny: tiny.name)
def test_shapes_tell_where_no_configuration_does(tiny: Tiny, tmp_path: Path) -> None:
    model = load(save(tmp_path / "m.safetensors", in_diffusers(tiny)))
    assert is_plain(model, tiny)
    assert model.heads == tiny.model.heads


def test_a_tensor_that_lacks_is_named_as_the_file_has_it(tmp_path: Path) -> None:
    tensors = in_diffusers(FLUX)
    del tensors["transformer_blocks.1.attn.to_k.weight"]
    with pytest.raises(ModelCorrupt, match=r"lacks transformer_blocks\.1\.attn\.to_k\.weight; download it again"):
        load(save(tmp_path / "m.safetensors", tensors, FLUX.config))


@pytest.mark.parametrize(
    ("tiny", "lacking"),
    [
        (FLUX_128, "context_embedder"),
        (FLUX_128, "time_text_embed.text_embedder.linear_1"),
        (FLUX_128, "x_embedder"),
        (FLUX, "transformer_blocks.0.attn.norm_k"),
        (SD3, "pos_embed.pos_embed"),
        (SD3, "proj_out"),
        (PIXART, "adaln_single.linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_layer_that_lacks_is_named_as_the_file_has_it(tiny: Tiny, lacking: str, tmp_path: Path) -> None:
    """Also where the family is told by it."""
    tensors = in_diffusers(tiny)
    for kind in ("", ".weight", ".bias"):
        tensors.pop(lacking + kind, None)
    with pytest.raises(ModelCorrupt, match=rf"lacks {lacking}(\.weight)?[;, ].*download it again"):
        load(save(tmp_path / "m.safetensors", tensors))


def test_what_quantisers_leave_beside_weights_is_no_other_family(tmp_path: Path) -> None:
    """It is the reader's to refuse, by name."""
    tensors = in_diffusers(FLUX_128)
    for name in [name for name in tensors if name.endswith(".weight")]:
        tensors |= {f"{name}.{each}": torch.ones(3) for each in ("absmax", "quant_map", "nested_absmax")}
    with pytest.raises(ModelError, match="absmax"):
        load(save(tmp_path / "m.safetensors", tensors))


def test_a_number_where_a_matrix_should_be_is_refused(tmp_path: Path) -> None:
    tensors = {**in_diffusers(FLUX), "transformer_blocks.0.attn.to_q.weight": torch.tensor(1.0)}
    with pytest.raises(ModelError, match=r"to_q\.weight"):
        load(save(tmp_path / "m.safetensors", tensors, FLUX.config))


def test_the_same_weights_twice_are_refused(tmp_path: Path) -> None:
    tensors = {**in_diffusers(FLUX), "transformer_blocks.0.attn.to_qkv.weight": torch.zeros(240, 80)}
    with pytest.raises(ModelUnsupported, match=r"doesn't use: transformer_blocks\.0\.attn\.to_qkv\.weight"):
        load(save(tmp_path / "m.safetensors", tensors, FLUX.config))


def test_a_controlnet_in_diffusers_names_is_told(tmp_path: Path) -> None:
    tensors = in_diffusers(FLUX_128) | {"controlnet_blocks.0.weight": torch.zeros(2, 2)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("proj_out.", "norm_out."))}
    with pytest.raises(ModelUnsupported, match="looks like a ControlNet"):
        load(save(tmp_path / "m.safetensors", tensors))


# --- prefixes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_is_taken_off(prefix: str, described: bool, tmp_path: Path) -> None:
    tensors = behind(prefix, SD3.model.state_dict())
    path = save(tmp_path / "m.safetensors", tensors, SD3.config if described else None)
    assert is_plain(load(path), SD3)
    _, _, found = identify(read_checkpoint(str(path)))
    assert (found.prefix, found.parameters) == (prefix, sum(each.numel() for each in tensors.values()))


OTHERS = {
    **{f"text_encoders.clip_l.transformer.text_model.layers.{i}.weight": torch.ones(2) for i in range(200)},
    **{f"first_stage_model.decoder.{i}.weight": torch.ones(2) for i in range(200)},
    **{f"model.encoder.{i}.weight": torch.ones(2) for i in range(200)},
    "net.stray": torch.ones(2),
    "logvar": torch.ones(2),
}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "transformer.", "denoiser."])
def test_others_may_lie_beside_it(prefix: str, tmp_path: Path) -> None:
    """Text encoders, a VAE, strays; more of them than of the model's own tensors."""
    assert is_plain(load(save(tmp_path / "m.safetensors", {**OTHERS, **behind(prefix, SD3.model.state_dict())})), SD3)


@pytest.mark.parametrize("ema", ["ema.", "model_ema.", "ema_model."])
def test_a_moving_average_is_no_rival(ema: str, tmp_path: Path) -> None:
    weights = SD3.model.state_dict()
    twice = {**behind("model.", weights), **behind(ema, {name: tensor + 1 for name, tensor in weights.items()})}
    assert is_plain(load(save(tmp_path / "m.safetensors", twice)), SD3)


@pytest.mark.parametrize("names", [str, in_diffusers], ids=["authors", "diffusers"])
def test_other_modules_beside_bare_names_are_left_out(
    names: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ComfyUI says so and draws; so it is here, whatever they hold."""
    own = in_diffusers(SD3) if names is in_diffusers else SD3.model.state_dict()
    theirs = {
        "vae.decoder.conv_in.weight": torch.ones(3, 3),
        "first_stage_model.decoder.conv_in.weight": torch.ones(3, 3),
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight": torch.ones(3),
        "text_encoder_2.shared.weight": torch.ones(3, dtype=torch.int64),
        "conditioner.embedders.0.weight": torch.ones(3),
        "cond_stage_model.weight": torch.ones(3),
        **behind("ema.", {name: tensor + 1 for name, tensor in own.items()}),
        "model_ema.decay": torch.ones(()),
    }
    caplog.set_level("INFO")
    assert is_plain(load(save(tmp_path / "m.safetensors", {**theirs, **own}, SD3.config)), SD3)
    assert f"{len(theirs)} tensors are other modules', and left out: " in caplog.text
    path = save(tmp_path / "m.safetensors", {**theirs, **{name: tensor.bfloat16() for name, tensor in own.items()}})
    checkpoint = read_checkpoint(str(path))
    # Neither the dtype nor the memory that is made ready goes by them.
    assert choose_dtype(checkpoint, None, torch.device("cuda")) == "bf16"
    assert checkpoint.weight_bytes(None) == sum(2 * tensor.numel() for tensor in own.values())
    assert load(path).family == "sd3"


@pytest.mark.parametrize("beside", ["", "junk", "vae.decoder.weight"])
def test_a_moving_average_alone_is_the_model(beside: str, tmp_path: Path) -> None:
    tensors = behind("ema.", SD3.model.state_dict())
    more = {beside: torch.ones(2)} if beside else {}
    assert is_plain(load(save(tmp_path / "m.safetensors", {**tensors, **more})), SD3)


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("", "joint_blocks.0.x_block.vae.weight"),
        ("", "joint_blocks.0.xyz"),
        ("", "vaex.weight"),
        ("", "junk.weight"),
        ("", "weight"),
        ("model.diffusion_model.", "model.diffusion_model.vae.weight"),
        ("", "controlnet.vae.weight"),
    ],
)
def test_what_may_be_of_the_network_stays_refused(prefix: str, name: str, tmp_path: Path) -> None:
    """It may be a variant that draws otherwise."""
    tensors = {**behind(prefix, SD3.model.state_dict()), name: torch.ones(2)}
    refused(save(tmp_path / "m.safetensors", tensors), ModelUnsupported, "doesn't use: " + name.removeprefix(prefix))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (385,), (1, 384)])
@pytest.mark.parametrize("name", ["norm_out.linear.bias", "transformer_blocks.1.norm1_context.linear.bias"])
def test_scale_and_shift_of_another_shape_are_refused(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {**in_diffusers(SD3), name: torch.ones(shape)}
    with pytest.raises(ModelError):
        load(save(tmp_path / "m.safetensors", tensors, SD3.config))


# --- what lies beside a file ------------------------------------------------------------------------------------------

FLUX_JSON = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 4 * FLUX.config["in_channels"],
    "num_layers": FLUX.config["depth"],
}
BESIDE: dict[str, str | bytes] = {
    "nothing": "{}",
    "a list": "[1]",
    "no JSON": "{",
    "no text": b"\xff\xfe",
    "too deep": "[" * 100_000,
    "no object": "3",
    "another class": json.dumps({"_class_name": "MyThing"}),
    "another transformer's": json.dumps({"_class_name": "OtherTransformer2DModel", "in_channels": 3}),
    "a VAE's": json.dumps({"_class_name": "AutoencoderKL", "in_channels": 3}),
    "no class but a number": json.dumps({"_class_name": 7}),
    "a text encoder's": json.dumps({"architectures": ["T5EncoderModel"]}),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_lies_beside_a_file_is_not_its_configuration(beside: str, name: str, tmp_path: Path) -> None:
    """ComfyUI doesn't look at it."""
    content = BESIDE[beside]
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for tensors in (
        SD3_SMALL.model.state_dict(),
        in_diffusers(SD3_SMALL),
        behind("model.diffusion_model.", SD3_SMALL.model.state_dict()),
    ):
        path = save(tmp_path / name, tensors)
        assert is_plain(load(path), SD3_SMALL)
        assert locate(name, [str(tmp_path)]) == str(path)


def test_what_lies_beside_a_file_and_can_not_be_read_is_none(tmp_path: Path) -> None:
    path = save(tmp_path / WEIGHTS, SD3.model.state_dict())
    os.mkfifo(tmp_path / "config.json")
    assert is_plain(load(path), SD3)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    assert is_plain(load(path), SD3)


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "of.nobody."])
@pytest.mark.parametrize("config", [FLUX_JSON, {"_class_name": "FluxTransformer2DModel", "patch_size": 4}])
def test_a_file_of_the_authors_names_beside_a_known_configuration_goes_by_itself(
    config: Any, prefix: str, described: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = behind(prefix, FLUX_128.model.state_dict())
    path = save(tmp_path / WEIGHTS, tensors, FLUX_128.config if described else None)
    assert is_plain(load(path), FLUX_128)


def test_another_file_of_the_same_folder_goes_by_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FLUX_JSON))
    assert is_plain(load(save(tmp_path / "m.safetensors", in_diffusers(SD3))), SD3)


def test_the_weights_of_a_folder_go_by_its_configuration(tmp_path: Path) -> None:
    """Which shapes alone would not tell: heads of another width."""
    config = {
        **FLUX_JSON,
        "num_single_layers": FLUX.config["depth_single_blocks"],
        "num_attention_heads": FLUX.config["num_heads"],
        "attention_head_dim": FLUX.config["hidden_size"] // FLUX.config["num_heads"],
        "pooled_projection_dim": FLUX.config["vec_in_dim"],
        "joint_attention_dim": FLUX.config["context_in_dim"],
        "axes_dims_rope": FLUX.config["axes_dim"],
        "guidance_embeds": FLUX.config["guidance_embed"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(save(tmp_path / WEIGHTS, in_diffusers(FLUX)))
    assert is_plain(model, FLUX)
    assert model.heads == FLUX.model.heads


def test_half_a_file_beside_a_configuration_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FLUX_JSON))
    path = save(tmp_path / WEIGHTS, in_diffusers(FLUX))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelCorrupt):
        load(path)


def refused(path: Path, error: type[ModelError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        load(path)
    assert "download" not in caught.value.message


def test_few_of_many_prefixes_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the most tensors is among them."""
    tried = 0

    def known(tensors: Mapping[str, TensorInfo]) -> bool:
        nonlocal tried
        tried += 1
        return is_known(tensors)

    monkeypatch.setattr(remap, "is_known", known)
    many = {f"others.{i}.layers.{j}.weight": torch.ones(1) for i in range(200) for j in range(6)}
    with pytest.raises(ModelUnsupported, match="no family knows this file"):
        load(save(tmp_path / "m.safetensors", many))
    assert tried <= 40
    assert is_plain(
        load(save(tmp_path / "m.safetensors", {**many, **behind("of.nobody.", SD3.model.state_dict())})), SD3
    )


def test_two_models_are_refused_by_their_prefixes(tmp_path: Path) -> None:
    weights = SD3.model.state_dict()
    path = save(tmp_path / "m.safetensors", {**behind("student.", weights), **behind("teacher.", weights)})
    refused(path, ModelUnsupported, "holds several models, behind the prefixes 'student.', 'teacher.'")


def test_names_that_no_configuration_knows_are_shown(tmp_path: Path) -> None:
    tensors = {name.replace(".", "/"): tensor for name, tensor in FLUX.model.state_dict().items()}
    refused(
        save(tmp_path / "m.safetensors", tensors, FLUX.config), ModelUnsupported, "none of the names.*double_blocks/0"
    )


def test_a_model_that_lacks_tensors_behind_a_prefix_lacks_them(tmp_path: Path) -> None:
    weights = SD3.model.state_dict()
    del weights["final_layer.adaLN_modulation.1.weight"]
    with pytest.raises(ModelCorrupt, match=r"lacks final_layer\.adaLN_modulation\.1\.weight"):
        load(save(tmp_path / "m.safetensors", behind("of.nobody.", weights)))
