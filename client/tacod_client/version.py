"""The package's version."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("taco-dit")
except PackageNotFoundError:  # the folder is on the path without being installed
    __version__ = "0+unknown"
