"""The daemon: it owns the devices, and runs diffusion-transformer forwards on all of them for its clients."""

from importlib.metadata import version

__version__ = version("taco-dit")
