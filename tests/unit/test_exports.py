"""What modules offer, and what importing them costs."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from types import ModuleType

import pytest

import tacod
import tacod_client
from tacod_client import client, errors, job, model, stats


def modules() -> list[str]:
    """All modules of both packages but those that run something when they are imported."""
    found = [
        module.name
        for package in (tacod, tacod_client)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    return [name for name in found if not name.endswith(".__main__")]


def offered(name: str) -> tuple[ModuleType, list[str]]:
    if name in [f"tacod.group.ray.{module}" for module in ("bridge", "cluster", "generation")]:
        pytest.importorskip("ray", reason="Ray is not installed: pip install 'taco-dit[ray]'")
    module = importlib.import_module(name)
    return module, getattr(module, "__all__", [])


def defined(module: ModuleType) -> set[str]:
    """The public classes and functions that a module defines."""
    assert module.__file__ is not None
    with open(module.__file__) as file:
        tree = ast.parse(file.read())
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")}


@pytest.mark.parametrize("name", ["tacod_client", *modules()])
def test_all_is_sorted_and_exists(name: str) -> None:
    module, names = offered(name)
    # As ruff sorts it: constants, classes, then the rest.
    assert names == sorted(names, key=lambda name: (not name.isupper(), not re.match("[A-Z]", name), name))
    assert len(set(names)) == len(names)
    for each in names:
        assert hasattr(module, each)


def test_client_offers_every_error_and_all_of_the_client() -> None:
    offered = {*errors.__all__, *client.__all__, *model.__all__, *job.__all__, *stats.__all__, "__version__"}
    assert set(tacod_client.__all__) == offered


def test_errors_offer_every_error() -> None:
    assert set(errors.__all__) == defined(errors)


@pytest.mark.parametrize("module", [client, model], ids=["client", "model"])
def test_client_modules_offer_all_they_define(module: ModuleType) -> None:
    assert set(module.__all__) == defined(module)


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that are there after a statement, in a fresh interpreter."""
    script = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import tacod_client", "import tacod_client.cli"])
def test_client_imports_no_torch_and_nothing_of_the_daemon(statement: str) -> None:
    loaded = loaded_by(statement)
    assert {"zmq", "msgpack"} <= loaded
    assert loaded.isdisjoint({"numpy", "torch", "tacod", "pydantic", "xfuser", "diffusers", "safetensors", "psutil"})


def test_supervisor_imports_no_torch() -> None:
    loaded = loaded_by("import tacod.daemon")
    assert "pydantic" in loaded
    assert loaded.isdisjoint({"numpy", "rich", "torch", "xfuser", "diffusers", "safetensors"})


@pytest.mark.parametrize(
    "statement",
    [
        "with torch.device('meta'): made = [family(family.tiny) for family in families()]",
        # As Anima's adapter has one.
        "with torch.device('meta'), Unfilled(): torch.nn.Embedding(3, 4)",
    ],
)
def test_a_model_without_memory_is_made_without_the_compiler(statement: str) -> None:
    """Every rank makes one at every load; the import would take it seconds."""
    loaded = loaded_by(
        "import torch; from tacod.rank.families import families; from tacod.rank.weights.unfilled import Unfilled\n"
        + statement
    )
    assert "torch" in loaded
    assert loaded.isdisjoint({"sympy"})
