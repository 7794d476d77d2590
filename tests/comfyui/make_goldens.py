"""Makes goldens of several families in tests/data/golden with a real ComfyUI, on the CPU and in fp32.

    PYTHONPATH=COMFYUI:tests/comfyui/stub/torchaudio python tests/comfyui/make_goldens.py tests/data/golden

Weights are random numbers that float8_e4m3fn holds, as which they are stored: half the size, and nothing is lost.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

OUT = Path(sys.argv[1]).resolve()
sys.argv = [sys.argv[0], "--cpu", "--force-fp32"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ldm.hunyuan_video.model as hunyuan_model  # noqa: E402
import comfy.ldm.wan.model as wan_model  # noqa: E402
import comfy.ldm.wan.model_animate as wan_animate  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.cosmos.predict2 import MiniTrainDIT  # noqa: E402
from comfy.ldm.hidream.model import HiDreamImageTransformer2DModel  # noqa: E402
from comfy.ldm.kandinsky5.model import Kandinsky5  # noqa: E402
from comfy.ldm.krea2.model import SingleStreamDiT  # noqa: E402
from comfy.ldm.lumina.model import NextDiT  # noqa: E402
from comfy.ldm.minimax.model import MiniMaxH3Model  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT, TimestepEmbedder  # noqa: E402
from comfy.ldm.pixart.pixartms import PixArtMS  # noqa: E402
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

STEPS, CFG, SEED = 8, 4.5, 42
FP32 = {"patch_embedding", "vace_patch_embedding", "patch_embedding_pose", "patch_embedding_mask"}
"""Layers of Wan's that are fp32 whatever the rest is."""
BF16 = 1e-2
"""The error that a bf16 forward may have without a word of it in the golden."""
RUNS = [
    "euler|normal",
    "euler|simple",
    "euler|beta",
    "heun|normal",
    "dpm_2|normal",
    "lms|normal",
    "dpmpp_2m|normal",
    "dpmpp_2m|sgm_uniform",
    "ddim|normal",
    "uni_pc|normal",
    "deis|normal",
    "ipndm|normal",
    "res_multistep|simple",
    "gradient_estimation|normal",
    "euler_ancestral|normal",
]
SD35 = {
    "image_model": "sd3",
    "patch_size": 2,
    "in_channels": 16,
    "depth": 2,
    "adm_in_channels": 40,
    "pos_embed_max_size": 20,
    "num_patches": 400,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128}},
    "context_size": 48,
    "qk_norm": "rms",
    "pos_embed_scaling_factor": None,
    "input_size": None,
}
HIDREAM = {
    "image_model": "hidream",
    "in_channels": 16,
    "patch_size": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": [8, 4, 4],
    "caption_channels": [24, 20],
    "text_emb_dim": 12,
    "llama_layers": [1, 0],
    "num_layers": 1,
    "num_single_layers": 1,
}
COSMOS = {
    "image_model": "cosmos_predict2",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 17,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 80,
    "num_heads": 5,
    "num_blocks": 2,
    "crossattn_emb_channels": 24,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
    "rope_h_extrapolation_ratio": 2.0,
    "rope_w_extrapolation_ratio": 2.0,
    "rope_t_extrapolation_ratio": 5 / 6,
    "rope_enable_fps_modulation": False,
}
PIXART = {
    "image_model": "pixart_alpha",
    "input_size": 64,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 96,
    "depth": 1,
    "num_heads": 16,
    "caption_channels": 48,
    "pred_sigma": True,
    "learn_sigma": True,
    "micro_condition": True,
    "pe_interpolation": 1,
    "model_max_length": 30,
}
QWEN = {
    "image_model": "qwen_image",
    "in_channels": 16,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 2,
    "joint_attention_dim": 24,
    "num_attention_heads": 3,
    "attention_head_dim": 12,
    "axes_dims_rope": [4, 4, 4],
}
KREA2 = {
    "image_model": "krea2",
    "features": 64,
    "channels": 4,
    "patch": 2,
    "layers": 2,
    "heads": 4,
    "kvheads": 2,
    "txtlayers": 4,
    "txtdim": 16,
    "txtheads": 2,
    "txtkvheads": 1,
    "multiplier": 1,
}
LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 4,
    "dim": 48,
    "cap_feat_dim": 24,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 6,
    "n_kv_heads": 3,
    "axes_dims": [2, 2, 4],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 1.5,
    "multiple_of": 16,
    "clip_text_dim": 20,
}
Z_IMAGE = {key: value for key, value in LUMINA.items() if key != "clip_text_dim"} | {
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [4, 4, 4],
    "rope_theta": 256.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
    "siglip_feat_dim": 20,
}
KANDINSKY5 = {
    "image_model": "kandinsky5",
    "model_dim": 48,
    "time_dim": 20,
    "ff_dim": 72,
    "visual_embed_dim": 36,
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 24,
    "in_text_dim2": 14,
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
    "axes_dims": [4, 6, 6],
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 48,
    "num_heads": 4,
    "ffn_dim": 80,
    "num_layers": 2,
    "in_dim": 4,
    "out_dim": 4,
    "text_dim": 24,
}
HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": None,
    "context_in_dim": 24,
    "hidden_size": 48,
    "mlp_ratio": 2.0,
    "num_heads": 4,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 4, 4],
    "theta": 256,
    "qkv_bias": True,
    "guidance_embed": False,
    "byt5": False,
    "meanflow": False,
    "meanflow_sum": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
}
GUIDANCE = "guidance"
"""It is in fp32 in the daemon, as times are; a thousand times a number in bf16 is another one."""

MINIMAX_H3 = {
    "image_model": "minimax_h3",
    "num_layers": 2,
    "token_refiner_num_layers": 1,
    "hidden_size": 48,
    "latents_dim": 4,
    "audio_latents_dim": 20,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "ffn_hidden_size": 40,
    "text_dim": 24,
    "timestep_input_dim": 32,
    "time_embed_hidden_size": 40,
    "time_embed_dim": 16,
    "rope_inv_freq_len": 2,
}


def next_dit(**config: Any) -> nn.Module:
    """ComfyUI's network. Its Z-Image embeds times in 256 channels, which are more than a tiny model has."""
    network = NextDiT(**config)
    if config.get("z_image_modulation"):
        rest = {key: config[key] for key in ("dtype", "device", "operations")}
        network.t_embedder = TimestepEmbedder(config["dim"], output_size=config["dim"], **rest)
    return network


def build(kind: Any, config: dict[str, Any], drawn: torch.Generator) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network with random weights, and these as they are stored."""
    ours = "image_model", "context_size", "clip_dim", "pose_dim", "face"
    known = {key: value for key, value in config.items() if key not in ours}
    network = kind(**known, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    if "face" in config:
        small_face(network)
    stored = {}
    for name, weight in sorted(network.state_dict().items()):
        random = torch.randn(weight.shape, generator=drawn)
        if name.endswith(".kernel"):
            # Files hold it, always the same.
            random = weight
        elif weight.ndim == 1:
            # Scales of norms are about 1, biases small.
            about_1 = "norm" in name or name.split(".")[-2] in ("ln_q", "ln_k") or name.endswith("embedder.0.weight")
            about_1 |= name.startswith("img_emb.proj.")
            random = 1 + 0.2 * random if about_1 and name.endswith(".weight") else 0.1 * random
        elif "pos_embed" not in name and "scale_shift" not in name:
            random = random / weight[0].numel() ** 0.5
        stored[name] = random.to(torch.float8_e4m3fn)
    network.load_state_dict({name: weight.float() for name, weight in stored.items()})
    return network.eval(), stored


def save(name: str, family: str, config: dict[str, Any], network: nn.Module, stored: Any, given: Any) -> None:
    """Run one forward, and write it with what it was made of; ``given`` may hold lists, numbers and ROPE options."""

    def run(dtype: torch.dtype) -> Tensor:
        def cast(value: Any) -> Any:
            if isinstance(value, list):
                return list(map(cast, value))
            return value.to(dtype) if value.is_floating_point() else value

        rest = {key: value for key, value in given.items() if key not in ("x", "timestep", *args)}
        rest = {key: value if key == GUIDANCE else cast(value) for key, value in rest.items()} | args
        if "rope_options" in rest:
            rest["transformer_options"] = {"rope_options": rest.pop("rope_options")}
        if "timestep_r" in rest:
            levels = torch.cat((given["timestep"][:1], rest.pop("timestep_r")[:1])).float() / 1000
            rest["transformer_options"] = {"sigmas": levels[:1], "sample_sigmas": levels}
        network.to(dtype)
        for part in vars(network)["_modules"].keys() & FP32:
            network.get_submodule(part).float()
        for name, buffer in tables.items():
            # Files don't hold these, so ComfyUI leaves them in fp32.
            owner, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(owner), leaf, buffer)
        with torch.inference_mode():
            out: Tensor = network(cast(given["x"]), given["timestep"], **rest)
        return out.clone().contiguous()

    tables = {name: buffer for name, buffer in network.named_buffers() if name not in network.state_dict()}
    args = {
        key: value
        for key, value in given.items()
        if not all(isinstance(each, Tensor) for each in (value if isinstance(value, list) else [value]))
    }
    tensors = {f"weights.{key}": value for key, value in stored.items()} | {"out": run(torch.float32)}
    for key, value in given.items():
        if isinstance(value, list) and key not in args:
            tensors |= {f"in.{key}.{number}": each for number, each in enumerate(value)}
        elif key not in args:
            tensors[f"in.{key}"] = value
    metadata = {"family": family, "case": name, "comfyui": comfyui_version.__version__, "config": json.dumps(config)}
    if args:
        metadata["args"] = json.dumps(args)
    error = float((run(torch.bfloat16) - tensors["out"]).norm() / tensors["out"].norm())
    if error > BF16:
        metadata["bf16"] = f"{error:.4f}"
    save_file(tensors, OUT / f"{name}.safetensors", metadata)


def given_pictures() -> None:
    """HiDream with a wider picture beside the image, and Cosmos-Predict2 with a time for each frame of two videos."""
    drawn = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn)

    network, stored = build(HiDreamImageTransformer2DModel, HIDREAM, drawn)
    given = {"x": noise(2, 16, 7, 9), "timestep": torch.tensor([650.0, 33.25]), "image_cond": noise(2, 16, 7, 12)}
    given |= {"context": noise(2, 5, 24), "encoder_hidden_states_llama3": noise(2, 2, 6, 20), "y": noise(2, 12)}
    save("hidream_edit", "hidream", HIDREAM, network, stored, given)
    network, stored = build(MiniTrainDIT, COSMOS, drawn)
    times = torch.tensor([[0.0, 0.25, 0.5], [0.875, 0.875, 0.0]])
    given = {"x": noise(2, 17, 3, 7, 10), "timestep": times, "context": noise(2, 5, 24), "fps": 16.0}
    save("cosmos_predict2_frames", "cosmos_predict2", COSMOS, network, stored, given)


def sample(name: str, stored: dict[str, Tensor], drawn: torch.Generator) -> None:
    """Run ComfyUI's samplers on SD3.5, and write what they came to."""
    weights = {f"model.diffusion_model.{key}": value.float() for key, value in stored.items()}
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})

    def condition() -> tuple[Tensor, Tensor]:
        return torch.randn(1, 11, 48, generator=drawn), torch.randn(1, 40, generator=drawn)

    positive, negative = condition(), condition()
    noise, latent = torch.randn(1, 16, 12, 14, generator=drawn), torch.zeros(1, 16, 12, 14)
    tensors = {"noise": noise, "latent": latent}
    for sign, (context, y) in {"positive": positive, "negative": negative}.items():
        tensors |= {f"{sign}.context": context, f"{sign}.y": y}
    conditions = [[[context, {"pooled_output": y}]] for context, y in (positive, negative)]
    for run in RUNS:
        sampler, scheduler = run.split("|")
        # What KSampler runs on: for some samplers it drops the last level but one of one step more.
        sigmas = comfy.samplers.KSampler(model, STEPS, torch.device("cpu"), sampler, scheduler).sigmas
        out = comfy.sample.sample(model, noise, STEPS, CFG, sampler, scheduler, *conditions, latent, seed=SEED)
        tensors |= {f"{run}.sigmas": sigmas.clone().contiguous(), f"{run}.out": out.clone().contiguous()}
    metadata = {"cfg": str(CFG), "seed": str(SEED), "steps": str(STEPS), "runs": json.dumps(RUNS)}
    metadata |= {"case": name, "comfyui": comfyui_version.__version__}
    save_file(tensors, OUT / "sampling" / f"{name}.safetensors", metadata)


def qwen_image() -> None:
    """Layered with a row for each image, references beside each other, several frames beside references at time 0."""
    drawn = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn)

    def make(name: str, sides: tuple[int, int, int], references: list[tuple[int, int, int]], **more: Any) -> None:
        config = {**QWEN, **{key: more.pop(key) for key in list(more) if key in inspect.signature(kind).parameters}}
        network, stored = build(kind, config, drawn)
        given = {"x": noise(2, 4, *sides), "timestep": torch.tensor([0.7373, 0.251]), "context": noise(2, 7, 24)}
        given |= {"ref_latents": [noise(2, 4, *each) for each in references], **more}
        save(name, "qwen_image", config, network, stored, given)

    kind = QwenImageTransformer2DModel
    layered = {"default_ref_method": "negative_index", "use_additional_t_cond": True}
    make("qwen_layered", (3, 7, 9), [(1, 7, 9), (1, 4, 5)], **layered, additional_t_cond=torch.tensor([1, 0]))
    make("qwen_offset", (1, 8, 11), [(1, 5, 9), (1, 9, 4), (1, 3, 3)], ref_latents_method="offset")
    make("qwen_frames_zero", (2, 5, 4), [(3, 4, 5), (1, 2, 9)], default_ref_method="index_timestep_zero")


def krea2() -> None:
    """Groups of heads in text and image, references at time 0, and heads as wide as the published model's."""
    drawn = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn)

    def make(name: str, batch: int, sides: tuple[int, int], references: list[tuple[int, int]], **more: Any) -> None:
        config = {**KREA2, **more}
        network, stored = build(SingleStreamDiT, config, drawn)
        given = {"x": noise(batch, 4, 1, *sides), "timestep": torch.tensor([0.7373, 0.251])[:batch]}
        given["context"] = noise(batch, 11, config["txtlayers"] * config["txtdim"])
        if references:
            given["ref_latents"] = [noise(batch, 4, 1, *each) for each in references]
            given["ref_latents_method"] = "index_timestep_zero"
        save(name, "krea2", config, network, stored, given)

    make("krea2_gqa", 2, (9, 14), [])
    make("krea2_zero", 2, (7, 12), [(9, 8), (5, 11)])
    make("krea2_128", 1, (10, 9), [(9, 12), (8, 7)], features=128, heads=1, kvheads=1, layers=1, txtheads=1)


def wan() -> None:
    """What Fun control, cameras, VACE and first and last frames add, and videos beside the video."""
    drawn = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn)

    def make(name: str, sides: tuple[int, int, int], kind: Any = wan_model.WanModel, **more: Any) -> None:
        config = {**WAN, **{key: more.pop(key) for key in list(more) if key in inspect.signature(kind).parameters}}
        network, stored = build(kind, config, drawn)
        given = {"x": noise(2, config["in_dim"], *sides), "timestep": torch.tensor([737.0, 250.5])}
        save(name, "wan", config, network, stored, {**given, "context": noise(2, 7, 24), **more})

    # The width of CLIP's tokens is no setting.
    clip = wan_model.MLPProj
    wan_model.MLPProj = lambda width, *rest, **settings: clip(40, *rest, **settings)
    seen = {"model_type": "i2v", "in_dim": 9, "clip_fea": noise(2, 10, 40)}
    make("wan_flf", (2, 7, 9), **seen, flf_pos_embed_token_number=10)
    make("wan_i2v_without_image", (1, 6, 5), model_type="i2v", in_dim=9)
    seen |= {"in_dim": 12, "in_dim_ref_conv": 4, "reference_latent": noise(2, 4, 6, 8)}
    make("wan_fun", (3, 6, 8), **seen)
    times = torch.tensor([[0.0, 737.0, 368.5], [250.5, 250.5, 250.5]])
    make("wan_fun_frames", (3, 4, 6), in_dim_ref_conv=4, reference_latent=noise(2, 4, 4, 6), timestep=times)
    stretched = {"scale_t": 0.75, "shift_t": 1.0, "scale_x": 1.5, "scale_y": 0.5, "shift_x": -2.0, "shift_y": 3.0}
    beside = {"time_dim_concat": noise(2, 4, 2, 5, 7), "context_latents": [noise(2, 4, 2, 5, 3), noise(2, 4, 1, 8, 6)]}
    make("wan_beside", (3, 5, 7), **beside, timestep=times, rope_options=stretched)
    camera = {
        "kind": wan_model.CameraWanModel,
        "in_dim_control_adapter": 3,
        "camera_conditions": noise(2, 3, 3, 48, 64),
    }
    make("wan_camera", (3, 6, 8), **camera, model_type="camera", in_dim=8, clip_fea=noise(2, 5, 40))
    make("wan_camera_22", (3, 6, 8), **camera, model_type="camera_2.2", in_dim=9)
    vace = {"model_type": "vace", "num_layers": 4, "vace_layers": 2, "vace_in_dim": 12}
    given = {"vace_context": noise(2, 2, 12, 3, 6, 8), "vace_strength": [1.0, 0.625]}
    make("wan_vace", (3, 6, 8), kind=wan_model.VaceWanModel, **vace, **given)
    wan_model.MLPProj = clip


def small_face(network: Any) -> None:
    """Animate's network with an encoder of small pictures of a face, of ComfyUI's own parts: theirs has one size."""
    settings = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    plain = {"dtype": torch.float32, "device": "cpu"}
    encoder, face = network.motion_encoder.enc, network.face_encoder
    encoder.net_app.convs = nn.ModuleList(
        [
            wan_animate.ConvLayer(3, 6, 1, **settings),
            wan_animate.ResBlock(6, 8, **settings),
            wan_animate.ResBlock(8, 10, **settings),
            wan_animate.EqualConv2d(10, 12, 4, padding=0, bias=False, **settings),
        ]
    )
    sizes = [(12, 12)] * 4 + [(12, 4)]
    encoder.fc = nn.Sequential(*(wan_animate.EqualLinear(*each, **settings) for each in sizes))
    network.motion_encoder.dec.direction = wan_animate.Direction(4, **settings)
    face.conv1_local = wan_animate.CausalConv1d(512, 4 * 6, 3, operations=settings["operations"], **plain)
    for name in ("conv2", "conv3"):
        setattr(face, name, wan_animate.CausalConv1d(6, 6, 3, stride=2, operations=settings["operations"], **plain))
    for name in ("norm1", "norm2", "norm3"):
        setattr(face, name, nn.LayerNorm(6, elementwise_affine=False, eps=1e-6))
    face.out_proj = nn.Linear(6, network.dim)


def posed() -> None:
    """Poses, references and faces: SCAIL, both ways of SCAIL-2, and Animate."""
    drawn = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn)

    def make(name: str, kind: Any, sides: tuple[int, int, int], **more: Any) -> None:
        known = ("model_type", "in_dim", "mask_in_dim", "num_layers")
        config = {**WAN, "clip_dim": 40, **{key: more.pop(key) for key in known if key in more}, **more.pop("own", {})}
        network, stored = build(kind, config, drawn)
        given = {"x": noise(2, config["in_dim"], *sides), "timestep": torch.tensor([737.0, 250.5])}
        save(name, "wan", config, network, stored, {**given, "context": noise(2, 7, 24), **more})

    clip = wan_model.MLPProj
    wan_model.MLPProj = lambda width, *rest, **settings: clip(40, *rest, **settings)
    stretched = {"scale_t": 0.75, "shift_t": 1.0, "scale_x": 1.5, "scale_y": 0.5, "shift_x": -2.0, "shift_y": 3.0}
    scail = {"model_type": "scail", "in_dim": 8, "clip_fea": noise(2, 5, 40)}
    scail |= {"reference_latent": noise(2, 8, 1, 7, 9), "pose_latents": noise(2, 8, 3, 4, 5)}
    make("wan_scail", wan_model.SCAILWanModel, (3, 7, 9), **scail)
    both = {**scail, "model_type": "scail2", "mask_in_dim": 6, "sam_latents": noise(2, 6, 2, 3, 4)}
    both |= {"reference_latent": noise(2, 8, 2, 6, 8), "pose_latents": noise(2, 8, 2, 3, 4)}
    both |= {"time_dim_concat": noise(2, 8, 1, 6, 8), "ref_mask_latents": noise(2, 6, 5, 6, 8)}
    make("wan_scail2", wan_model.SCAIL2WanModel, (2, 6, 8), **both, ref_mask_flag=True)
    options = {"ref_mask_flag": False, "rope_options": stretched}
    make("wan_scail2_replaced", wan_model.SCAIL2WanModel, (2, 6, 8), **both, **options)
    face = {"widths": [6, 8, 10], "style": 12, "motion": 4, "outputs": 512, "face": 6}
    animate = {"model_type": "animate", "in_dim": 6, "num_layers": 10, "own": {"pose_dim": 16, "face": face}}
    animate |= {"pose_latents": noise(2, 16, 2, 4, 6), "face_pixel_values": noise(2, 3, 9, 16, 16)}
    make("wan_animate", wan_animate.AnimateWanModel, (5, 4, 6), **animate, clip_fea=noise(2, 5, 40))
    wan_model.MLPProj = clip


def kandinsky5() -> None:
    """A given first part of a video, stretched positions, and an image."""
    drawn = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn)

    def make(name: str, x: Tensor, given: dict[str, Any], **more: Any) -> None:
        config = {**KANDINSKY5, **more}
        network, stored = build(Kandinsky5, config, drawn)
        given = {"x": x, "timestep": torch.tensor([737.0, 250.5]), "context": noise(2, 7, 24), **given}
        save(name, "kandinsky5", config, network, stored, {**given, "y": noise(2, 14)})

    stretched = {"scale_t": 0.75, "shift_t": 1.0, "scale_x": 1.5, "scale_y": 0.5, "shift_x": -2.0, "shift_y": 3.0}
    make("kandinsky5_i2v", noise(2, 9, 3, 6, 10), {"time_dim_replace": noise(2, 4, 2, 6, 10)})
    make("kandinsky5_stretched", noise(2, 9, 4, 4, 6), {"rope_options": stretched}, num_text_blocks=1)
    image = {"visual_embed_dim": 16, "rope_scale_factor": [1.0, 1.0, 1.0]}
    make("kandinsky5_image", noise(2, 4, 10, 14), {}, **image)


def hunyuan() -> None:
    """Distilled models, the refiner of images, a video beside the video, and a first frame that is given."""
    drawn = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn)

    def make(name: str, batch: int, sides: tuple[int, ...], **more: Any) -> None:
        config = {**HUNYUAN, **{key: more.pop(key) for key in list(more) if key in HUNYUAN}}
        network, stored = build(hunyuan_model.HunyuanVideo, config, drawn)
        given = {"x": noise(batch, config["in_channels"], *sides), "timestep": torch.tensor([750.0, 750.0])[:batch]}
        given["context"] = noise(batch, 9, 24)
        save(name, "hunyuan_video", config, network, stored, {**given, **more})

    # The widths of ByT5's mapper are no setting.
    mapper = hunyuan_model.ByT5Mapper
    hunyuan_model.ByT5Mapper = lambda **settings: mapper(**{**settings, "in_dim": 28, "out_dim": 36, "hidden_dim": 36})
    image = {"patch_size": [1, 1], "axes_dim": [6, 6], "in_channels": 8, "out_channels": 8, "byt5": True}
    image |= {"guidance_embed": True, "meanflow": True, "guidance": torch.tensor([3.5, 3.5])}
    image |= {"txt_byt5": noise(2, 6, 28), "timestep_r": torch.tensor([500.0, 500.0])}
    make("hunyuan_image_distilled", 2, (5, 7), **image)
    refiner = {"patch_size": [1, 1, 1], "in_channels": 16, "out_channels": 8, "guidance_embed": True, "meanflow": True}
    make("hunyuan_image_refiner", 1, (2, 5, 6), **refiner, guidance=torch.tensor([6.0]), disable_time_r=True)
    seen = {"patch_size": [1, 1, 1], "in_channels": 17, "out_channels": 8, "depth_single_blocks": 0, "byt5": True}
    seen |= {"meanflow": True, "meanflow_sum": True, "vision_in_dim": 20, "use_cond_type_embedding": True}
    seen |= {"txt_byt5": noise(2, 6, 28), "clip_fea": noise(2, 5, 20), "timestep_r": torch.tensor([500.0, 500.0])}
    make("hunyuan_video_15_distilled", 2, (3, 5, 4), **seen)
    hunyuan_model.ByT5Mapper = mapper
    pooled = {"vec_in_dim": 20, "guidance_embed": True, "guidance": torch.tensor([6.0]), "y": noise(1, 20)}
    make("hunyuan_video_beside", 1, (2, 6, 8), **pooled, ref_latent=noise(1, 16, 1, 7, 6))
    given = {"guiding_frame_index": torch.tensor([0.0])}
    make("hunyuan_video_replace_beside", 1, (3, 4, 6), **pooled, **given, ref_latent=noise(1, 16, 1, 4, 4))


def minimax_h3() -> None:
    """Everything at once: keyframes, references and masks, noise on what is given, and shifts of another model."""
    drawn = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn)

    network, stored = build(MiniMaxH3Model, MINIMAX_H3, drawn)
    network.requires_grad_(False)
    text, tags = noise(1, 9, 24), torch.tensor([1, 1, 0, 0, 0, 1, 2, 1, 1])
    keyframes: list[dict[str, Any]] = [
        {"resolved_frame_index": 2, "latent": noise(1, 4, 2, 6, 8), "audio_latent": noise(1, 20, 2, 3)},
        {"resolved_frame_index": 16, "latent": noise(1, 4, 1, 6, 8)},
    ]
    refs: list[dict[str, Any]] = [
        {
            "kind": "video",
            "latent_t": 3,
            "latent_h": 4,
            "latent_w": 4,
            "ref_audio_t": 0,
            "latent": noise(1, 4, 3, 4, 4),
        },
        {"kind": "image", "latent_h": 2, "latent_w": 6, "latent": noise(1, 4, 1, 2, 6)},
    ]
    payload = {
        "text_token_tags": tags,
        "keyframes": keyframes,
        "refs": refs,
        "cond_video_latents": [each["latent"] for each in (*keyframes, *refs)],
        "cond_audio_latents": [keyframes[0]["audio_latent"]],
        "seed": SEED,
        "audio_scale": 5.0,
        "visual_cond_noise_aug": 0.875,
        "audio_cond_noise_aug": 0.75,
    }
    shifts = {"minimax_h3_sigma_shift_video": 10.0, "minimax_h3_sigma_shift_audio": 2.0}
    levels = torch.tensor([0.0, 0.25, 0.625, 1.0])
    given = {
        "x": [noise(1, 4, 6, 6, 8), noise(1, 20, 2, 11)],
        "timestep": torch.tensor([640.0]),
        "denoise_mask": levels[torch.randint(4, (1, 1, 6, 6, 8), generator=drawn)],
        "audio_denoise_mask": levels[torch.randint(4, (1, 1, 2, 11), generator=drawn)],
    }
    tensors = {f"weights.{key}": value for key, value in stored.items()} | {"pre.cross_attn": text}

    def named(name: str, value: Any) -> Any:
        """With the names of tensors, which are put by, in their places."""
        if isinstance(value, dict):
            return {key: named(f"{name}.{key}", each) for key, each in value.items()}
        if isinstance(value, list):
            return [named(f"{name}.{number}", each) for number, each in enumerate(value)]
        if isinstance(value, Tensor):
            tensors[name] = value.clone()
            return f"@{name}"
        return value

    named("in", given)
    args = {"minimax_payload": named("in.minimax_payload", payload), **shifts}

    def run(dtype: torch.dtype) -> list[Tensor]:
        network.to(dtype)
        for name in ("video_patch_proj", "audio_patch_proj", "time_embedder", "rope"):
            network.get_submodule(name).float()
        for name in ("video_out", "audio_out"):
            network.get_submodule(f"final_layer.{name}").float()
        masks = {name: given[name].to(dtype) for name in ("denoise_mask", "audio_denoise_mask")}
        x, context = [each.to(dtype) for each in given["x"]], network.preprocess_text_embeds(text.to(dtype))
        with torch.inference_mode():
            outs = network(x, given["timestep"], context, shifts, minimax_payload=payload, **masks)
        return [each.clone().contiguous() for each in outs]

    outs = run(torch.float32)
    tensors |= {f"out.{number}": each for number, each in enumerate(outs)}
    tensors["in.context"] = network.preprocess_text_embeds(text).clone()
    metadata = {"family": "minimax_h3", "case": "minimax_h3_mixed", "comfyui": comfyui_version.__version__}
    metadata |= {"config": json.dumps(MINIMAX_H3), "args": json.dumps(args)}
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(run(torch.bfloat16), outs, strict=True))
    if error > BF16:
        metadata["bf16"] = f"{error:.4f}"
    save_file(tensors, OUT / "minimax_h3_mixed.safetensors", metadata)


def main() -> None:
    """Make them all."""
    given_pictures()
    drawn = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn)

    for name, dual in {"sd35_medium": [0], "sd35_large": []}.items():
        config = {**SD35, "x_block_self_attn_layers": dual}
        network, stored = build(MMDiT, config, drawn)
        given = {"x": noise(2, 16, 17, 20), "timestep": torch.tensor([700.0, 350.5])}
        save(name, "sd3", config, network, stored, {**given, "context": noise(2, 10, 48), "y": noise(2, 40)})
    sample("sd35_large", stored, drawn)
    network, stored = build(PixArtMS, PIXART, drawn)
    given = {"x": noise(1, 4, 34, 46), "timestep": torch.tensor([421.0]), "context": noise(1, 30, 48)}
    given |= {"c_size": torch.tensor([[272.0, 368.0]]), "c_ar": torch.tensor([[0.74]])}
    save("pixart_alpha", "pixart", PIXART, network, stored, given)
    network, stored = build(next_dit, LUMINA, drawn)
    given = {"x": noise(2, 4, 8, 9), "timestep": torch.tensor([0.875, 0.125]), "context": noise(2, 10, 24)}
    given |= {"clip_text_pooled": noise(2, 20), "num_tokens": 10}
    save("lumina2_pooled", "lumina2", LUMINA, network, stored, given)
    network, stored = build(next_dit, Z_IMAGE, drawn)
    given = {"x": noise(1, 4, 13, 10), "timestep": torch.tensor([0.625]), "context": noise(1, 20, 24), "num_tokens": 20}
    given |= {"ref_latents": [noise(1, 4, 8, 6), noise(1, 4, 6, 10)], "siglip_feats": [noise(1, 3, 4, 20)]}
    given |= {"ref_contexts": [noise(1, 5, 24), noise(1, 40, 24), noise(1, 9, 24)]}
    given |= {"rope_options": {"scale_x": 1.5, "scale_y": 0.75, "shift_x": -2.0, "shift_y": 3.0}}
    save("z_image_omni", "lumina2", Z_IMAGE, network, stored, given)
    qwen_image()
    krea2()
    wan()
    posed()
    kandinsky5()
    hunyuan()
    minimax_h3()


main()
