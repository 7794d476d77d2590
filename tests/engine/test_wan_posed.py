"""What Wan 2.2 Animate, SCAIL and SCAIL-2 are given: references, poses, masks and faces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import FP32, read_golden, relative_error
from test_wan import TINY, forward, header, inputs, published

from tacod.rank.families import detect
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.wan import Wan
from tacod.rank.families.wan_animate import MotionEncoder
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.lora import read_lora
from tacod_client.errors import ArgumentError, ModelUnsupported

FACE = {"widths": [4, 6], "style": 5, "motion": 3, "outputs": 8, "face": 4}
ANIMATE = {"model_type": "animate", "num_layers": 5, "pose_dim": 3, "face": FACE}
SCAIL2 = {"model_type": "scail2", "mask_in_dim": 2}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(**more: Any) -> Wan:
    return Wan({**TINY, "clip_dim": 8, **more}).eval().requires_grad_(False)


CLIP = {"clip_dim": 1280}
WHOLE_FACE = {
    "widths": [32, 64, 128, 256, 512, 512, 512, 512],
    "style": 512,
    "motion": 20,
    "outputs": 512,
    "face": 1024,
}
PUBLISHED = {
    "2.2_animate_14B": (
        published(True, in_dim=36, model_type="animate", **CLIP, pose_dim=16, face=WHOLE_FACE),
        17_274_817_108,
    ),
    "scail_14B": (published(True, in_dim=20, model_type="scail", **CLIP), 16_394_965_824),
    "scail2_14B": (published(True, in_dim=20, model_type="scail2", **CLIP, mask_in_dim=28), 16_395_544_384),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_detected(name: str) -> None:
    """From the header alone; parameters are counted as ComfyUI's own network has them."""
    config, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = Wan(config)
    tensors = header(model)
    shapes = {"patch_embedding.weight": (5120, config["in_dim"], 1, 2, 2)}
    if "face" in config:
        shapes |= {
            "pose_patch_embedding.weight": (5120, 16, 1, 2, 2),
            "motion_encoder.enc.net_app.convs.0.0.weight": (32, 3, 1, 1),
            "motion_encoder.enc.net_app.convs.0.1.bias": (1, 32, 1, 1),
            "motion_encoder.enc.net_app.convs.3.conv2.0.kernel": (4, 4),
            "motion_encoder.enc.net_app.convs.3.conv2.2.bias": (1, 256, 1, 1),
            "motion_encoder.enc.net_app.convs.3.skip.1.weight": (256, 128, 1, 1),
            "motion_encoder.enc.net_app.convs.8.weight": (512, 512, 4, 4),
            "motion_encoder.enc.fc.4.weight": (20, 512),
            "face_encoder.conv1_local.conv.weight": (4096, 512, 3),
            "face_encoder.padding_tokens": (1, 1, 1, 5120),
            "face_adapter.fuser_blocks.7.linear1_kv.bias": (10240,),
            "face_adapter.fuser_blocks.0.q_norm.weight": (128,),
        }
        assert model.motion_encoder.side == 512
    else:
        shapes["patch_embedding_pose.weight"] = (5120, 20, 1, 2, 2)
    assert {key: tensors[key].shape for key in shapes} == shapes
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameters
    assert detect(tensors) == (Wan, config)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({**ANIMATE, "num_layers": 4}, "'num_layers' is 4; with a face it must be a multiple of 5"),
        ({**ANIMATE, "face": None}, "'face'"),
        ({**ANIMATE, "face": {**FACE, "widths": []}}, "'widths'"),
        ({**ANIMATE, "face": {**FACE, "widths": [4, 0]}}, "'widths'"),
        ({**ANIMATE, "face": {**FACE, "motion": "3"}}, "'motion'"),
        ({**ANIMATE, "pose_dim": 0}, "'pose_dim'"),
        ({**ANIMATE, "in_dim_ref_conv": 4}, "'in_dim_ref_conv'"),
        ({**SCAIL2, "mask_in_dim": -1}, "'mask_in_dim'"),
    ],
)
def test_an_impossible_configuration_is_refused_by_its_key(config: dict[str, Any], told: str) -> None:
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=told):
        made(**config)


def test_a_file_that_lacks_the_faces_encoder_is_refused_by_its_tensor() -> None:
    tensors = {name: info for name, info in header(made(**ANIMATE)).items() if not name.startswith("face_encoder.")}
    with pytest.raises(ModelUnsupported, match=r"^face_encoder\.conv2\.conv\.weight: .*missing"):
        detect(tensors)


def test_a_lora_of_the_face_is_read_by_its_names() -> None:
    module = "face_adapter.fuser_blocks.0.linear1_kv"
    shapes = {name: tuple(tensor.shape) for name, tensor in made(**ANIMATE).state_dict().items()}
    lora = {
        f"diffusion_model.{module}.lora_A.weight": torch.randn(2, 48),
        f"diffusion_model.{module}.lora_B.weight": torch.randn(96, 2),
    }
    assert list(read_lora(lora, {}, shapes, 1.0, {})) == [f"{module}.weight"]


# --- forwards ---------------------------------------------------------------------------------------------------------

KINDS = ("wan_animate", "wan_scail", "wan_scail2", "wan_scail2_replaced")


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        *((name, "clip_fea") for name in KINDS),
        *((name, "pose_latents") for name in ("wan_animate", "wan_scail")),
        ("wan_animate", "face_pixel_values"),
        ("wan_scail", "reference_latent"),
        ("wan_scail2", "ref_mask_latents"),
        ("wan_scail2", "sam_latents"),
        ("wan_scail2_replaced", "ref_mask_flag"),
        ("wan_scail2_replaced", "rope_options"),
    ],
)
def test_what_a_golden_is_given_counts(name: str, left_out: str) -> None:
    golden = read_golden(name)
    other = replace(golden, inputs={key: each for key, each in golden.inputs.items() if key != left_out})
    assert other.error(SequenceParallel()) > 1e-3


def test_scail2_takes_references_as_shown_if_nothing_says_otherwise() -> None:
    golden = read_golden("wan_scail2")
    assert golden.inputs["ref_mask_flag"] is True
    without = {key: each for key, each in golden.inputs.items() if key != "ref_mask_flag"}
    assert replace(golden, inputs=without).error(SequenceParallel()) <= FP32


@pytest.mark.parametrize("flag", ["no", 2, [True]])
def test_a_flag_that_is_none_is_refused(flag: Any) -> None:
    golden = read_golden("wan_scail2")
    with pytest.raises(ArgumentError, match=r"^ref_mask_flag: .* is none of True, False"):
        replace(golden, inputs={**golden.inputs, "ref_mask_flag": flag}).arguments(golden.model())


def posed(frames: int) -> tuple[Wan, dict[str, Any]]:
    """Animate with poses for so many frames, of a video of three."""
    model = made(**ANIMATE)
    return model, inputs(model, pose_latents=torch.randn(2, 3, frames, 6, 8))


def test_animates_poses_are_for_frames_from_the_second_on() -> None:
    """Those for frames that there aren't are left out, as ComfyUI does."""
    model, given = posed(4)
    out = forward(model, given)
    cut = {**given, "pose_latents": given["pose_latents"][:, :, :2]}
    assert torch.equal(forward(model, cut), out)
    assert relative_error(forward(model, {**given, "pose_latents": given["pose_latents"][:, :, :1]}), out) > 1e-3


@pytest.mark.parametrize("pictures", [1, 5, 9, 40])
def test_a_face_of_any_length_is_taken(pictures: int) -> None:
    """Frames behind it see zeros; pictures that belong to no frame are left out."""
    model, given = posed(2)
    face = torch.randn(2, 3, pictures, 8, 8)
    out = forward(model, {**given, "face_pixel_values": face})
    assert relative_error(out, forward(model, given)) > 1e-3
    if pictures == 40:
        changed = face.clone()
        changed[:, :, 9:] = 0
        assert torch.equal(forward(model, {**given, "face_pixel_values": changed}), out)


def test_a_face_is_computed_before_the_first_step_alone() -> None:
    model, given = posed(2)
    given["face_pixel_values"] = torch.randn(2, 3, 9, 8, 8)
    taken = Inputs(given, model.arguments())
    with torch.inference_mode():
        prefix = model.compute_prefix(SequenceParallel(), taken)
        assert [tuple(each.shape) for each in prefix] == [(2, 3, 5, 48)]
        expected = model.run(SequenceParallel(), taken)
        model.motion_encoder = None
        assert torch.equal(model.run(SequenceParallel(), taken, prefix=prefix), expected)
    assert not made(**SCAIL2).has_prefix


def test_pictures_of_a_face_are_encoded_a_few_at_a_time() -> None:
    encoder = MotionEncoder(FACE)
    pictures = torch.randn(11, 3, 8, 8)
    with torch.inference_mode():
        every = torch.cat([encoder(each[None]) for each in pictures])
        assert relative_error(encoder(pictures), every) <= FP32
        assert encoder(pictures[:0]).shape == (0, 8)


@pytest.mark.parametrize(
    ("config", "given", "told"),
    [
        (ANIMATE, {"x": (2, 5, 3, 5, 8), "pose_latents": (2, 3, 2, 5, 8)}, r"^x: .* 5 by 8; with pose_latents"),
        (SCAIL2, {"ref_mask_latents": (2, 2, 4, 6, 8)}, r"^ref_mask_latents: it has 4 frames; expected 3"),
        (
            SCAIL2,
            {"reference_latent": (2, 5, 2, 6, 8), "ref_mask_latents": (2, 2, 3, 6, 8)},
            r"^ref_mask_latents: it has 3 frames; expected 5",
        ),
    ],
)
def test_what_comfyui_has_no_place_for_is_refused(config: Any, given: Any, told: str) -> None:
    model = made(**config)
    values = inputs(model, **{name: torch.randn(shape) for name, shape in given.items()})
    with pytest.raises(ArgumentError, match=told):
        model.lengths(values)


def test_masks_of_poses_that_there_are_not_change_nothing() -> None:
    """ComfyUI's node gives them also at those steps that have no poses."""
    model = made(**SCAIL2)
    given = inputs(model)
    assert torch.equal(forward(model, {**given, "sam_latents": torch.randn(2, 2, 3, 3, 4)}), forward(model, given))


def test_pictures_of_another_size_are_refused() -> None:
    golden = read_golden("wan_animate")
    face = torch.randn(2, 3, 9, 16, 24)
    with pytest.raises(ArgumentError, match=r"^face_pixel_values: expected shape \[B, 3, F, 16, 16\]"):
        replace(golden, inputs={**golden.inputs, "face_pixel_values": face}).arguments(golden.model())
