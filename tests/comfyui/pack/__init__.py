"""Nodes that only tests use: conditioning and latents from nothing; and ComfyUI gets to know tiny models."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import comfy.controlnet
import comfy.model_detection
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import comfy.weight_adapter
import folder_paths
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from safetensors import safe_open

from . import controlnets, ltx, minimax_h3, pair, quantized, qwen_image_21, shapes, standins, video

try:
    from . import small_anima
except ImportError:
    # This version of ComfyUI has no Anima.
    pass
else:
    small_anima.shrink()
pair.register()
qwen_image_21.register()
video.shrink()

__all__ = ["NODE_CLASS_MAPPINGS", "shapes"]

_detect = comfy.model_detection.detect_unet_config
_load = comfy.utils.load_torch_file
DYNAMIC = bool(os.environ.get("TACO_DIT_TEST_DYNAMIC_VRAM"))
_last: dict[str, str] = {}
"""What the file that was read last says of itself: older versions don't pass that on."""


def load(path: str, *args: Any, **kwargs: Any) -> Any:
    """ComfyUI's, and a note of the metadata."""
    _last.clear()
    if path.endswith(".safetensors"):
        with safe_open(path, framework="pt") as file:
            _last.update(file.metadata() or {})
    if not DYNAMIC:
        return _load(path, *args, **kwargs)
    # Its own way to map a file needs a GPU's driver.
    comfy.memory_management.aimdo_enabled = False
    try:
        return _load(path, *args, **kwargs)
    finally:
        comfy.memory_management.aimdo_enabled = True


def detect(state_dict: Any, key_prefix: str, metadata: Any = None) -> Any:
    """ComfyUI's, with what a tiny model's own metadata says of its sizes."""
    config = _detect(state_dict, key_prefix, metadata=metadata)
    metadata = metadata or _last
    named = json.loads(metadata.get("tacod.config", "{}")).get("image_model")
    if config is None and named in (qwen_image_21.NAME, pair.NAME):
        config = {"image_model": named}
    if config is not None and "tacod.config" in metadata:
        told = json.loads(metadata["tacod.config"])
        # ComfyUI knows SD3 by other means than by this key; a dtype is none in a file's metadata.
        told = {key: value for key, value in told.items() if key != "image_model" or key in config}
        config |= {key: value for key, value in told.items() if not isinstance(config.get(key), torch.dtype)}
        # No settings of ComfyUI's classes.
        for key in ("clip_dim", "byt5_in_dim", "byt5_hidden_dim", "pose_dim", "face"):
            config.pop(key, None)
    return config


if DYNAMIC:
    # What ComfyUI does at its start on a GPU; on a CPU its patchers stay plain ones.
    import comfy.memory_management

    comfy.memory_management.aimdo_enabled = True

try:
    import gguf
except ImportError:
    gguf = None
else:

    class Reader(gguf.GGUFReader):
        """The package's, and a note of what a tiny model's file says of itself."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            field = self.get_field("tacod.config")
            _last.clear()
            if field is not None:
                _last["tacod.config"] = bytes(field.parts[field.data[-1]]).decode()

    gguf.GGUFReader = Reader

comfy.utils.load_torch_file = load
comfy.model_detection.detect_unet_config = detect


class TestConditioning:
    """Random conditioning."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        whole = ("INT", {"default": 0, "min": 0, "max": 2**31})
        names = ("seed", "tokens", "width", "pooled")
        return {"required": dict.fromkeys(names, whole), "optional": dict.fromkeys(standins.BESIDE, whole)}

    def make(self, **sizes: int) -> tuple[Any]:
        return (standins.conditioning(**sizes),)


class TestValues:
    """Values on a conditioning, as nodes of a family leave them; a JSON map."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": ("CONDITIONING",), "values": ("STRING", {"default": "{}"})}}

    def make(self, conditioning: Any, values: str) -> tuple[Any]:
        return ([[context, {**extra, **json.loads(values)}] for context, extra in conditioning],)


class TestLatent:
    """A random latent, as of an image that is to be painted over."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        whole = ("INT", {"default": 1, "min": 0, "max": 2**31})
        names = ("seed", "batch", "channels", "height", "width")
        scale = ("FLOAT", {"default": 1.0})
        frames = ("INT", {"default": 0, "min": 0})
        return {"required": {**dict.fromkeys(names, whole), "scale": scale}, "optional": {"frames": frames}}

    def make(
        self, seed: int, batch: int, channels: int, height: int, width: int, scale: float, frames: int = 0
    ) -> tuple[Any]:
        random = torch.Generator().manual_seed(seed)
        sides = (frames, height, width) if frames else (height, width)
        return ({"samples": scale * torch.randn(batch, channels, *sides, generator=random)},)


class TestMask:
    """The left half."""

    RETURN_TYPES = ("MASK",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        whole = ("INT", {"default": 64, "min": 1, "max": 4096})
        return {"required": {"height": whole, "width": whole}}

    def make(self, height: int, width: int) -> tuple[Any]:
        mask = torch.zeros(1, height, width)
        mask[:, :, : width // 2] = 1
        return (mask,)


class TestConcat:
    """What InpaintModelConditioning leaves on a conditioning, without a VAE."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": ("CONDITIONING",), "latent": ("LATENT",), "mask": ("MASK",)}}

    def make(self, conditioning: Any, latent: Any, mask: torch.Tensor) -> tuple[Any]:
        extra = {"concat_latent_image": latent["samples"], "concat_mask": mask.unsqueeze(1)}
        return ([[context, {**values, **extra}] for context, values in conditioning],)


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet whose residuals are random, differ by step, and stand in several places, as real ones' do."""

    def __init__(self, width: int, tokens: int, only: str = "") -> None:
        super().__init__()
        self.width, self.tokens, self.only = width, tokens, only

    def get_control(self, x: torch.Tensor, t: torch.Tensor, *rest: Any) -> dict[str, Any]:
        random = torch.Generator().manual_seed(int(1000 * float(t[0])))
        one, two = (0.3 * torch.randn(len(x), self.tokens, self.width, generator=random) for _ in range(2))
        lists = {"input": [one, two], "middle": [], "output": [two, None, one]}
        return {name: each if self.only in ("", name) else [] for name, each in lists.items()}

    def copy(self) -> Residuals:
        copied = Residuals(self.width, self.tokens, self.only)
        self.copy_to(copied)
        return copied

    def get_models(self) -> list[Any]:
        return []


class TestControl:
    """A ControlNet of random residuals."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        whole = ("INT", {"default": 1, "min": 1, "max": 2**31})
        only = ("STRING", {"default": ""})
        required = {"conditioning": ("CONDITIONING",), "width": whole, "tokens": whole}
        return {"required": required, "optional": {"only": only}}

    def make(self, conditioning: Any, width: int, tokens: int, only: str = "") -> tuple[Any]:
        control = Residuals(width, tokens, only)
        return ([[context, {**values, "control": control}] for context, values in conditioning],)


class TestAttentionMask:
    """A bias on the attention, as StyleModelApply leaves it."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        whole = ("INT", {"default": 1, "min": 1, "max": 2**31})
        return {"required": {"conditioning": ("CONDITIONING",), "rows": whole, "columns": whole}}

    def make(self, conditioning: Any, rows: int, columns: int) -> tuple[Any]:
        made = []
        for context, values in conditioning:
            tokens = context.shape[1] + rows * columns
            mask = torch.randn(1, tokens, tokens, generator=torch.Generator().manual_seed(4))
            made.append([context, {**values, "attention_mask": mask, "attention_mask_img_shape": (rows, columns)}])
        return (made,)


class TestTextMask:
    """Hides a text's last tokens, as encoders that pad leave it."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": ("CONDITIONING",), "hidden": ("INT", {"default": 1, "min": 1})}}

    def make(self, conditioning: Any, hidden: int) -> tuple[Any]:
        made = []
        for context, values in conditioning:
            mask = torch.ones(context.shape[:2], dtype=torch.long)
            mask[:, -hidden:] = 0
            made.append([context, {**values, "attention_mask": mask}])
        return (made,)


class TestReplace:
    """Reaches into a model in one of the ways that nodes have."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "what": ("STRING", {"default": ""})}}

    def make(self, model: Any, what: str) -> tuple[Any]:
        model = model.clone()
        network = model.model.diffusion_model
        key = "diffusion_model.img_in.weight"
        if what == "patches_replace":
            model.set_model_patch_replace(print, "dit", "double_block", 0)
        elif what == "patches":
            model.set_model_patch(print, "post_input")
        elif what == "attention":
            model.model_options["transformer_options"]["optimized_attention_override"] = print
        elif what == "rounded cache":
            model.model_options["transformer_options"]["qwen_image21_cache"] = {"device": "auto", "dtype": "int8"}
        elif what == "object":
            model.add_object_patch("diffusion_model.double_blocks.0", torch.nn.Identity())
        elif what == "method":
            network.forward_orig = print
        elif what == "instance":
            network.img_in.forward = network.img_in.forward
        elif what == "hook":
            network.img_in.register_forward_hook(lambda module, given, out: out + 1)
        elif what == "look":
            len(network.double_blocks)
        elif what == "multigpu":
            model.deepclone_multigpu(torch.device("cpu"))
        elif what == "multigpu before":
            model.set_additional_models("multigpu", [model.clone()])
        elif what == "wrapper":
            model.add_weight_wrapper(key, print)
        elif what == "kind":
            model.add_patches({key: comfy.weight_adapter.GLoRAAdapter(set(), ())}, 1.0)
        else:
            raise ValueError(what)
        return (model,)


class TestOptions:
    """Options for the network, as nodes leave them on a MODEL; a JSON map."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "values": ("STRING", {"default": "{}"})}}

    def make(self, model: Any, values: str) -> tuple[Any]:
        model = model.clone()
        options = model.model_options["transformer_options"]
        model.model_options["transformer_options"] = {**options, **json.loads(values)}
        return (model,)


class OnModel:
    """A node that takes a MODEL and gives one."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}


class TestCompile(OnModel):
    """ComfyUI's own torch.compile, by a backend that compiles nothing."""

    def make(self, model: Any) -> tuple[Any]:
        model = model.clone()
        set_torch_compile_wrapper(model=model, backend="eager")
        return (model,)


class TestLoader:
    """A loader that calls ComfyUI's by keyword."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"unet_name": ("STRING", {"default": ""})}}

    def make(self, unet_name: str) -> tuple[Any]:
        path = folder_paths.get_full_path("diffusion_models", unet_name)
        return (comfy.sd.load_diffusion_model(unet_path=path, model_options={}),)


class TestForget(OnModel):
    """A MODEL on which nobody has noted its file, as a loader of one's own gives it."""

    def make(self, model: Any) -> tuple[Any]:
        del model.model.taco_dit_file
        model.cached_patcher_init = None
        return (model,)


class TestHints:
    """A MODEL whose notes name these files, one a line, as other packs' loaders leave them."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "paths": ("STRING", {"default": ""})}}

    def make(self, model: Any, paths: str) -> tuple[Any]:
        first, *more = paths.split("\n")
        model = model.clone()
        model.model.taco_dit_file = first
        model.cached_patcher_init = (print, (more, 1, None))
        return (model,)


class TestUnnamed:
    """Hands on a MODEL that came in by another name than usual."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": ("MODEL",)}}

    def make(self, file: Any) -> tuple[Any]:
        return (file,)


class TestDynamic(OnModel):
    """A MODEL that tells the nodes that its patcher is one of dynamic VRAM's; ComfyUI itself would use it as one."""

    def make(self, model: Any) -> tuple[Any]:
        model.is_dynamic = lambda: sys._getframe(1).f_globals["__name__"].endswith("taco_dit.source")
        return (model,)


class TestUNet:
    """A UNet of the kind of SD 1.5, as small as it gets."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def make(self) -> tuple[Any]:
        sizes = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2]}
        depths = {"num_res_blocks": [1, 1], "transformer_depth": [1, 1], "transformer_depth_output": [1] * 4}
        heads = {"num_heads": 4, "context_dim": 16, "use_spatial_transformer": True, "transformer_depth_middle": 1}
        config = comfy.supported_models.SD15({**sizes, **depths, **heads, "adm_in_channels": None})
        config.set_inference_dtype(torch.float32, None)
        device = torch.device("cpu")
        base = config.get_model({}, "", device=device)
        return (comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=device),)


class TestSize:
    """Shows how large ComfyUI's memory manager takes a model to be, in bytes."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "show"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def show(self, model: Any) -> dict[str, Any]:
        return {"ui": {"text": (str(model.model_size()),)}}


_NODES = (
    TestReplace,
    TestOptions,
    TestCompile,
    TestLoader,
    TestForget,
    TestHints,
    TestUnnamed,
    TestDynamic,
    TestUNet,
    TestSize,
    TestConditioning,
    TestValues,
    TestLatent,
    TestMask,
    TestConcat,
    TestControl,
    TestAttentionMask,
    TestTextMask,
)
_OF_OTHERS = (controlnets, ltx, minimax_h3, pair, quantized, qwen_image_21, standins, video)
NODE_CLASS_MAPPINGS: dict[str, Any] = {}
for _kind in (*_NODES, *(kind for each in _OF_OTHERS for kind in each.NODES)):
    if NODE_CLASS_MAPPINGS.setdefault(_kind.__name__, _kind) is not _kind:
        raise ValueError(f"two test nodes are named {_kind.__name__}")
