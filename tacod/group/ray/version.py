"""The version of Ray that is needed."""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version

from tacod.config import ConfigError

__all__ = ["OLDEST", "check_installed"]

OLDEST = "2.60"
"""The oldest version of Ray that this was tested with."""


def check_installed() -> str:
    """The version of Ray that is installed, which isn't imported. Raises `ConfigError` for none, or one too old."""
    try:
        found = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError('group.launcher: Ray is not installed; `pip install "taco-dit[ray]"` installs it') from None
    if Version(found) < Version(OLDEST):
        raise ConfigError(
            f'group.launcher: Ray {found} is too old; `pip install "taco-dit[ray]"` installs {OLDEST} or newer; all '
            "hosts of the cluster need the same version"
        )
    return found
