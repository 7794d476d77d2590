"""The manifest: a model's id is a function of its file's state and dtype, and nothing else."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from tacod.execution import manifest as module
from tacod.execution.manifest import Manifest, Model
from tacod.execution.residency import Residency
from tacod.execution.store import Store
from tacod.group.work import Facts, Load, Loaded
from tacod.shares import Shares
from tacod_client import wire
from tacod_client.errors import (
    ArgumentError,
    ModelCorrupt,
    ModelNotAllowed,
    ModelNotFound,
    ModelUnsupported,
    TacodError,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound model file."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "flux.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return path


@pytest.fixture
def manifest(path: Path) -> Manifest:
    """Of the folder that holds the file."""
    return Manifest([str(path.parent)])


def describe(manifest: Manifest, name: str = "flux.safetensors", dtype: str | None = None, **options: Any) -> Model:
    return manifest.describe(name, dtype, options.get("patches"), options.get("plan", "auto"), 3)


def test_same_file_in_the_same_state_gives_the_same_id(manifest: Manifest, path: Path) -> None:
    first = describe(manifest)
    assert describe(manifest) == first
    assert describe(Manifest([str(path.parent)])) == first, "and so it does after a restart"
    assert describe(manifest, str(path)) == first
    assert describe(manifest, "./flux.safetensors") == first
    assert describe(manifest, patches=[]) == first
    assert describe(manifest, plan={"sequence_parallel_degree": 1}).id == first.id, "the plan is each forward's own"


def test_dtype_gives_another_id(manifest: Manifest) -> None:
    ids = {describe(manifest, dtype=dtype).id for dtype in (None, "fp32", "bf16", "fp16")}
    assert len(ids) == 4


def test_changed_file_gives_another_id(manifest: Manifest, path: Path) -> None:
    before = describe(manifest).id
    os.utime(path, ns=(1, 1))
    assert describe(manifest).id != before


def test_same_contents_elsewhere_give_another_id(manifest: Manifest, path: Path) -> None:
    other = path.with_name("other.safetensors")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    assert describe(manifest, "other.safetensors").id != describe(manifest).id


def test_path_is_the_real_one(manifest: Manifest, path: Path) -> None:
    path.with_name("link.safetensors").symlink_to(path)
    assert describe(manifest, "link.safetensors") == describe(manifest)
    assert describe(manifest).path == str(path)
    assert describe(manifest).name == "flux.safetensors"


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("none.safetensors", {}, ModelNotFound),
        ("/etc/passwd", {}, ModelNotAllowed),
        ("broken.safetensors", {}, ModelCorrupt),
        ("flux.safetensors", {"patches": ["lora"]}, ArgumentError),
        ("flux.safetensors", {"patches": [{"path": "none.safetensors", "strength": 1.0}]}, ModelNotFound),
        ("flux.safetensors", {"patches": [{"path": "/etc/passwd", "strength": 1.0}]}, ModelNotAllowed),
        ("flux.safetensors", {"plan": {"sequence_parallel_degree": 7}}, ArgumentError),
        ("flux.safetensors", {"plan": "fast"}, ArgumentError),
    ],
)
def test_what_cannot_be_loaded_is_refused_at_once(
    manifest: Manifest, path: Path, name: str, options: dict[str, Any], error: type[TacodError]
) -> None:
    path.with_name("broken.safetensors").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(error):
        describe(manifest, name, **options)
    assert list(manifest) == []


def test_model_is_found_while_it_is_resident(manifest: Manifest) -> None:
    model = describe(manifest)
    assert model.id not in manifest
    manifest.add(model)
    assert model.id in manifest
    assert manifest.find(model.id) is model
    assert list(manifest) == [model]
    manifest.remove(model.id)
    manifest.remove(model.id)
    with pytest.raises(ModelNotFound, match=model.id) as caught:
        manifest.find(model.id)
    assert caught.value.details == {"model": model.id}


def test_manifest_may_change_while_it_is_read(manifest: Manifest) -> None:
    for dtype in ("fp32", "bf16"):
        manifest.add(describe(manifest, dtype=dtype))
    for model in manifest:
        manifest.remove(model.id)
    assert list(manifest) == []


def test_the_load_command_names_the_same_model(manifest: Manifest) -> None:
    model = describe(manifest, dtype="bf16")
    assert model.load(["other"]) == Load(
        model=model.id,
        path=model.path,
        identity=model.identity,
        dtype="bf16",
        patches=None,
        base=None,
        evict_models=["other"],
        files={},
    )


def lora(strength: float, fill: int = 0) -> list[dict[str, Any]]:
    up = wire.Tensor("U8", (2,), (bytes([fill, 1]),)).with_digest().without_bytes()
    return [{"key": "img_in.weight", "kind": "lora", "up": up, "strength": strength}]


def test_a_patched_model_has_an_id_of_file_and_patches_and_a_base_without_them(manifest: Manifest) -> None:
    plain = describe(manifest)
    patched = describe(manifest, patches=lora(1.0))
    assert describe(manifest, patches=[]) == plain
    assert patched.base == plain
    assert patched.load().base == plain.id
    assert describe(manifest, patches=lora(1.0)).id == patched.id
    others = {describe(manifest, patches=each).id for each in (lora(0.5), lora(1.0, 9), lora(1.0) * 2)}
    assert len({plain.id, patched.id} | others) == 5
    assert len(patched.digests) == 1
    assert plain.digests == []


def test_a_patch_from_a_file_is_another_when_the_file_changes(manifest: Manifest, path: Path) -> None:
    patches = [{"path": path.name, "strength": 1.0}]
    before = describe(manifest, patches=patches)
    assert before.patches[0]["path"] == before.path
    assert before.files == {before.path: before.identity}
    assert before.load().files == before.files, "for the ranks to see whether it is still so"
    os.utime(path, ns=(1, 1))
    after = describe(manifest, patches=patches)
    assert after.id != before.id
    assert after.files != before.files


def test_a_file_of_patches_by_several_names_is_one_file(manifest: Manifest, path: Path) -> None:
    path.with_name("lora.safetensors").write_bytes(path.read_bytes())
    path.with_name("link.safetensors").symlink_to("lora.safetensors")
    names = ("lora.safetensors", "link.safetensors", str(path.with_name("lora.safetensors")), "./lora.safetensors")
    found = [describe(manifest, patches=[{"path": name, "strength": 1.0}]) for name in names]
    assert len({model.id for model in found}) == 1
    twice = describe(manifest, patches=[{"path": name, "strength": 1.0} for name in names[:2]])
    assert twice.file_paths == [str(path), str(path.with_name("lora.safetensors"))]
    assert describe(manifest).file_paths == [str(path)]


def test_a_link_that_leads_elsewhere_is_another_patch(manifest: Manifest, path: Path) -> None:
    link = path.with_name("link.safetensors")
    seen = set()
    for name in ("one.safetensors", "two.safetensors"):
        path.with_name(name).write_bytes(path.read_bytes())
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        seen.add(describe(manifest, patches=[{"path": link.name, "strength": 1.0}]).id)
    assert len(seen) == 2


def test_the_least_recently_used_models_make_room(manifest: Manifest) -> None:
    for name, size in (("a", 40), ("b", 30), ("c", 20)):
        manifest.add(Model(name, f"/{name}", "", None, weight_bytes=size))
    manifest.note_plan("a", "used just now")
    new = Model("new", "/new", "", None, weight_bytes=25)
    assert manifest.to_evict(new, None, 2) == []
    assert manifest.to_evict(new, 115, 2) == []
    assert manifest.to_evict(new, 100, 2) == ["b"]
    assert manifest.to_evict(new, 70, 2) == ["b", "c"]
    assert manifest.to_evict(new, 10, 2) == ["b", "c", "a"]


def test_what_jobs_need_goes_last_and_the_most_urgent_at_the_very_last(manifest: Manifest) -> None:
    for name in "abcd":
        manifest.add(Model(name, f"/{name}", "", None, weight_bytes=10))
    new = Model("new", "/new", "", None, weight_bytes=10)
    assert manifest.to_evict(new, 10, 2, needed=["b", "a", "b"]) == ["c", "d", "a", "b"]
    assert manifest.to_evict(new, 30, 2, needed=["a", "b", "c"]) == ["d", "c"]
    assert manifest.to_evict(new, 40, 2, needed=["a", "b", "c"], gone=["a"]) == ["a"]


def test_a_base_that_is_not_there_counts_with_what_is_made_of_it(manifest: Manifest) -> None:
    base = Model("base", "/base", "", None, weight_bytes=40)
    manifest.add(Model("a", "/a", "", None, weight_bytes=30))
    patched = Model("patched", "/base", "", None, base=base, weight_bytes=10)
    assert manifest.to_evict(patched, 79, 2) == ["a"]
    assert manifest.to_evict(patched, 80, 2) == []


def test_what_made_room_is_remembered_within_bounds(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVICTED", 2)
    models = [Model(name, f"/{name}", "", None) for name in "abc"]
    for model in models:
        manifest.add(model)
        manifest.evict(model.id)
    assert [manifest.recall(name) for name in "abc"] == [None, *models[1:]]
    assert list(manifest) == []
    manifest.add(models[1])
    manifest.remove("b")
    assert manifest.recall("b") is None, "an operator who unloads it means it"
    manifest.forget_evicted()
    assert manifest.recall("c") is None
    monkeypatch.setattr(module, "EVICTED_TENSORS", 3)
    for fill in range(3):
        model = describe(manifest, patches=lora(1.0, fill) * 2)
        manifest.add(model)
        manifest.evict(model.id)
        assert manifest.recall(model.id) is model
    assert (
        sum(manifest.recall(describe(manifest, patches=lora(1.0, fill) * 2).id) is not None for fill in range(3)) == 1
    )


def test_a_further_set_of_patches_takes_the_place_of_the_oldest_of_the_same_base(manifest: Manifest) -> None:
    base, other = (Model(name, f"/{name}", "", None, weight_bytes=40) for name in ("base", "other"))
    manifest.add(base)
    for name, under in (("a", base), ("x", other), ("b", base)):
        manifest.add(Model(name, f"/{name}", "", None, base=under, weight_bytes=10))
    manifest.note_plan("a", "used just now")
    new = Model("new", "/new", "", None, base=base, weight_bytes=10)
    assert manifest.to_evict(new, None, 3) == []
    assert manifest.to_evict(new, None, 2) == ["b"]
    assert manifest.to_evict(new, None, 1) == ["b", "a"]
    # Its own base is needed in any case.
    assert manifest.to_evict(new, 60, 2) == ["b", "x"]
    assert manifest.to_evict(Model("plain", "/plain", "", None), None, 1) == []


def test_loaded_model_tells_what_the_ranks_told(manifest: Manifest) -> None:
    sampling, quantization = {"channels": 16, "prediction": "flow"}, {"int8_convrot": 3}
    lying = {"weights": "sharded", "resident_bytes": [10, 9, 9], "streamed_bytes": [14, 15, 15], "fetch_s": [1, 2, 3]}
    told = {"sampling": sampling, "quantization": quantization, "shares": [2, 1, 1], "shares_measured": True, **lying}
    facts = Facts("flux", 12, 24, "bf16", 24, 3072, **told)
    model = describe(manifest).loaded(facts, 1.23456, 3)
    assert model.id == describe(manifest).id
    assert model.to_wire() == {
        "id": model.id,
        "name": "flux.safetensors",
        "family": "flux",
        "path": model.path,
        "parameters": 12,
        "weight_bytes": 24,
        "patches": 0,
        "dtype": "bf16",
        "sampling": {"channels": 16, "prediction": "flow"},
        "plan": "sequence 3 (ulysses; rank 0 is 2 times as fast; 24 heads over 3 ranks: 12 + 6 + 6)",
        "loaded_s": 1.235,
        "notes": [],
        "network": "",
        "shares_tokens": True,
        "quantization": {"int8_convrot": 3},
        "weights": "sharded",
        "resident_bytes": [10, 9, 9],
        "streamed_bytes": [14, 15, 15],
        "fetch_s": [1, 2, 3],
        "shares": [2, 1, 1],
        "shares_measured": True,
    }


def test_new_ranks_take_the_shares_and_rates_of_those_before(manifest: Manifest) -> None:
    """So a run goes on as it has begun; what the configuration asks for is for models that are loaded anew."""
    model, asked = describe(manifest), Shares.of([1, 3, 1])
    assert (model.load().shares, model.load().shares_measured) == (None, False), "ranks measure"
    assert (model.load(shares=asked).shares, model.load(shares=asked).shares_measured) == ([1, 3, 1], False)
    assert (model.load().rates, model.load(shares=asked).rates) == (None, None)
    for each, measured, rates in (([2, 1, 1], True, [1e12, 1e9, 1e-3]), ([], True, []), ([], False, [])):
        facts = Facts("flux", 12, 24, "bf16", 24, 3072, {}, shares=each, shares_measured=measured, rates=rates)
        load = model.loaded(facts, 1.0, 3).load(shares=asked)
        assert (load.shares, load.shares_measured, load.rates) == (each, measured, rates)


def test_last_plan_is_noted_and_that_of_the_unknown_ignored(manifest: Manifest) -> None:
    model = describe(manifest)
    manifest.add(model)
    manifest.note_plan(model.id, "sequence 1")
    manifest.note_plan("unknown", "sequence 2")
    assert [each.plan for each in manifest] == ["sequence 1"]


def test_a_base_goes_after_what_was_made_of_it(manifest: Manifest) -> None:
    """They share its memory: alone it would give none back, and the next patches would load it a second time."""
    base = Model("base", "/base", "", None, weight_bytes=40)
    manifest.add(base)
    manifest.add(Model("patched", "/base", "", None, base=base, weight_bytes=1))
    manifest.add(Model("x", "/x", "", None, weight_bytes=30))
    new = Model("new", "/new", "", None, weight_bytes=20)
    assert manifest.to_evict(new, 90, 2) == ["patched"]
    assert manifest.to_evict(new, 60, 2) == ["patched", "base"]
    manifest.note_plan("patched", "used just now")
    assert manifest.to_evict(new, 70, 2) == ["x"]
    assert manifest.to_evict(new, 30, 2) == ["x", "patched", "base"]
    assert manifest.patched("base") == ["patched"]
    gone = manifest.next_to_go(Model("more", "/base", "", None, base=base), ["x", "patched"])
    assert gone is None, "what is to be made of it needs it"


def test_patches_of_any_value_are_told_apart(manifest: Manifest) -> None:
    """The ranks refuse what makes no sense; here it must not matter."""
    patches: list[Any] = [{"key": "a", "value": value} for value in (b"abc", b"abd", "abc", None)]
    assert len({describe(manifest, patches=[patch]).id for patch in patches}) == 4


def test_a_file_whose_name_is_no_unicode_is_refused(manifest: Manifest, path: Path) -> None:
    """Its path could not be told to the ranks, nor to anyone."""
    real = path.with_name(os.fsdecode(b"\xb0\xa1.safetensors"))
    path.rename(real)
    path.symlink_to(real)
    with pytest.raises(ModelUnsupported, match="rename it") as caught:
        describe(manifest)
    json.dumps(caught.value.to_wire()).encode()


def test_model_that_is_loaded_again_takes_what_the_ranks_report_then(manifest: Manifest) -> None:
    """After a loss of the ranks there may be more room for it than before, or less."""
    residency = Residency(manifest, Store(1 << 20), [], 3, lambda model: None)
    for name in ("older", "flux"):
        manifest.add(Model(name, f"/{name}", "", None, weight_bytes=5, weights="sharded"))
    facts = Facts("flux", 12, 9, "bf16", 24, 3072, {}, weights="replicated", resident_bytes=[9, 9, 9])
    residency.note_loaded(manifest.find("older"), Loaded(facts, facts), 1.0, 0.0)
    assert [(each.id, each.weight_bytes, each.weights) for each in manifest] == [
        ("older", 9, "replicated"),
        ("flux", 5, "sharded"),
    ]
    assert manifest.to_evict(Model("new", "/new", "", None, weight_bytes=2), 15, 2) == ["older"]
