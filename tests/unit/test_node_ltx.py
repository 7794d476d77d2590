"""What the nodes tell the daemon of a ComfyUI's LTX-2 network, by its code."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NODES = Path(__file__).parents[2] / "comfy_nodes"
NETWORK = """
class Block:
    def forward(self, x, transformer_options):
        run_vx = transformer_options.get("run_vx", True)
        {block}
        return x

class LTXAVModel:
    def _prepare_timestep(self, timestep, a_timestep):
        {times}
        return self.options.get("stg_self_attn_blocks", ())
"""
SCALED = "gate = a_timestep_scaled.max()"


@pytest.fixture
def ltx(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The nodes' module, without ComfyUI."""
    package = ModuleType("nodes_alone")
    package.__path__ = [str(NODES)]
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "nodes_alone", package)
    yield importlib.import_module("nodes_alone.ltx")
    for name in set(sys.modules) - before:
        if name.startswith("nodes_alone"):
            sys.modules.pop(name, None)


def skeleton(folder: Path, monkeypatch: pytest.MonkeyPatch, block: str, times: str = SCALED) -> Any:
    """A network of this code."""
    (folder / "network_of_ltx.py").write_text(NETWORK.format(block=block, times=times))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "network_of_ltx", raising=False)
    module = importlib.import_module("network_of_ltx")
    network = module.LTXAVModel()
    network.transformer_blocks = [module.Block()]
    return network


@pytest.mark.parametrize(
    ("block", "read"), [("vx_norm3 = rms_norm(vx)", "before"), ("ax_norm3 = rms_norm(ax)", "after")]
)
def test_which_video_the_sound_reads(
    ltx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: str, read: str
) -> None:
    assert ltx.meanings(skeleton(tmp_path, monkeypatch, block), {}) == {"reads_video": read}


def test_a_version_of_other_times_is_refused(ltx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = skeleton(tmp_path, monkeypatch, "vx_norm3 = rms_norm(vx)", "gate = a_timestep.max()")
    with pytest.raises(Exception, match="LTX-2 in this version"):
        ltx.meanings(network, {})


def test_options_are_sent_if_the_network_reads_them(ltx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = skeleton(tmp_path, monkeypatch, "pass")
    options = {"run_vx": False, "a2v_cross_attn": False, "stg_self_attn_blocks": frozenset({29, 3}), "wrappers": {}}
    assert ltx.meanings(network, options) == {
        "reads_video": "after",
        "run_vx": False,
        "stg_self_attn_blocks": [3, 29],
    }
