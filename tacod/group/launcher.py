"""How a group's ranks are started: as children of the supervisor, or by Ray on the hosts of a cluster."""

from __future__ import annotations

from pathlib import Path

from tacod import config
from tacod.group.processes import Processes
from tacod.group.ranks import Launcher
from tacod.group.ray.launcher import RayLauncher

__all__ = ["launcher"]


def launcher(
    settings: config.Group, devices: list[str], folder: Path, comfyui: str | None = None, beside: int = 0
) -> Launcher:
    """What starts ranks on these ``devices``; see `Processes` and `RayLauncher`."""
    if settings.launcher == "ray":
        return RayLauncher(settings, folder, comfyui, beside)
    return Processes(devices, folder, comfyui, beside)
