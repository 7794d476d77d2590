"""ComfyUI's own workflow templates, with our loader behind theirs: each does as without it, or is refused by name.

Of each template's graph this runs what its samplers depend on. Files that one has to download, pictures and sizes are
stand-ins; the nodes, their links and their values are the template's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from comfyui_graphs import CANNY, FILL, FLUX, Pair, TinyModel
from comfyui_server import ComfyUI, Graph, Outcome
from helpers import relative_error
from image_cases import CASES, Sizes, write
from stock_templates import Template, templates
from test_hunyuan import CASES as HUNYUAN
from test_hunyuan import SEEN_WIDTH
from test_workflows import save_lora

Both = Callable[..., Outcome]

LOADERS = ("UNETLoader", "CheckpointLoaderSimple")
SOURCES = {
    "z_image": r"z_image",
    "lumina2": r"NetaYume",
    "krea2": r"krea2",
    "qwen_layered": r"qwen_image_layered",
    "qwen_edit_2511": r"qwen_image_edit_2511",
    "qwen_edit": r"qwen_image_edit|FireRed-Image-Edit",
    "qwen_image": r"qwen_image",
    "flux2_klein": r"flux-2-klein",
    "flux2_dev": r"flux2_dev",
    "chroma": r"Chroma1-HD",
    "chroma_radiance": r"chroma-radiance",
    "longcat_edit": r"longcat_image",
    "hidream": r"hidream_[ie]1",
    "anima": r"anima-",
    "hunyuan_video_t2v": r"hunyuan_video_t2v",
    "hunyuan_video_15": r"hunyuanvideo1\.5_720p",
    "fill": r"flux\.?1-fill",
    "canny": r"flux1-canny",
    "flux": r"flux1-",
}
"""The tiny models that stand in for the files whose names match; the first that does."""
FLUXES = {model.tiny.name: model for model in (FLUX, FILL, CANNY)}

HONOURED = {
    *("BasicGuider", "CFGGuider", "DualCFGGuider"),
    *("KSampler", "SamplerCustom", "EasyCache"),
    *("BasicScheduler", "BetaSamplingScheduler"),
    *("ModelSamplingAuraFlow", "ModelSamplingFlux", "ModelSamplingSD3"),
    *("CFGNorm", "DifferentialDiffusion", "ChromaRadianceOptions", "LoraLoaderModelOnly", "ComfySwitchNode"),
}
"""Nodes that are handed a MODEL and do with ours what they do with ComfyUI's."""
REFUSED = {
    "QwenImageDiffsynthControlnet": "patches of '(noise_refiner', ')?double_block' "
    r"\((ZImageControl|DiffSynthCnet)Patch,",
    "AnimaLLLiteApply": "patches of 'post_input', 'attn1_patch', 'attn2_patch', 'mlp_patch' "
    r"\(AnimaLLLiteAttentionPatch, AnimaLLLiteMLPPatch, AnimaLLLitePatch,",
    "USOStyleReference": r"patches of 'post_input' \(UsoStyleProjectorPatch,",
    "FluxKVCache": r"a replacement of diffusion_model\.params\.default_ref_method",
}
"""Nodes that put code into the network, and what the refusal calls it."""

EFFECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "CFGNorm": ("qwen_edit", {"strength": 1.0}),
    "DifferentialDiffusion": ("krea2", {}),
    "ModelSamplingAuraFlow": ("z_image", {"shift": 7.0}),
    "ModelSamplingFlux": ("krea2", {"max_shift": 2.0, "base_shift": 0.3, "width": 512, "height": 512}),
    "ModelSamplingSD3": ("hidream", {"shift": 6.0}),
}
"""A tiny model and values with which these change the result, if the loader doesn't drop what they put on a MODEL."""

CUT_TO_TEXT = ("CLIPTextEncodeFlux",)
"""Nodes that ask more of a text encoder than the stand-in has."""
STEPS = 3
SIDE, CELL = 256, 32
"""Of pictures and of a latent's cells, in pixels. Some nodes scale a picture to a million pixels, then encode it."""


def golden_of(file: str) -> str | None:
    """The tiny model that stands in for a file; None if it is of another family."""
    return next((golden for golden, pattern in SOURCES.items() if re.search(pattern, file)), None)


@dataclass
class Cut:
    """A sampler of a template, and what it depends on."""

    template: Template
    sampler: str
    known: Mapping[str, Any]
    """ComfyUI's nodes, and what they take."""

    @cached_property
    def goldens(self) -> set[str]:
        """The tiny models that stand in for the files that its MODEL may be from."""
        nodes = (self.template.nodes[node] for node in self.on_model)
        values = {str(value) for node in nodes if node.kind in LOADERS for value in node.widgets}
        return {golden for value in values if (golden := golden_of(value)) is not None}

    @cached_property
    def on_model(self) -> set[str]:
        """Its MODEL's nodes, from the loader to the sampler, and those that are handed it on the side."""
        found: set[str] = set()
        pending = [self.sampler]
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                links = self.template.nodes[node].links.values()
                pending += [each.node for each in links if each.type in ("MODEL", "GUIDER", "SIGMAS", "*")]
        return found

    @cached_property
    def kinds(self) -> set[str]:
        """The kinds of nodes that are handed the MODEL."""
        nodes = (self.template.nodes[node] for node in self.on_model)
        return {node.kind for node in nodes if any(each.type == "MODEL" for each in node.links.values())}

    def graph(self, model: Model, branch: str) -> Graph:
        """In API form, with a tiny model; in every branch but ``stock`` our loader is behind the template's."""
        graph: Graph = {
            "file": {"class_type": "UNETLoader", "inputs": {"unet_name": model.file, "weight_dtype": "default"}}
        }
        if branch != "stock":
            ours = {"enable_taco_dit": True, "sequence_parallel_degree": 3, "model": ["file", 0]}
            graph["loader"] = {"class_type": "TACODiTModelLoader", "inputs": ours}
        head = "file" if branch == "stock" else "loader"
        within = f"{self.template.name}/{branch}/"

        def add(name: str, kind: str, **inputs: Any) -> list[Any]:
            graph[within + name] = {"class_type": kind, "inputs": inputs}
            return [within + name, 0]

        def link(node: str, slot: int, kind: str, by: str) -> Any:
            stand_in = model.stand_in(kind, by)
            if stand_in is not None:
                return add(kind + by, stand_in[0], **stand_in[1])
            source = self.template.nodes[node]
            if source.kind in LOADERS and kind in ("MODEL", "*"):
                return [head, 0]
            if source.kind in CUT_TO_TEXT:
                return add(f"text {node}", "TestConditioning", seed=1, tokens=11, **model.text)
            if within + node not in graph:
                graph[within + node] = {}
                graph[within + node] = self._node(node, model, link)
            return [within + node, slot]

        end = link(self.sampler, 0, "LATENT", "")
        graph[f"{within}save {self.sampler}"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": end, "filename_prefix": self.saved(branch)},
        }
        return graph

    def saved(self, branch: str) -> str:
        """What its latent is saved as."""
        return re.sub(r"\W", "_", f"{self.template.name}_{self.sampler}_{branch}")

    def _node(self, name: str, model: Model, link: Any) -> dict[str, Any]:
        node = self.template.nodes[name]
        takes = self.known[node.kind]["input"]
        inputs = node.values(takes)
        fixed = model.fixed(node.kind, {**takes.get("required", {}), **takes.get("optional", {})})
        for key, source in node.links.items():
            if key not in fixed and source.type != "STRING":
                inputs[key] = link(source.node, source.slot, source.type, node.kind)
        for key, (kind, *_) in takes.get("required", {}).items():
            if isinstance(kind, list) and key not in fixed and isinstance(inputs.get(key), str):
                # What only another pack has becomes the first that ComfyUI has.
                inputs[key] = inputs[key] if inputs[key] in kind else kind[0]
            # A blueprint's pictures are what one connects to it.
            if key not in inputs and isinstance(kind, str) and model.stand_in(kind, node.kind) is not None:
                inputs[key] = link("", 0, kind, node.kind)
        return {"class_type": node.kind, "inputs": inputs | fixed}

    @cached_property
    def shape(self) -> str:
        """What tells it from samplers that do other things: neither names nor texts nor seeds."""

        def of(name: str) -> Any:
            node = self.template.nodes[name]
            values = node.values(self.known[node.kind]["input"])
            kept = {key: value for key, value in values.items() if not isinstance(value, str) or len(value) < 30}
            kept = {key: value for key, value in kept.items() if "seed" not in key}
            cut = ("IMAGE", "MASK", "CLIP", "VAE", "STRING", "CONTROL_NET", "MODEL_PATCH")
            below = {key: of(each.node) for key, each in node.links.items() if each.type not in cut}
            return [node.kind, kept, below]

        return json.dumps(of(self.sampler), sort_keys=True)


class Model:
    """A tiny model as it stands in for a template's."""

    def __init__(self, golden: str, models: Path) -> None:
        self.golden = golden
        self.sizes: TinyModel | Sizes
        if golden in FLUXES:
            self.sizes, self.beside, self.frames = FLUXES[golden], {}, False
            self.config = FLUXES[golden].tiny.config
            save_lora(FLUXES[golden], models / "loras" / self.file)
        else:
            case = next(case for case in (*CASES, *HUNYUAN.values()) if case.golden == golden)
            write(case, models)
            self.sizes, self.beside, self.frames = Sizes(case), case.text, case.has_frames
            self.config = case.model().config

    @property
    def file(self) -> str:
        """Its name, and its LoRA's."""
        return f"{self.golden}.safetensors"

    @property
    def text(self) -> dict[str, int]:
        """Sizes of what its text encoders give."""
        return {"width": self.sizes.width, "pooled": self.sizes.pooled, **self.beside}

    def stand_in(self, kind: str, by: str) -> tuple[str, dict[str, Any]] | None:
        """What comes over links of this kind into nodes of the kind ``by``; None for what is the template's own."""
        config = json.dumps(self.config)
        vae = {"channels": self.sizes.channels, "frames": self.frames, "side": CELL}
        if self.golden in HUNYUAN:
            vae = {"channels": self.sizes.channels, "pixels": self.pixels}
        control = "qwen_inpaint" if "Inpainting" in by else "qwen"
        patch = {"AnimaLLLiteApply": "anima", "USOStyleReference": "uso"}.get(by, self.golden)
        return {
            "IMAGE": ("TestImage", {"height": SIDE, "width": SIDE}),
            "MASK": ("TestMask", {"height": SIDE, "width": SIDE}),
            "CLIP": ("TestClip", self.text),
            "VAE": ("TestVideoVAE" if self.golden in HUNYUAN else "TestImageVAE", vae),
            "CONTROL_NET": ("TestControlNet", {"sort": control, "config": config}),
            "MODEL_PATCH": ("TestModelPatch", {"sort": patch, "config": config}),
            "CLIP_VISION_OUTPUT": ("TestClipVision", {"seed": 4, "tokens": 5, "width": SEEN_WIDTH})
            if self.golden in HUNYUAN
            else ("TestSeenImage", {}),
            "STYLE_MODEL": ("TestStyleModel", {"width": self.sizes.width}),
        }.get(kind)

    @property
    def pixels(self) -> int:
        """Of a latent's cell, along each side."""
        return {128: 16, 32: 16, 3: 1}.get(self.sizes.channels, 8)

    def fixed(self, kind: str, takes: Mapping[str, Any]) -> dict[str, Any]:
        """Values in the place of a template's."""
        height, width = (self.pixels * side for side in self.sizes.size)
        values = {"steps": STEPS, "lora_name": self.file}
        if kind.startswith("Empty") or kind.endswith("ImageToVideo"):
            values |= {"height": height, "width": width, "length": 9}
        return {key: value for key, value in values.items() if key in takes}


def cuts(comfyui: ComfyUI) -> Iterator[Cut]:
    """All samplers of all templates whose model is of a family that the daemon has."""
    for template in templates():
        for name, node in template.nodes.items():
            outputs = comfyui.nodes.get(node.kind, {}).get("output", [])
            if "LATENT" in outputs and {"model", "guider"} & set(node.links):
                cut = Cut(template, name, comfyui.nodes)
                if cut.goldens:
                    yield cut


@pytest.fixture(autouse=True)
def _there_are_templates(comfyui: ComfyUI) -> None:
    if not any(True for _ in cuts(comfyui)):
        pytest.skip("this ComfyUI has no package of templates")


def test_what_becomes_of_every_node_on_the_way_is_known(comfyui: ComfyUI) -> None:
    kinds = {kind: cut.template.name for cut in cuts(comfyui) for kind in cut.kinds}
    assert {kind: name for kind, name in kinds.items() if kind not in {*HONOURED, *REFUSED}} == {}


@pytest.mark.parametrize("golden", SOURCES)
def test_each_template_runs_or_is_refused_by_name(comfyui: ComfyUI, comfyui_models: Path, golden: str) -> None:
    of_family = {cut.shape: cut for cut in cuts(comfyui) if golden in cut.goldens}
    if not of_family:
        pytest.skip("this version's templates have none of the family")
    model = Model(golden, comfyui_models)
    both: Graph = {}
    run = []
    for cut in of_family.values():
        refusals = [pattern for kind, pattern in REFUSED.items() if kind in cut.kinds]
        if not refusals:
            run.append(cut)
            both |= cut.graph(model, "stock") | cut.graph(model, "taco")
            continue
        outcome = comfyui.run(cut.graph(model, "taco"))
        assert outcome.kind == "error", cut.template.name
        assert re.match(f"TACO-DiT can't honour {refusals[0]}", outcome.error), (cut.template.name, outcome.error)
        assert max((event["value"] for event in outcome.of("progress") if event["max"] < 100), default=0) == 0
    outcome = comfyui.run(both)
    assert outcome.kind == "success", outcome.error
    errors = {(cut.template.name, cut.sampler): error(comfyui, cut) for cut in run}
    assert {name: each for name, each in errors.items() if not each <= 1e-5} == {}


@pytest.mark.parametrize("kind", EFFECTS)
@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_nodes_on_either_side_of_the_loader_have_their_effect(
    comfyui: ComfyUI, both: Both, comfyui_models: Path, kind: str, before: bool
) -> None:
    golden, values = EFFECTS[kind]
    model = Model(golden, comfyui_models)
    # It has of `TinyModel` what a graph asks for.
    run = Pair(model.sizes)  # type: ignore[arg-type]
    for name in ("positive", "negative"):
        run.nodes[name]["inputs"] |= model.beside
    run.nodes["latent"]["inputs"] |= {"scale": 1.0, "seed": 9}
    run.add("mask", "TestMask", height=SIDE, width=SIDE)
    run.add("soft", "FeatherMask", mask="@mask", left=120, top=0, right=0, bottom=0)
    run.add("masked", "SetLatentNoiseMask", samples="@latent", mask="@soft")
    how = {"denoise": 0.8, "latent_image": "@masked"}
    if before:
        run.sample(save="_plain", **how)
        run.on_model(kind, **values)
        run.load()
    else:
        run.load()
        run.sample(save="_plain", **how)
        run.on_model(kind, **values)
    run.sample(**how)
    both(run, "")
    plain, changed = (comfyui.latent(run.file("taco", save)) for save in ("_plain", ""))
    assert (changed - plain).norm() > 1e-3 * plain.norm()


def error(comfyui: ComfyUI, cut: Cut) -> float:
    """How far the template's latent is from stock's."""
    stock, ours = (comfyui.latent(cut.saved(branch)) for branch in ("stock", "taco"))
    assert stock.isfinite().all()
    assert stock.std() > 0
    return relative_error(ours, stock)
