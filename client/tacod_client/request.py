"""A request under way, and the completion by which a forward may end before its answer has come."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tacod_client.wire import Message

__all__ = ["Completion", "Request"]

FINAL = ("done", "error")
"""The messages that end a job."""


class Request:
    """A request under way: its replies as they come, and how to send it again."""

    def __init__(self, kind: str, build: Callable[[], dict[str, Any]]) -> None:
        self.kind = kind
        self.build = build
        """Makes the body, each time that the request is sent."""
        self.id = 0
        self.replies: deque[Message] = deque()
        self.lost = False
        """Whether the connection on which it was sent is gone."""
        self.completed = False
        """Whether a completion has come, and its answer has not."""
        self.late = False
        """Whether `Connection.settle` has waited for that answer in vain."""
        self._answered = False
        self._answers: list[Message | None] = []
        self._hearers: deque[Callable[[Message | None], None]] = deque()
        self._lock = threading.RLock()

    def send_as(self, number: int) -> None:
        """It is sent now, perhaps anew, under this id; what was said to it before says nothing any more."""
        self.id = number
        self.lost = self.completed = self._answered = False
        self.replies.clear()

    def take(self, message: Message) -> bool:
        """Take in a reply; returns whether it was the answer that follows a completion."""
        if not self.completed:
            self._answered |= message.type in FINAL
            self.replies.append(message)
        elif message.type in FINAL:
            self.end(message)
            return True
        return False

    def complete(self, message: Message) -> None:
        """Take in a completion; it says nothing new behind the answer, whether that was read or not."""
        if self.completed or self._answered:
            return
        self.completed = True
        # It isn't sent again, so it lets go of what it was made of: tensors of its caller, perhaps on a GPU.
        self.build = dict
        self.replies.append(Completion(message.type, message.body, message.id, request=self))

    def end(self, message: Message | None) -> None:
        """Its answer has come behind the completion; None if none will come."""
        self.completed = False
        self._answers.append(message)
        self._tell()

    def when_answered(self, hear: Callable[[Message | None], None]) -> None:
        """Have ``hear`` hear of the answer that follows a completion, now or later; None if none will come."""
        self._hearers.append(hear)
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            while self._answers and self._hearers:
                self._hearers.popleft()(self._answers[0])


@dataclass(frozen=True)
class Completion(Message):
    """A rank's word that a forward's result lies in shared memory. The daemon's answer follows.

    Its body has the ``out`` of that answer.
    """

    request: Request | None = None
