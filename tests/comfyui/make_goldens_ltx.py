"""Makes goldens of LTX-Video and LTX-2 in tests/data/golden with a real ComfyUI, on the CPU and in fp32.

    PYTHONPATH=COMFYUI:tests/comfyui/stub/torchaudio python tests/comfyui/make_goldens_ltx.py tests/data/golden [OLDER]

OLDER is ``comfy/ldm/lightricks/av_model.py`` of a ComfyUI up to 0.30, whose sound reads the video earlier; without it
the golden of that is left out. Weights are random numbers that float8_e4m3fn holds, as which they are stored.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

OUT = Path(sys.argv[1]).resolve()
OLDER = Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else None
# SDPA: the usual attention of a CPU takes masks as numbers.
sys.argv = [sys.argv[0], "--cpu", "--force-fp32", "--use-pytorch-cross-attention"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.lightricks.av_model import LTXAVModel  # noqa: E402
from comfy.ldm.lightricks.model import LTXVModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

BF16 = 1e-2
"""The error that a bf16 forward may have without a word of it in the golden."""
VIDEO = {
    "image_model": "ltxv",
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 14,
    "cross_attention_dim": 42,
    "in_channels": 6,
    "caption_channels": 24,
}
BOTH = {
    "image_model": "ltxav",
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "in_channels": 6,
    "caption_channels": 16,
    "audio_num_attention_heads": 3,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 12,
    "causal_temporal_positioning": True,
    "av_ca_timestep_scale_multiplier": 1000.0,
    "use_middle_indices_grid": True,
    "rope_type": "split",
    "frequencies_precision": "float64",
    "connector_num_attention_heads": 2,
    "connector_attention_head_dim": 8,
    "connector_num_layers": 1,
}
NEWER = {
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "connector_apply_gated_attention": True,
    "connector_num_attention_heads": 3,
    "audio_connector_num_attention_heads": 3,
    "audio_connector_attention_head_dim": 4,
}
drawn = torch.Generator().manual_seed(0)


def noise(*shape: int) -> Tensor:
    """Standard normal."""
    return torch.randn(shape, generator=drawn)


def build(kind: Any, config: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The network with random weights, and these as they are stored."""
    known = {key: value for key, value in config.items() if key != "image_model"}
    network = kind(**known, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    stored = {}
    for name, weight in sorted(network.state_dict().items()):
        random = noise(*weight.shape)
        if weight.ndim == 1:
            random = 1 + 0.2 * random if name.endswith("norm.weight") else 0.1 * random
        elif "table" not in name and not name.endswith(("registers", "embedding")):
            random = random / weight[0].numel() ** 0.5
        stored[name] = random.to(torch.float8_e4m3fn)
    network.load_state_dict({name: weight.float() for name, weight in stored.items()})
    return network.eval().requires_grad_(False), stored


def save(name: str, config: dict[str, Any], kind: Any, given: dict[str, Any], **more: Any) -> None:
    """Run one forward, and write it with what it was made of.

    ``given`` may hold lists, maps and numbers; ``more`` are the forward's options, and ``told``, which only the file
    holds, of what the network is. ``states`` are a text's, of which the network makes the context first.
    """
    network, stored = build(kind, config)
    told, states = more.pop("told", {}), more.pop("states", None)
    tensors = {f"weights.{key}": value for key, value in stored.items()}
    if states is not None:
        given["context"] = network.preprocess_text_embeds(states, unprocessed=True)
        tensors |= {"pre.context": states}

    def run(dtype: torch.dtype) -> list[Tensor]:
        def cast(value: Any) -> Any:
            if isinstance(value, list):
                return list(map(cast, value))
            if isinstance(value, dict):
                return {key: cast(each) for key, each in value.items()}
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        rest = {key: cast(value) for key, value in given.items() if key not in ("x", "timestep")}
        rest.setdefault("attention_mask", None)
        x, times = [cast(each).clone() for each in given["x"]], tuple(given["timestep"])
        network.to(dtype)
        network.dtype = dtype
        one = kind is LTXVModel
        out = network(x[0] if one else x, times[0] if one else times, transformer_options=more, **rest)
        return [each.clone().contiguous() for each in (out if isinstance(out, list) else [out])]

    with torch.inference_mode():
        outs, rounded = run(torch.float32), run(torch.bfloat16)
    one = kind is LTXVModel
    tensors |= {"out": outs[0]} if one else {f"out.{index}": each for index, each in enumerate(outs)}

    def named(value: Any, key: str) -> Any:
        """The value with names in place of its tensors, which are put into the file."""
        if isinstance(value, list):
            return [named(each, f"{key}.{index}") for index, each in enumerate(value)]
        if isinstance(value, dict):
            return {name: named(each, f"{key}.{name}") for name, each in value.items()}
        if isinstance(value, Tensor):
            tensors[key] = value.clone()
            return f"@{key}"
        return value

    inputs = {**given, **({"x": given["x"][0], "timestep": given["timestep"][0]} if one else {})}
    args = {key: named(value, f"in.{key}") for key, value in inputs.items()}
    metadata = {"family": config["image_model"], "case": name, "comfyui": comfyui_version.__version__}
    metadata |= {"config": json.dumps(config), "args": json.dumps({**args, **more, **told})}
    error = max(float((one - other).norm() / other.norm()) for one, other in zip(rounded, outs, strict=True))
    if error > BF16:
        metadata["bf16"] = f"{error:.4f}"
    save_file(tensors, OUT / f"{name}.safetensors", metadata)


def guides() -> None:
    """LTX-Video with three guides, the middle one coarser, of strengths that differ within it, above 1, and 0."""
    frames, rows, columns = 6, 4, 6
    mask = torch.ones(2, 1, frames, rows, columns)
    mask[:, :, :1] = 0.25
    mask[:, :, 3:5] = -0.5
    mask[:, :, 3:5, ::2, ::2] = 0.4
    mask[:, :, 5:] = 0.1
    times = (mask * torch.tensor([0.75, 0.5]).view(-1, 1, 1, 1, 1))[:, :1].flatten(2).transpose(1, 2).contiguous()
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(rows), torch.arange(columns), indexing="ij"))
    places = places.flatten(1)
    starts = places * torch.tensor([8, 32, 32])[:, None] + torch.tensor([3, 0, 0])[:, None]
    spans = torch.stack((starts, starts + torch.tensor([8, 64, 64])[:, None]), dim=-1)[None, :, : 3 * rows * columns]
    frame = rows * columns
    pixels = torch.rand(1, 1, 11, 8, 12, generator=drawn)
    entries = [
        {"pre_filter_count": 2 * frame, "strength": 0.8, "latent_shape": [2, 2, 3], "pixel_mask": pixels},
        {"pre_filter_count": frame, "strength": 1.5, "latent_shape": [1, rows, columns], "pixel_mask": None},
    ]
    given = {
        "x": [noise(2, 6, frames, rows, columns)],
        "timestep": [times],
        "context": noise(2, 7, 24),
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        "frame_rate": 23.976,
        "denoise_mask": mask,
        "keyframe_idxs": spans.expand(2, -1, -1, -1).contiguous(),
        "guide_attention_entries": entries,
        "generated_keyframes": {"tokens_per_frame": frame, "first_latent_frame": 2, "num_keyframes": 1},
    }
    config = {**VIDEO, "ff_bias": False, "use_keyframes_abs_pos_embedding": True}
    save("ltxv_guides", config, LTXVModel, given)
    entries = [
        {"pre_filter_count": frame, "strength": 0.0, "latent_shape": None, "pixel_mask": None},
        {"pre_filter_count": frame, "strength": 1.0, "latent_shape": None, "pixel_mask": None},
        {"pre_filter_count": frame, "strength": 0.5, "latent_shape": None, "pixel_mask": None},
    ]
    save("ltxv_hidden_guide", VIDEO, LTXVModel, {**given, "guide_attention_entries": entries, "frame_rate": 25})


def sound() -> None:
    """LTX-2 without sound, with parts left out, and with one mask for two images; of 2.3's kind, and with a linear
    layer before the connectors."""
    x, heard = noise(2, 6, 3, 3, 5), noise(2, 8, 9, 16)
    given = {
        "x": [x, heard],
        "timestep": [torch.tensor([0.75, 0.5])] * 2,
        "context": noise(2, 1024, 32),
        "frame_rate": 24,
    }
    save("ltx2_without_sound", BOTH, LTXAVModel, {**given, "x": [x]})
    config, one = {**BOTH, **NEWER}, {key: [each[:1] for each in given[key]] for key in ("x", "timestep")}
    one |= {"frame_rate": 30.0, "context": noise(1, 1024, 36)}
    save("ltx2_unattended", config, LTXAVModel, one, stg_self_attn_blocks=[1])
    save("ltx2_apart", config, LTXAVModel, one, a2v_cross_attn=False, v2a_cross_attn=False)
    save("ltx2_video_only", config, LTXAVModel, one, run_ax=False)
    mask = torch.rand(2, 1, 3, 3, 5, generator=drawn)
    mask[0] = mask[0, :, :, :1, :1]
    times = (mask * torch.tensor([0.75, 0.5]).view(-1, 1, 1, 1, 1)).flatten(2).transpose(1, 2).contiguous()
    masked = {**given, "timestep": [times, torch.tensor([0.75, 0.5])], "denoise_mask": mask.expand_as(x).contiguous()}
    masked |= {"context": noise(2, 1024, 36)}
    other = {"denoise_mask": mask.flip(0).expand_as(x).contiguous(), "timestep": [times.flip(0), masked["timestep"][1]]}
    save("ltx2_mask_in_frames", config, LTXAVModel, {**masked, **other})
    # The first image's mask doesn't vary within a frame, so ComfyUI takes the second's as if it didn't, too.
    save("ltx2_masks", config, LTXAVModel, masked)
    linear = {"caption_projection_first_linear": True, "audio_connector_attention_head_dim": 4}
    states = noise(1, 13, 16)
    save("ltx2_linear", {**config, **linear}, LTXAVModel, {**one, "context": None}, states=states)
    if OLDER is not None:
        spec = importlib.util.spec_from_file_location("comfy.ldm.lightricks.older", OLDER)
        older = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(older)  # type: ignore[union-attr]
        save("ltx2_before", config, older.LTXAVModel, one, told={"reads_video": "before"})


guides()
sound()
