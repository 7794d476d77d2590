"""The daemon: it owns the devices, and runs diffusion-transformer forwards on all of them for its clients."""

from tacod_client.version import __version__

__all__ = ["__version__"]
