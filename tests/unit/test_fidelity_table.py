"""The document of the nodes' fidelity, which versions of ComfyUI get into one by one."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from comfyui.fidelity_table import Measured, write_version

TORCH = importlib.metadata.version("torch")
PROSE = "# Fidelity\n\nWhat is compared.\n\n"


def write(path: Path, version: str, errors: dict[tuple[str, str], float], failures: int = 0) -> str:
    """The document once this version was measured; it is worst at 2 ranks."""
    measured = [Measured(*row, "", ranks, error * ranks / 2) for row, error in errors.items() for ranks in (1, 2)]
    write_version(path, {"comfyui_version": version, "pytorch_version": "2.9"}, measured, failures)
    return path.read_text()


def test_a_column_a_version_and_the_newest_first(tmp_path: Path) -> None:
    path = tmp_path / "fidelity.md"
    path.write_text(PROSE)
    write(path, "0.14.0", {("test_two_loras", "before"): 2e-7, ("test_a_mask", ""): 0.0})
    write(path, "0.3.64", {("test_two_loras", "before"): 3e-7, ("test_only_here", "flux"): 1e-6}, failures=2)
    assert write(path, "0.8.0", {("test_two_loras", "before"): 4e-7}) == PROSE + (
        "## Versions\n\n"
        "| ComfyUI | torch in ComfyUI | torch in the ranks | latents compared | worst error | failures |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        f"| 0.14.0 | 2.9 | {TORCH} | 4 | 2.0e-07 | 0 |\n"
        f"| 0.8.0 | 2.9 | {TORCH} | 2 | 4.0e-07 | 0 |\n"
        f"| 0.3.64 | 2.9 | {TORCH} | 4 | 1.0e-06 | 2 |\n"
        "\n## Errors\n\n"
        "| test | case | 0.14.0 | 0.8.0 | 0.3.64 |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| a mask |  | 0 |  |  |\n"
        "| only here | flux |  |  | 1.0e-06 |\n"
        "| two loras | before | 2.0e-07 | 4.0e-07 | 3.0e-07 |\n"
    )


def test_a_version_that_is_measured_again_replaces_its_column(tmp_path: Path) -> None:
    path = tmp_path / "fidelity.md"
    new = {("test_two_loras", "before"): 5e-7, ("test_a_mask", "sd3"): 6e-7}
    other = {("test_two_loras", "before"): 3e-7}
    write(path, "0.8.0", other)
    wanted = write(path, "0.3.64", new)
    path.unlink()
    write(path, "0.3.64", {("test_two_loras", "before"): 1e-7, ("test_gone", ""): 2e-7}, failures=1)
    write(path, "0.8.0", other)
    assert write(path, "0.3.64", new) == wanted
    assert write(path, "0.3.64", new) == wanted, "nothing changes if nothing did"


def test_samplers_have_a_row_a_family(tmp_path: Path) -> None:
    measured = [
        Measured("test_every_sampler", f"{family}-{scheduler}", "euler", 1, error)
        for family, scheduler, error in (("flux", "normal", 1e-7), ("flux", "beta", 3e-7), ("sd3", "normal", 2e-7))
    ]
    write_version(tmp_path / "new.md", {"comfyui_version": "0.8.0", "pytorch_version": "2.9"}, measured, 0)
    lines = (tmp_path / "new.md").read_text().splitlines()
    assert lines[-2:] == ["| every sampler | euler flux | 3.0e-07 |", "| every sampler | euler sd3 | 2.0e-07 |"]
