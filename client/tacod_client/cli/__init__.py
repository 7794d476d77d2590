"""The command ``tacoctl``."""

from tacod_client.cli.main import main

__all__ = ["main"]
