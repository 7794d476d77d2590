"""Everything that can go wrong, as one tree.

TacodError
├── ConnectionFailed            the daemon can't be reached
│   └── ConnectionLost          it was reached, and stayed away longer than ``reconnect_s``
├── ProtocolError               bytes on the wire that break docs/protocol.md
│   └── MessageTooLarge         a message over the daemon's ``limits.message_bytes``
├── ModelError                  the daemon can't serve this model
│   ├── ModelUnsupported        a file whose family or weights it doesn't know
│   ├── ModelNotFound           no such file, or no such model id
│   ├── ModelNotAllowed         a file outside ``models.roots``
│   └── ModelCorrupt            a file that is truncated, altered or no safetensors
├── RequestError                a request that names the wrong thing
│   ├── ArgumentError           an argument with a bad dtype, shape or value; ``argument`` names it
│   ├── ConfigInvalid           a reload of a configuration that can't be used, or not without a restart
│   └── JobNotFound             no such job
├── NotAllowed                  a verb that this peer may not use
├── EngineError                 the ranks could not finish the work
│   ├── OutOfMemory             a device ran out of memory
│   └── RankFailed              a rank died, hung or raised, and so did every retry
├── Cancelled                   the job was cancelled
├── QueueFull                   more work or bytes than the daemon's limits take
└── Unavailable                 the daemon is starting, draining or has given up on its ranks

Every message names what was at fault and says what to do next. An error crosses the wire as
``{"code": class name, "message": str, "details": {...}}`` and is raised by the client as the same class.
"""

from __future__ import annotations

from typing import Any

from tacod_client.text import encodable, shortened

__all__ = [
    "ArgumentError",
    "Cancelled",
    "ConfigInvalid",
    "ConnectionFailed",
    "ConnectionLost",
    "EngineError",
    "JobNotFound",
    "MessageTooLarge",
    "ModelCorrupt",
    "ModelError",
    "ModelNotAllowed",
    "ModelNotFound",
    "ModelUnsupported",
    "NotAllowed",
    "OutOfMemory",
    "ProtocolError",
    "QueueFull",
    "RankFailed",
    "RequestError",
    "TacodError",
    "Unavailable",
]


MESSAGE_CHARACTERS = 4000
DETAIL_CHARACTERS = 1000
"""How much of an error's texts is sent: a rank's report must fit in a packet."""


class TacodError(Exception):
    """Base of every error of this package; ``details`` holds values for programs."""

    def __init__(self, message: str, /, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = details

    def to_wire(self) -> dict[str, Any]:
        """The error as a message body: ``code``, ``message``, ``details``; long texts are cut."""
        details = {
            name: shortened(encodable(each), DETAIL_CHARACTERS) if isinstance(each, str) else each
            for name, each in self.details.items()
        }
        message = shortened(encodable(self.message), MESSAGE_CHARACTERS)
        return {"code": type(self).__name__, "message": message, "details": details}

    @staticmethod
    def from_wire(body: Any) -> TacodError:
        """The error that a message body stands for; an unknown code becomes a plain `TacodError`."""
        if not isinstance(body, dict):
            return ProtocolError("the daemon sent an error without a body; are client and daemon of one version?")
        kind = _BY_CODE.get(str(body.get("code")), TacodError)
        details = body.get("details")
        clean = {str(k): v for k, v in details.items()} if isinstance(details, dict) else {}
        return kind(str(body.get("message", "no message")), **clean)


class ConnectionFailed(TacodError):
    """No daemon answers at the endpoint."""


class ConnectionLost(ConnectionFailed):
    """The daemon went away and did not come back in time."""


class ProtocolError(TacodError):
    """A message breaks the protocol; the message names the field."""


class MessageTooLarge(ProtocolError):
    """A message is over the daemon's ``limits.message_bytes``."""


class ModelError(TacodError):
    """The daemon can't serve the model."""


class ModelUnsupported(ModelError):
    """The file is readable, but the daemon doesn't run its family or its kind of weights."""


class ModelNotFound(ModelError):
    """There is no such file, or no model with such an id is loaded."""


class ModelNotAllowed(ModelError):
    """The file lies outside the daemon's ``models.roots``."""


class ModelCorrupt(ModelError):
    """The file is truncated, altered, or not what its name says."""


class RequestError(TacodError):
    """The request is well-formed, but asks for something that can't be done."""


class ArgumentError(RequestError):
    """One argument has a bad dtype, shape or value; ``argument`` is its name."""

    def __init__(self, message: str, /, *, argument: str = "", **details: Any) -> None:
        super().__init__(message, argument=argument, **details)
        self.argument = argument


class ConfigInvalid(RequestError):
    """The new configuration can't be used; the old one stays in force."""


class JobNotFound(RequestError):
    """No job with this id is queued or running."""


class NotAllowed(TacodError):
    """The peer may not use this verb."""


class EngineError(TacodError):
    """The ranks could not finish the work."""


class OutOfMemory(EngineError):
    """A device ran out of memory; the details say what was asked for and what was free."""


class RankFailed(EngineError):
    """A rank died, hung or raised, and so did every retry; carries the first rank's signal or traceback."""


class Cancelled(TacodError):
    """The job was cancelled, by its client or by an operator."""


class QueueFull(TacodError):
    """The daemon holds as much work or as many bytes as its limits allow; try again later."""


class Unavailable(TacodError):
    """The daemon is up and takes no work now."""


_BY_CODE: dict[str, type[TacodError]] = {
    cls.__name__: cls for cls in list(globals().values()) if isinstance(cls, type) and issubclass(cls, TacodError)
}
