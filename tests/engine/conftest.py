"""ComfyUI's own code, to compare with, and the ranks that forwards are shared out to."""

from __future__ import annotations

import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from rank_worker import Ranks

COMFYUI = os.environ.get("COMFYUI_PATH", "")


@pytest.fixture(scope="module")
def comfy() -> Iterator[Any]:
    """ComfyUI's package, on the CPU, without its models."""
    if not COMFYUI:
        pytest.skip("COMFYUI_PATH names no ComfyUI checkout")
    before = set(sys.modules)
    models: Any = types.ModuleType("comfy.model_base")
    models.__file__ = __file__
    models.__getattr__ = lambda name: models.__dict__.setdefault(name, type(name, (), {}))
    sys.path.insert(0, COMFYUI)
    sys.modules["comfy.model_base"] = models
    level = logging.getLogger().level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import comfy.cli_args

            comfy.cli_args.args.cpu = True
            comfy.model_base = models
            import comfy.ldm.flux.model
            import comfy.ldm.modules.diffusionmodules.mmdit
            import comfy.lora
            import comfy.lora_convert
            import comfy.ops
            import comfy.weight_adapter
        yield comfy
    finally:
        logging.getLogger().setLevel(level)
        sys.path.remove(COMFYUI)
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "comfy":
                del sys.modules[name]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """The processes of one gloo world, for all tests."""
    started = Ranks(tmp_path_factory.mktemp("gloo"))
    yield started
    started.close()
