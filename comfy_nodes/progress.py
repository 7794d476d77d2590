"""What a node shows in its body while it runs."""

from __future__ import annotations

from . import hooks

__all__ = ["Blocks", "say"]


def say(text: str, node: str | None) -> None:
    """A line in a node's body, for as long as the graph runs; an empty one takes it away."""
    if node is not None and hooks.find("server.PromptServer.send_progress_text") is not None:
        hooks.find("server.PromptServer").instance.send_progress_text(text, node)


class Blocks:
    """Shows in the body of the node that samples how many of a long forward's blocks are done."""

    def __init__(self) -> None:
        self._node: str | None = None
        """Where it shows something now."""

    def __call__(self, done: int, blocks: int) -> None:
        """Show it."""
        context = hooks.find("comfy_execution.utils.get_executing_context")
        running = context() if context is not None else None
        if running is not None:
            self._node = running.node_id
            say(f"{done} of {blocks} blocks of this step", self._node)

    def clear(self) -> None:
        """The forward has ended: take the line away."""
        if self._node is not None:
            say("", self._node)
            self._node = None
