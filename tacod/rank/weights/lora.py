"""LoRA files, in the names of whoever trained them, as weight patches.

A tensor's name is a container's prefix, a module, and the tensor's part in the module's change:

    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight                  kohya: dots are underscores
    lora_unet__blocks_0_cross_attn_k.lora_down.weight                        Wan-Fun: with one more
    transformer.transformer_blocks.0.attn.to_q.lora_A.weight                 diffusers, PEFT: their own module names
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight               ai-toolkit and others: the single file's
    lora_transformer_transformer_blocks_0_attn_to_q.lora_up.weight           OneTrainer
    lycoris_transformer_blocks_0_attn_to_q.lokr_w1                           LyCORIS, SimpleTuner
    double_blocks.0.processor.qkv_lora1.down.weight                          x-flux: 1 is the image, 2 the text

Prefixes and parts combine freely. Modules are looked up among the model's own names, and among diffusers' through the
family's `DiT.lora_layout`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tacod.checkpoint import is_gguf, read_checkpoint
from tacod.rank.families import families
from tacod.rank.families.names import Place
from tacod.rank.weights.changes import Change, Diff, LoHa, LoKr, LoRA, Set
from tacod.rank.weights.misfit import Misfit
from tacod.rank.weights.patches import SWAP, Patch
from tacod.rank.weights.reader import FILE_DTYPES, Reader, as_tensor, changed
from tacod_client.errors import ArgumentError, ModelCorrupt, ModelError, ModelNotFound, ModelUnsupported

__all__ = ["is_text_encoders", "read_lora"]

_log = logging.getLogger(__name__)

_TEXT_ENCODERS = re.compile(r"lora_(prior_)?te\d?_|text_encoders?(_\d)?\.|(clip_[lgh]|t5xxl)\.|bundle_emb\.")
_PREFIX = re.compile(
    r"(lora_unet__?|lora_transformer_|lycoris_)|((model\.)?diffusion_model\.|transformer\.|unet\.|base_model\.model\.)+"
)
_PART = re.compile(
    r"""(?P<module>.+?)(
        (?P<before>\.lora_|_lora\.|\.lora\.|\.lora_linear_layer\.)(?P<factor>up|down|mid)\.weight
        |\.lora_(?P<letter>[AB])(?P<after>((\.[^.]+)?\.weight)?)
        |\.(?P<name>alpha|dora_scale|diff|diff_b|w_norm|b_norm|set_weight)
        |\.hada_(?P<hada>w[12]_[ab]|t[12])
        |\.lokr_(?P<lokr>w[12](_[ab])?|t2)
    )""",
    re.VERBOSE,
)
_X_FLUX = re.compile(
    r"(?P<block>(double|single)_blocks\.\d+)\.processor\."
    r"(?P<what>qkv|proj)_lora(?P<stream>[12]?)\.(?P<factor>up|down)\.weight"
)
_REFUSED = {
    re.compile(r"\.oft_(blocks|diag|R\.weight)$"): "OFT",
    re.compile(r"\.[ab][12]\.weight$"): "GLoRA",
    re.compile(r"\.reshape_weight$"): "a patch that reshapes its weight",
    re.compile(r"\.lora_magnitude_vector(\.[^.]+)*$"): "PEFT's DoRA, whose norms are not those of .dora_scale",
}
_STRANGERS = {
    re.compile(r"(down|up|input|output|mid|middle)_blocks?[._]"): "a UNet (Stable Diffusion 1.x, 2.x or XL)",
    re.compile(r"joint_transformer_blocks[._]|double_layers[._]"): "AuraFlow",
}
"""Marks of LoRA files for models that no family here runs; families' own marks are `DiT.lora_marks`."""
_SHOWN = 8
_TOLD = 256
"""How many unmatched names a message and its details list."""


class _LeftOut(Exception):
    """A module that changes nothing, which ComfyUI reports on its console; ``error`` if the file has no other."""

    def __init__(self, error: ModelError) -> None:
        super().__init__(error.message)
        self.error = error


class _Part(NamedTuple):
    """A tensor of a file, by its role in a change."""

    module: str
    kind: str
    name: str
    spelling: str
    """The change that it is a part of: a module may have several, of one kind too. Empty for what goes with any."""


def is_text_encoders(name: str) -> bool:
    """Whether a LoRA file's tensor patches a text encoder, and so isn't for a DiT."""
    return _TEXT_ENCODERS.match(name) is not None


def read_lora(
    source: str | Mapping[str, Tensor],
    layout: Mapping[str, Place],
    shapes: Mapping[str, Sequence[int]],
    strength: float = 1.0,
    spellings: Mapping[str, str] = MappingProxyType({}),
    identity: str | None = None,
    notes: list[str] | None = None,
) -> dict[str, list[Patch]]:
    """A LoRA file's patches by the single file's keys, as ComfyUI's loaders would make them.

    Text encoders' tensors (`is_text_encoders`) are left out, with a line in the log. Tensors that match nothing in the
    model are left out unless most modules are among them. Modules of another shape than what they patch, and such as
    lack what would make them a change, are left out if there are others. Of modules that patch the same under several
    prefixes, and of several changes of one module, that one counts which ComfyUI reads last. Of a file no more is read
    than counts and fits.

    Args:
        source: A safetensors file, whose path the caller has found to be allowed, or its tensors.
        layout: What the family's `DiT.lora_layout` says about the model.
        shapes: The model's own keys and their shapes.
        strength: Of every patch; at 0 there are none.
        spellings: What the family's `DiT.spellings` says.
        identity: The file's `Checkpoint.identity` when it was named; None for any.
        notes: Takes a line for each module that is left out, and one for all tensors that match nothing.

    Raises:
        ModelNotFound: The file can't be opened.
        ModelCorrupt: It is no whole safetensors file, lacks one of the tensors that belong together, or has changed
            since it was named.
        ModelUnsupported: More of its modules match nothing in the model than match (``unmatched`` in the details lists
            up to 256 tensors), some are of a kind that this version doesn't apply, or none of them fits.
    """
    title = source if isinstance(source, str) else "the LoRA"
    file = _File(source, identity) if isinstance(source, str) else _Held(source)
    mine = [name for name in file.names if not is_text_encoders(name)]
    if skipped := len(file.names) - len(mine):
        _log.info("%s: %d tensors are for text encoders, and left to them", title, skipped)
    if not mine:
        raise ModelUnsupported(f"{title} patches text encoders at most; there is nothing in it for a diffusion model")
    _refuse(mine, title)

    modules, unmatched = _match(title, mine, _places(layout, shapes, spellings))
    known = {part.module for named in modules.values() for part in named}
    strange = {_module(name) for name in unmatched} - known
    if len(known) < len(strange):
        # It was trained for another model, and what matches does so by chance.
        raise ModelUnsupported(_stranger(title, unmatched, len(mine)), unmatched=unmatched[:_TOLD])
    fitting: dict[Place, dict[_Part, str]] = {}
    left_out: list[_LeftOut] = []
    replaced: list[str] = []
    for place, parts in modules.items():
        counting, others = _counting(title, place, parts)
        replaced += others
        shaped = {part: file.shaped(name) for part, name in counting.items()}
        try:
            _patch(title, place, shaped, shapes[place.key], strength)
        except _LeftOut as module:
            left_out.append(module)
        else:
            fitting[place] = counting
    if left_out and not fitting:
        raise left_out[0].error
    if not strength:
        return {}
    if notes is not None:
        if unmatched:
            share = f"{len(unmatched)} of {len(mine)} tensors"
            notes.append(f"{title}: {share} match nothing in this model, {unmatched[0]} among them")
        notes += [*map(str, left_out), *replaced]
    tensors = file.read([name for counting in fitting.values() for name in counting.values()])
    patches: dict[str, list[Patch]] = {}
    for place, counting in fitting.items():
        whole = {part: tensors[name] for part, name in counting.items()}
        patches.setdefault(place.key, []).append(_patch(title, place, whole, shapes[place.key], strength))
    return patches


class _Held:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.names = [*tensors]
        self._tensors = tensors

    def shaped(self, name: str) -> Tensor:
        """A tensor's dtype and shape, without its numbers: one on no device."""
        return self._tensors[name].to("meta")

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors by their names."""
        return {name: self._tensors[name] for name in names}


class _File:
    """A file's tensors, of which only its header is read before `read`."""

    def __init__(self, path: str, identity: str | None) -> None:
        try:
            if os.path.isdir(path) or is_gguf(path):
                kind = "a folder" if os.path.isdir(path) else "a GGUF file"
                raise ModelUnsupported(f"{path} is {kind}; this version reads LoRAs from safetensors files only")
        except OSError as error:
            raise _unreadable(path, error) from None
        self._file = read_checkpoint(path, prefix="", whole=True)
        if identity not in (None, self._file.identity):
            raise changed(path)
        self.names = [*self._file.tensors]

    def shaped(self, name: str) -> Tensor:
        """See `_Held.shaped`."""
        dtype, shape = self._file.tensors[name]
        if dtype not in FILE_DTYPES or name in self._file.quantization:
            raise ModelUnsupported(
                f"{self._file.path}: {name} is {dtype}"
                + (" with a scale beside it" if dtype in FILE_DTYPES else "")
                + ", which this version doesn't read in a LoRA",
                key=name,
            )
        return torch.empty(shape, dtype=FILE_DTYPES[dtype], device="meta")

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """See `_Held.read`."""
        try:
            with Reader(self._file, torch.device("cpu")) as reader:
                read = zip(names, reader.read(names), strict=True)
                tensors = {name: as_tensor(self._file, name, data) for name, data in read}
                reader.check()
        except OSError as error:
            raise _unreadable(self._file.path, error) from None
        return tensors


def _unreadable(path: str, error: OSError) -> ModelNotFound:
    return ModelNotFound(f"{path}: {error.strerror}; tacod's user must be able to read it")


# --- names ------------------------------------------------------------------------------------------------------------


def _places(
    layout: Mapping[str, Place], shapes: Mapping[str, Sequence[int]], spellings: Mapping[str, str]
) -> dict[str, Place]:
    """Where each module lies, by its names: the file's and diffusers', with dots and with underscores.

    A module is its weight; biases, and weights of other names, are there by their whole names.
    """
    places = {key.removesuffix(".weight"): Place(key) for key in shapes}
    for theirs, ours in spellings.items():
        for key in shapes:
            if key.endswith(ours):
                places.setdefault((key.removesuffix(ours) + theirs).removesuffix(".weight"), Place(key))
    for name, place in layout.items():
        if place.key in shapes:
            places.setdefault(name.removesuffix(".weight"), place)
    for name, place in _fused(layout).items():
        if place.key in shapes:
            places.setdefault(name, place)
    flat = {name.replace(".", "_"): place for name, place in places.items()}
    return {**flat, **places}


def _fused(layout: Mapping[str, Place]) -> dict[str, Place]:
    """Queries, keys and values where more than they is fused, as ``…linear1_qkv``, which is how x-flux patches them."""
    fused = {}
    for name, queries in layout.items():
        values = layout.get(name.replace(".to_q.", ".to_v."))
        if name.endswith(".to_q.weight") and queries.rows and values and values.rows and values.key == queries.key:
            first, end = queries.rows[0], sum(values.rows)
            fused[queries.key.removesuffix(".weight") + "_qkv"] = Place(queries.key, (first, end - first))
    return fused


def _match(
    title: str, names: Iterable[str], places: Mapping[str, Place]
) -> tuple[dict[Place, dict[_Part, str]], list[str]]:
    """The names of tensors by the place that they patch, and of those that match no place."""
    matched: dict[Place, dict[_Part, str]] = {}
    unmatched = []
    for name in names:
        part = _part(name)
        place = part and _find(part.module, places)
        if part is None or place is None:
            unmatched.append(name)
        elif matched.setdefault(place, {}).setdefault(part, name) != name:
            raise ModelUnsupported(f"{title} has both {matched[place][part]} and {name}, which are the same tensor")
    return matched, unmatched


def _part(name: str) -> _Part | None:
    """What a tensor is for, by its name; ``kind`` and ``spelling`` are empty for what goes with any factored change."""
    name = _X_FLUX.sub(_plain, name)
    found = _PART.fullmatch(name)
    if found is None:
        return None
    module, factor, letter = found["module"], found["factor"], found["letter"]
    if factor:
        return _Part(module, "lora", factor, f"{found['before']}up.weight")
    if letter:
        return _Part(module, "lora", {"A": "down", "B": "up"}[letter], f".lora_B{found['after']}")
    for kind, field in (("loha", found["hada"]), ("lokr", found["lokr"])):
        if field:
            return _Part(module, kind, field, kind)
    what = found["name"]
    if what in ("alpha", "dora_scale"):
        return _Part(module, "", what, "")
    if what == "set_weight":
        return _Part(module, "set", "value", what)
    if what in ("diff_b", "b_norm"):
        # Underscored names take an underscore before "bias"; places has both.
        module = f"{module}.bias" if "." in module else f"{module}_bias"
    return _Part(module, "diff", "diff", what)


def _module(name: str) -> str:
    """The module that a tensor seems to be of."""
    part = _part(name)
    return part.module if part is not None else name.rpartition(".")[0] or name


def _plain(found: re.Match[str]) -> str:
    """An x-flux name in the words of the others."""
    if found["stream"]:
        module = {"1": "img_attn.", "2": "txt_attn."}[found["stream"]] + found["what"]
    else:
        module = {"qkv": "linear1_qkv", "proj": "linear2"}[found["what"]]
    return f"{found['block']}.{module}.lora_{found['factor']}.weight"


def _find(module: str, places: Mapping[str, Place]) -> Place | None:
    prefix = _PREFIX.match(module)
    return places.get(module) or (places.get(module[prefix.end() :]) if prefix else None)


_FIRST = {
    "lora": ("up",),
    "loha": ("w1_a",),
    "lokr": ("w1", "w2", "w1_a", "w2_a"),
    "diff": ("diff",),
    "set": ("value",),
}
"""The tensors by which ComfyUI finds a change; without one, it sees none of the others."""
_TURNS = (
    *(".lora_B.default.weight", ".lora_linear_layer.up.weight", ".lora_B", ".lora.up.weight", ".lora_B.weight"),
    *("_lora.up.weight", ".lora_up.weight", "loha", "lokr", "b_norm", "w_norm", "diff_b", "diff", "set_weight"),
)
"""How the changes of one module are spelled, in the order in which ComfyUI takes each in the place of those before it.

It doesn't know adapters of other names than ``default``.
"""


def _counting(title: str, place: Place, parts: Mapping[_Part, str]) -> tuple[dict[_Part, str], list[str]]:
    """The parts of a place that ComfyUI reads last, and a line for each module and change that it replaces.

    Raises `ModelUnsupported` if this isn't known.
    """
    changes: dict[tuple[str, str], list[_Part]] = {}
    for part in parts:
        if part.spelling:
            changes.setdefault((part.module, part.spelling), []).append(part)
    seen = [change for change, its in changes.items() if any(part.name in _FIRST[part.kind] for part in its)]
    named = {part.module for part in parts}
    modules = _last(place, {module for module, _ in seen} or named)
    module, spelling = modules[0], ""
    if own := [change for change in seen or changes if change[0] == module]:
        turns = {each: _TURNS.index(each) if each in _TURNS else -1 for _, each in own}
        spelling = max(turns, key=turns.__getitem__)
        if turns[spelling] < 0 and len(turns) > 1:
            modules = [parts[changes[change][0]] for change in own]
    if len(modules) > 1:
        raise ModelUnsupported(
            f"{title}: {' and '.join(sorted(modules))} patch {place.key} more than once, and which one counts isn't "
            "known; save the LoRA without the others",
            key=place.key,
        )
    replaced = [f"{title}: {each}: {module} patches the same" for each in sorted(named - {module})]
    for (each, other), its in changes.items():
        if each == module and other != spelling:
            replaced.append(f"{title}: {parts[its[0]]}: {parts[changes[module, spelling][0]]} patches the same")
    counting = {part: name for part, name in parts.items() if part.module == module and part.spelling in ("", spelling)}
    return counting, replaced


def _last(place: Place, modules: Iterable[str]) -> list[str]:
    """Of the modules that patch one place that which ComfyUI reads last; all where this isn't known.

    It goes by its own list of names, where the network's come before diffusers'. Without a prefix, or behind that of
    diffusers, it knows the former not at all.
    """
    own = place.key.removesuffix(".weight")
    flat = own.replace(".", "_")
    turns = {own: 0, flat: 0, f"transformer.{own}": 0, f"diffusion_model.{own}": 2}
    turns |= {f"lora_unet_{flat}": 1, f"lora_unet__{flat}": 1}
    found = {module: turns.get(module, 3 if module.startswith("transformer.") else None) for module in modules}
    known = {turn: module for module, turn in found.items() if turn is not None}
    return [known[max(known)]] if len(known) == len(found) else list(found)


def _refuse(tensors: Iterable[str], title: str) -> None:
    names = list(tensors)
    for name in names:
        for pattern, kind in _REFUSED.items():
            if pattern.search(name):
                raise ModelUnsupported(
                    f"{title}: {name} is {kind}, which this version doesn't apply", key=name, kind=kind
                )
    if any(name.endswith(".lora_B.bias") for name in names):
        raise ModelUnsupported(
            f"{title} has biases beside its factors (.lora_B.bias), which this version doesn't apply; "
            "Black Forest Labs' control LoRAs are of this kind: use the full Canny or Depth model",
            kind="lora_B.bias",
        )


def _stranger(title: str, unmatched: Sequence[str], total: int) -> str:
    known = {re.compile(family.lora_marks): family.title for family in families() if family.lora_marks}
    marks = {**known, **_STRANGERS}
    looks = next((name for pattern, name in marks.items() if any(map(pattern.search, unmatched))), None)
    shown = ", ".join(name[:120] for name in unmatched[:_SHOWN])
    shown += f" and {len(unmatched) - _SHOWN} more" if len(unmatched) > _SHOWN else ""
    return (
        f"{title}: {len(unmatched)} of {total} tensors match nothing in this model: {shown}. "
        + (f"Its names look like those of {looks}; " if looks else "")
        + "use a LoRA that was trained for this model"
    )


# --- tensors ----------------------------------------------------------------------------------------------------------

_KINDS: dict[str, type[Change]] = {change.kind: change for change in (LoRA, LoHa, LoKr, Diff, Set)}


def _patch(title: str, place: Place, parts: Mapping[_Part, Tensor], shape: Sequence[int], strength: float) -> Patch:
    """What one module's tensors make of it; ones on no device are looked at for their shapes."""
    module = next(iter(parts)).module
    kind = next((part.kind for part in parts if part.kind), "")
    fields: dict[str, Any] = {part.name: tensor for part, tensor in parts.items()}
    if "alpha" in fields:
        fields["alpha"] = _scalar(fields["alpha"], module, title)
    if not kind:
        have = " and ".join(sorted(fields))
        raise _LeftOut(ModelCorrupt(f"{title}: {module} has {have} and nothing that they are for"))
    if kind in ("diff", "set"):
        # They have neither scaling nor magnitudes: these are of what they replace.
        fields = {part.name: tensor for part, tensor in parts.items() if part.kind}
    try:
        change = _KINDS[kind](**fields)
    except (ArgumentError, TypeError) as error:
        have = ", ".join(f"{part.name} {list(tensor.shape)}" for part, tensor in parts.items())
        corrupt = ModelCorrupt(f"{title}: {module} has {have}, which make no whole {kind}")
        unseen = not any(name in fields for name in _FIRST[kind])
        raise (_LeftOut(corrupt) if isinstance(error, Misfit) or unseen else corrupt) from None
    offset = None if place.rows is None else (0, *place.rows)
    patch = Patch(change, strength, 1.0, offset, SWAP if place.swap else None)
    try:
        patch.check(shape, place.key)
    except ArgumentError as error:
        unfit = ModelUnsupported(f"{title}: {module}: {error.message}", key=place.key)
        raise (_LeftOut(unfit) if isinstance(error, Misfit) else unfit) from None
    return patch


def _scalar(tensor: Tensor, module: str, title: str) -> float:
    if tensor.numel() != 1:
        raise ModelCorrupt(f"{title}: {module}.alpha has shape {list(tensor.shape)}; it should be one number")
    return 1.0 if tensor.is_meta else float(tensor.item())
