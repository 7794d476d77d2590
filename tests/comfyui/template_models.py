"""Tiny models as they stand in for those of ComfyUI's templates, with what comes over links beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfyui_graphs import CANNY, FILL, FLUX, TinyModel, save_lora
from image_cases import CASES, Case, Sizes, write
from video_cases import HUNYUAN, LTX, MINIMAX, SEEN_WIDTH, VIDEO, has_sound, pixels_of

__all__ = ["FLUXES", "MORE", "SIDE", "Model"]

FLUXES = {model.tiny.name: model for model in (FLUX, FILL, CANNY)}
MORE = {
    "wan22_5b_control": Case(
        "wan22_ti2v", "wan", 48, (4, 6), lora=("blocks.0.ffn.0",), config={"in_dim": 148, "out_dim": 48}
    ),
    "wan22_5b_inpaint": Case(
        "wan22_ti2v", "wan", 48, (4, 6), lora=("blocks.0.ffn.0",), config={"in_dim": 100, "out_dim": 48}
    ),
}
"""Models that only templates have, by the names of their files."""
STEPS = 3
FRAMES = 9
SIDE, CELL = 256, 32
"""Of pictures and of a latent's cells, in pixels. Some nodes scale a picture to a million pixels, then encode it."""
_SIZED = ("width", "height", "length")
_SECOND = "low_noise"
"""In the names of files that hold a second expert."""


class Model:
    """A tiny model as it stands in for a template's.

    Args:
        name: A golden's, or one of `FLUXES` or `MORE`.
        models: The folder of ComfyUI's models; its file and its LoRA are there then.
    """

    def __init__(self, name: str, models: Path) -> None:
        self.name, self.models = name, models
        self.case: Case | None = None
        self.sizes: TinyModel | Sizes
        if name in FLUXES:
            self.sizes, self.beside, self.frames = FLUXES[name], {}, False
            self.config = FLUXES[name].tiny.config
            save_lora(FLUXES[name], models / "loras" / self.file)
            return
        cases = {case.golden: case for case in CASES} | VIDEO | MORE
        self.case = case = cases[name]
        write(case, models, self.file)
        self.sizes, self.beside, self.frames = Sizes(case), case.text, case.has_frames
        self.config = case.model().config

    @property
    def file(self) -> str:
        """Its name, and its LoRA's."""
        return f"{self.name}.safetensors"

    def file_for(self, name: str) -> str:
        """The file that stands in for this one of a template. A second expert has weights of its own."""
        if _SECOND not in name or self.case is None:
            return self.file
        path = self.models / "diffusion_models" / f"{_SECOND}_{self.file}"
        if not path.exists():
            other = self.case.model()
            other.weights["blocks.0.ffn.0.weight"] = 1.5 * other.weights["blocks.0.ffn.0.weight"]
            write(self.case, self.models, path.name, other)
        return path.name

    @property
    def is_video(self) -> bool:
        """Whether pictures and sizes are a video's."""
        return self.case is not None and self.name in {**VIDEO, **MORE}

    @property
    def has_sound(self) -> bool:
        """Whether its latents are a video and a sound."""
        return self.case is not None and has_sound(self.case)

    @property
    def text(self) -> dict[str, int]:
        """Sizes of what its text encoders give."""
        return {"width": self.sizes.width, "pooled": self.sizes.pooled, **self.beside}

    def stand_in(self, kind: str, by: str, name: str, moving: bool) -> tuple[str, dict[str, Any]] | None:
        """What comes over a link; None for what is the template's own.

        Args:
            kind: The link's type.
            by: The kind of the node that takes it.
            name: The input's.
            moving: Whether it is of a video rather than of a picture.
        """
        stand_ins = self._of_video(name, moving) if self.is_video else self._of_image(by)
        return stand_ins.get(kind)

    def _of_image(self, by: str) -> dict[str, tuple[str, dict[str, Any]]]:
        config = json.dumps(self.config)
        vae = {"channels": self.sizes.channels, "frames": self.frames, "side": CELL}
        control = "qwen_inpaint" if "Inpainting" in by else "qwen"
        patch = {"AnimaLLLiteApply": "anima", "USOStyleReference": "uso"}.get(by, self.name)
        return {
            "IMAGE": ("TestImage", {"height": SIDE, "width": SIDE}),
            "MASK": ("TestMask", {"height": SIDE, "width": SIDE}),
            "CLIP": ("TestClip", self.text),
            "VAE": ("TestImageVAE", vae),
            "CONTROL_NET": ("TestControlNet", {"sort": control, "config": config}),
            "MODEL_PATCH": ("TestModelPatch", {"sort": patch, "config": config}),
            "CLIP_VISION_OUTPUT": ("TestSeenImage", {}),
            "STYLE_MODEL": ("TestStyleModel", {"width": self.sizes.width}),
        }

    def _of_video(self, name: str, moving: bool) -> dict[str, tuple[str, dict[str, Any]]]:
        sides = {"height": self.sides["height"], "width": self.sides["width"]}
        vae: tuple[str, dict[str, Any]] = "TestVideoVAE", {"channels": self.sizes.channels, "pixels": self.pixels}
        clip: tuple[str, dict[str, Any]] = "TestClip", dict(self.text)
        sound = name == "audio_vae"
        if self.name in LTX:
            vae = "TestLtxVAE", {"sound": sound}
            clip = "TestClip", {**self.text, **({"raw": True} if self.has_sound else {"hidden": 3})}
        elif self.name in MINIMAX:
            vae = ("TestSoundVAE", {"channels": 32}) if sound else vae
            clip = "TestH3Clip", {"seed": 1, "width": self.sizes.width}
        rate = 16000 if self.name in LTX else 32000
        seen = {"width": SEEN_WIDTH} if self.name in HUNYUAN else {}
        return {
            "IMAGE": ("TestFrames", {"seed": len(name), "frames": FRAMES if moving else 1, **sides}),
            "MASK": ("TestMask", sides),
            "CLIP": clip,
            "VAE": vae,
            "CLIP_VISION_OUTPUT": ("TestClipVision", {"seed": 4, "tokens": 5, **seen}),
            "AUDIO": ("TestSound", {"seed": 3, "samples": rate // 5, "rate": rate}),
            "LATENT_UPSCALE_MODEL": ("TestLatentUpscaler", {}),
            "AUDIO_ENCODER_OUTPUT": ("TestHeard", {"seed": len(name)}),
            "MODEL_PATCH": ("TestModelPatch", {"sort": "infinite_talk", "config": "{}"}),
        }

    @property
    def pixels(self) -> int:
        """Of a latent's cell, along each side."""
        if self.case is not None and self.is_video:
            return pixels_of(self.case)
        return {128: 16, 32: 16, 3: 1}.get(self.sizes.channels, 8)

    @property
    def sides(self) -> dict[str, int]:
        """Of pictures and videos, and the number of frames."""
        if self.name in MINIMAX:
            return {"width": 128, "height": 96, "length": 22}
        if self.is_video and self.name not in {**LTX, **HUNYUAN}:
            return {"width": 96, "height": 64, "length": FRAMES}
        height, width = (self.pixels * side for side in self.sizes.size)
        return {"width": width, "height": height, "length": FRAMES}

    def fixed(self, kind: str, takes: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Values in the place of a template's.

        Args:
            kind: The node's.
            takes: What it takes.
            values: The template's values of it.
        """
        fixed = {"steps": STEPS, "lora_name": self.file, **(_part_of_run(values) if "start_at_step" in takes else {})}
        if kind.startswith("Empty") or set(_SIZED) <= set(takes):
            fixed |= self.sides
        elif kind == "HunyuanVideo15LatentUpscaleWithModel":
            fixed |= {"width": 2 * self.sides["width"], "height": 2 * self.sides["height"]}
        elif kind == "LTXVEmptyLatentAudio":
            fixed |= {"frames_number": FRAMES}
        elif kind == "SplitSigmas":
            fixed |= {"step": 1}
        return {key: value for key, value in fixed.items() if key in takes}


def _part_of_run(values: Mapping[str, Any]) -> dict[str, int]:
    """The first or the second half of a run, as ``KSamplerAdvanced`` has them."""
    if values.get("add_noise") == "disable":
        return {"steps": 4, "start_at_step": 2, "end_at_step": 10000}
    goes_on = values.get("return_with_leftover_noise") == "enable"
    return {"steps": 4, "start_at_step": 0, "end_at_step": 2 if goes_on else 10000}
