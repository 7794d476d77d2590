"""What a person reads in ComfyUI's error box, cause and cure in its first line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tacod_client.errors import ConnectionFailed, TacodError, Unavailable

__all__ = ["Failed", "NotAvailable", "NotRemote", "Refused", "errors_explained"]


class NotAvailable(RuntimeError):
    """No daemon serves this ComfyUI; the message begins ``TACO-DiT not available:``."""


class Failed(RuntimeError):
    """The daemon could not do what was asked; its own error is the cause."""


class Refused(RuntimeError):
    """The graph asks for something that the daemon's model can't honour; the message names it."""

    def __init__(self, thing: str, instead: str) -> None:
        super().__init__(f"TACO-DiT can't honour {thing}: {instead}")


class NotRemote(AttributeError):
    """Something reaches for a part of the network that is in the daemon; the message names the part.

    An `AttributeError`, for that is what a look for a part that isn't there raises.
    """


@contextmanager
def errors_explained() -> Iterator[None]:
    """Raise what the client raises in the words of this package."""
    try:
        yield
    except (ConnectionFailed, Unavailable) as error:
        raise NotAvailable(f"TACO-DiT not available: {error.message}") from error
    except TacodError as error:
        raise Failed(f"TACO-DiT: {error.message}") from error
