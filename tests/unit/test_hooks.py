"""The list of what the nodes hold on to in ComfyUI, without one: what the document says of it, and what a lack says."""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks() -> Iterator[Any]:
    """The module by itself: the package around it needs a ComfyUI."""
    name = "hooks_of_the_nodes"
    spec = importlib.util.spec_from_file_location(name, ROOT / "comfy_nodes" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture
def comfyui(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A ComfyUI that has all of it and nothing else; a function takes away what is to be missing."""
    modules: dict[str, types.ModuleType] = {}
    for hook in hooks.HOOKS:
        names = hook.where.split(".")
        depth = next(i for i, name in enumerate(names) if name[:1].isupper() or i == len(names) - 1)
        for count in range(1, depth + 1):
            path = ".".join(names[:count])
            modules.setdefault(path, types.ModuleType(path))
            if count > 1:
                setattr(modules[".".join(names[: count - 1])], names[count - 1], modules[path])
        owner: Any = modules[".".join(names[:depth])]
        for name in names[depth:-1]:
            if not hasattr(owner, name):
                setattr(owner, name, type(name, (), {}))
            owner = getattr(owner, name)
        if not hasattr(owner, names[-1]):
            parameters = ", ".join(f"{each}=None" for each in hook.takes)
            setattr(owner, names[-1], eval(f"lambda {parameters}: None"))
    for path, module in modules.items():
        monkeypatch.setitem(sys.modules, path, module)
    return modules


def test_the_document_has_them_all(hooks: Any) -> None:
    text = (ROOT / "docs" / "comfyui.md").read_text()
    section = text.partition("\n## Hooks\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    told = {row.split("`")[1]: row for row in rows}
    assert set(told) == {hook.where for hook in hooks.HOOKS}
    assert [hook.where for hook in hooks.HOOKS if hook.without not in told[hook.where]] == []


@pytest.mark.usefixtures("comfyui")
def test_nothing_is_said_where_nothing_is_missing(hooks: Any, caplog: pytest.LogCaptureFixture) -> None:
    hooks.tell_missing()
    assert caplog.records == []
    assert hooks.have(hook.where for hook in hooks.HOOKS)


@pytest.mark.parametrize("lost", ["server.PromptServer.send_progress_text", "comfy.sd.load_diffusion_model"])
def test_what_is_missing_is_named_with_what_it_disables(
    hooks: Any, comfyui: Any, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    owner, _, name = lost.rpartition(".")
    delattr(hooks.find(owner), name)
    with caplog.at_level(logging.WARNING):
        hooks.tell_missing()
    (said,) = caplog.messages
    (hook,) = (hook for hook in hooks.HOOKS if hook.where == lost)
    assert said == f"TACO-DiT: this ComfyUI has no {lost}: {hook.without}. Update TACO-DiT"
    assert not hooks.have([lost])


def test_a_parameter_that_is_gone_counts(hooks: Any, comfyui: Any, caplog: pytest.LogCaptureFixture) -> None:
    comfyui["comfy.utils"].ProgressBar = lambda total: None
    with caplog.at_level(logging.WARNING):
        hooks.tell_missing()
    assert caplog.messages == [
        "TACO-DiT: this ComfyUI has no comfy.utils.ProgressBar(node_id=): loading shows no bar. Update TACO-DiT"
    ]


def test_what_another_pack_has_wrapped_is_there(hooks: Any, comfyui: Any) -> None:
    comfyui["comfy.utils"].ProgressBar = lambda *args, **kwargs: None
    comfyui["comfy.model_management"].unet_dtype = max
    assert hooks.missing() == []


def test_a_module_that_is_gone(hooks: Any, comfyui: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy.model_detection", None)
    del comfyui["comfy"].model_detection
    assert hooks.find("comfy.model_detection.model_config_from_unet") is None
    assert not hooks.have(hooks.UNET_LOADER)


def test_without_a_patcher_there_are_no_nodes(hooks: Any, comfyui: Any) -> None:
    del comfyui["comfy.model_patcher"].ModelPatcher
    with pytest.raises(ImportError, match=r"^TACO-DiT not available: this ComfyUI has no comfy\.model_patcher\.Mod"):
        hooks.tell_missing()


def test_versions_that_differ_are_told() -> None:
    spec = importlib.util.spec_from_file_location("text_of_the_nodes", ROOT / "comfy_nodes" / "text.py")
    assert spec is not None
    assert spec.loader is not None
    text = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(text)
    assert text.version_text("1.2.0", "1.2.0") == ""
    assert "the daemon is TACO-DiT 1.1.0, and the client in ComfyUI's Python is 1.2.0" in text.version_text(
        "1.1.0", "1.2.0"
    )
