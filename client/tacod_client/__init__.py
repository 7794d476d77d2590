"""The client of tacod: models on its devices, used as if they were here.

    from tacod_client import Client
    with Client() as client:
        model = client.load("flux1-dev.safetensors")
        out = model.forward(x=x, timestep=t, context=context, y=y, guidance=guidance)

Importing it imports neither torch nor anything of the daemon.
"""

from tacod_client.client import Client
from tacod_client.errors import (
    ArgumentError,
    Cancelled,
    ConfigInvalid,
    ConnectionFailed,
    ConnectionLost,
    EngineError,
    JobNotFound,
    MessageTooLarge,
    ModelCorrupt,
    ModelError,
    ModelNotAllowed,
    ModelNotFound,
    ModelUnsupported,
    NotAllowed,
    OutOfMemory,
    ProtocolError,
    QueueFull,
    RankFailed,
    RequestError,
    TacodError,
    Unavailable,
)
from tacod_client.job import Job, Progress
from tacod_client.model import Model
from tacod_client.stats import Call, ModelStats
from tacod_client.version import __version__

__all__ = [
    "ArgumentError",
    "Call",
    "Cancelled",
    "Client",
    "ConfigInvalid",
    "ConnectionFailed",
    "ConnectionLost",
    "EngineError",
    "Job",
    "JobNotFound",
    "MessageTooLarge",
    "Model",
    "ModelCorrupt",
    "ModelError",
    "ModelNotAllowed",
    "ModelNotFound",
    "ModelStats",
    "ModelUnsupported",
    "NotAllowed",
    "OutOfMemory",
    "Progress",
    "ProtocolError",
    "QueueFull",
    "RankFailed",
    "RequestError",
    "TacodError",
    "Unavailable",
    "__version__",
]
