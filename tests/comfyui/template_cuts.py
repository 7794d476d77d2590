"""What a sampler of one of ComfyUI's templates depends on, as a graph with tiny models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from comfyui_server import ComfyUI, Graph
from helpers import relative_error
from stock_templates import Template, templates
from template_models import Model

__all__ = ["SOURCES", "Cut", "cuts", "error"]

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
    "hunyuan_video_15": r"hunyuanvideo1\.5_720p|capybara",
    "hunyuan_video_15_distilled": r"hunyuanvideo1\.5_1080p_sr_distilled",
    "kandinsky5_image": r"kandinsky5lite_t2i",
    "kandinsky5": r"kandinsky5lite",
    "ltxv_t2v": r"ltx-video-2b-v0\.9\.saf",
    "ltxv_i2v": r"ltx-video",
    "ltx2": r"ltx-2-19b",
    "ltx23_av": r"ltx-2\.3-22b",
    "ltx25_av": r"ltx-2\.5-22b",
    "minimax_h3_t2v": r"minimax_h3_fl2va",
    "minimax_h3_i2v": r"minimax_h3_ref2va",
    "wan_scail2": r"SCAIL_2",
    "wan_vace": r"wan2\.1_vace",
    "wan_fun_frames": r"wan2\.2_fun_control_(high|low)",
    "wan22_5b_control": r"wan2\.2_fun_control_5B",
    "wan22_5b_inpaint": r"wan2\.2_fun_inpaint_5B",
    "wan22_ti2v": r"wan2\.2_ti2v",
    "wan_camera_22": r"wan2\.2_fun_camera",
    "wan_camera": r"wan2\.1_fun_camera",
    "wan_fun": r"wan2\.1_fun_control",
    "wan_flf": r"wan2\.1_flf2v",
    "wan22_i2v": r"wan2\.2_(i2v|fun_inpaint)_(high|low)",
    "wan21_i2v": r"wan2\.1_(i2v|fun_inp)|Wan2_1-I2V|WanMove|chrono_edit",
    "wan21_t2v": r"wan2\.1_t2v|wan2\.2_t2v|bernini_r",
    "fill": r"flux\.?1-fill",
    "canny": r"flux1-canny",
    "flux": r"flux1-",
}
"""The tiny models that stand in for the files whose names match; the first that does."""
CUT_TO_TEXT = ("CLIPTextEncodeFlux",)
"""Nodes that ask more of a text encoder than the stand-in has."""
_STAND_INS = ("IMAGE", "MASK", "CLIP", "VAE", "STRING", "CONTROL_NET", "MODEL_PATCH", "AUDIO", "AUDIO_ENCODER_OUTPUT")
"""Links that change nothing of what a sampler does but the numbers."""
_MOVING = ("LoadVideo", "GetVideoComponents")
"""Nodes whose pictures are a video's frames."""
_WITHOUT_CLIP = {"LoraLoader": "LoraLoaderModelOnly"}
"""Nodes whose CLIP is a stand-in, which has no weights, as others that have none."""


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
    off: frozenset[str] = frozenset()
    """Nodes that hand on the MODEL that they are given."""

    @cached_property
    def goldens(self) -> set[str]:
        """The tiny models that stand in for the files that its MODEL may be from."""
        found = (golden_of(file) for node in self.on_model for file in self._files(node))
        return {golden for golden in found if golden is not None}

    @cached_property
    def on_model(self) -> set[str]:
        """Its MODEL's nodes, from the loader to the sampler, and those that are handed it on the side."""
        return self._before(self.sampler, ("MODEL", "GUIDER", "SIGMAS", "*"))

    @cached_property
    def kinds(self) -> set[str]:
        """The kinds of nodes that are handed the MODEL."""
        nodes = (self.template.nodes[node] for node in self.on_model)
        return {node.kind for node in nodes if any(each.type == "MODEL" for each in node.links.values())}

    def without(self, kinds: Container[str]) -> Cut | None:
        """The same with nodes of these kinds switched off; None if the template has one of them switched on."""
        off = {name for name in self.on_model if self.template.nodes[name].kind in kinds}
        off = {name for name in off if "model" in self.template.nodes[name].links}
        if not all(self.template.nodes[name].bypassed for name in off):
            return None
        return replace(self, off=frozenset(off))

    def _before(self, last: str, types: tuple[str, ...] = ()) -> set[str]:
        """This node and those that it depends on, by links of these types; by all links if there are none."""
        found: set[str] = set()
        pending = [last]
        while pending:
            node = pending.pop()
            if node not in found and node in self.template.nodes:
                found.add(node)
                links = self.template.nodes[node].links.values()
                pending += [each.node for each in links if not types or each.type in types]
        return found

    def _files(self, node: str) -> list[str]:
        """What a loader names."""
        found = self.template.nodes[node]
        return [str(value) for value in found.widgets] if found.kind in LOADERS else []

    def graph(self, model: Model, branch: str) -> Graph:
        """In API form, with a tiny model; in every branch but ``stock`` our loader is behind the template's."""
        graph: Graph = {}
        within = f"{self.template.name}/{branch}/"

        def add(name: str, kind: str, **inputs: Any) -> list[Any]:
            graph[name] = {"class_type": kind, "inputs": inputs}
            return [name, 0]

        def load(node: str) -> list[Any]:
            """What the template's loader gives: also one of a sampler before, whose model is another."""
            (file, *_) = self._files(node)
            golden = golden_of(file)
            stands = model if node in self.on_model or golden is None else Model(golden, model.models)
            file = stands.file_for(file)
            head = add(f"file {file}", "UNETLoader", unet_name=file, weight_dtype="default")
            if branch == "stock":
                return head
            ours = {"enable_taco_dit": True, "sequence_parallel_degree": 3}
            return add(f"loader {file}", "TACODiTModelLoader", model=head, **ours)

        def link(node: str, slot: int, kind: str, by: str, name: str) -> Any:
            while node in self.off:
                node, slot = (found := self.template.nodes[node].links["model"]).node, found.slot
            stand_in = model.stand_in(kind, by, name, self._moves(node, name))
            if stand_in is not None:
                stand_in_name = " ".join([*map(str, stand_in[1].values()), stand_in[0]])
                return add(f"{within}{stand_in_name}", stand_in[0], **stand_in[1])
            source = self.template.nodes[node]
            if source.kind in LOADERS and kind in ("MODEL", "*"):
                return load(node)
            if source.kind in CUT_TO_TEXT:
                return add(f"{within}text {node}", "TestConditioning", seed=1, tokens=11, **model.text)
            if within + node not in graph:
                graph[within + node] = {}
                graph[within + node] = self._node(node, model, link)
            return [within + node, slot]

        end = link(self.sampler, 0, "LATENT", "", "")
        parts = [(end, "")]
        if model.has_sound:
            add(f"{within}apart {self.sampler}", "LTXVSeparateAVLatent", av_latent=end)
            parts = [([f"{within}apart {self.sampler}", slot], part) for slot, part in enumerate(("_video", "_sound"))]
        for samples, part in parts:
            prefix = self.saved(branch) + part
            add(f"{within}save{part} {self.sampler}", "SaveLatent", samples=samples, filename_prefix=prefix)
        return graph

    def saved(self, branch: str) -> str:
        """What its latents are saved as."""
        return re.sub(r"\W", "_", f"{self.template.name}_{self.sampler}_{branch}")

    def _moves(self, node: str, name: str) -> bool:
        """Whether what comes from a node into this input is a video."""
        return (
            "video" in name
            or "frames" in name
            or any(self.template.nodes[each].kind in _MOVING for each in self._before(node))
        )

    def _node(self, name: str, model: Model, link: Callable[..., Any]) -> dict[str, Any]:
        node = self.template.nodes[name]
        kind = _WITHOUT_CLIP.get(node.kind, node.kind)
        takes = self.known[kind]["input"]
        every = {**takes.get("required", {}), **takes.get("optional", {})}
        inputs = {key: value for key, value in node.values(self.known[node.kind]["input"]).items() if key in every}
        fixed = model.fixed(node.kind, every, inputs)
        for key, source in node.links.items():
            if key not in fixed and source.type != "STRING" and (key.partition(".")[0] in every):
                inputs[key] = link(source.node, source.slot, source.type, node.kind, key)
        for key, (sort, *_) in takes.get("required", {}).items():
            if isinstance(sort, list) and key not in fixed and isinstance(inputs.get(key), str):
                # What only another pack has becomes the first that ComfyUI has.
                inputs[key] = inputs[key] if inputs[key] in sort else sort[0]
            # A blueprint's pictures are what one connects to it.
            if key not in inputs and isinstance(sort, str) and model.stand_in(sort, node.kind, key, False) is not None:
                inputs[key] = link("", 0, sort, node.kind, key)
        return {"class_type": kind, "inputs": inputs | fixed}

    @cached_property
    def shape(self) -> str:
        """What tells it from samplers that do other things: neither names nor texts nor seeds."""

        def of(name: str) -> Any:
            node = self.template.nodes[name]
            if node.kind not in self.known:
                return node.kind
            values = node.values(self.known[node.kind]["input"])
            kept = {key: value for key, value in values.items() if not isinstance(value, str) or len(value) < 30}
            kept = {key: value for key, value in kept.items() if "seed" not in key}
            below = {key: of(each.node) for key, each in node.links.items() if each.type not in _STAND_INS}
            return [node.kind, kept, below]

        return json.dumps(of(self.sampler), sort_keys=True)


def cuts(comfyui: ComfyUI) -> Iterator[Cut]:
    """All samplers of all templates whose model is of a family that the daemon has."""
    for template in templates():
        for name, node in template.nodes.items():
            outputs = comfyui.nodes.get(node.kind, {}).get("output", [])
            if "LATENT" in outputs and "MODEL" not in outputs and {"model", "guider"} & set(node.links):
                cut = Cut(template, name, comfyui.nodes)
                if cut.goldens:
                    yield cut


def error(comfyui: ComfyUI, cut: Cut, model: Model) -> float:
    """How far the template's latent is from stock's; of several the one that is farthest."""
    errors = []
    for part in ("_video", "_sound") if model.has_sound else ("",):
        stock, ours = (comfyui.latent(cut.saved(branch) + part) for branch in ("stock", "taco"))
        assert stock.isfinite().all()
        assert stock.std() > 0
        errors.append(relative_error(ours, stock))
    return max(errors)
