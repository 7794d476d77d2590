"""TACO-DiT for ComfyUI: nodes that let `tacod` run the diffusion transformer on all of your GPUs.

``tacoctl install-nodes`` links this folder into ``custom_nodes`` and checks ComfyUI's environment.
"""

try:
    import tacod_client  # noqa: F401
except ImportError as error:
    raise ImportError(
        "TACO-DiT not available: its client is not installed in ComfyUI's Python; "
        "run `python -m pip install taco-dit` there, or on your wheel or clone of it, then start ComfyUI again"
    ) from error

from . import hooks

hooks.tell_missing()

from . import origin, routes, shell  # noqa: E402
from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: E402

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

WEB_DIRECTORY = "./web"

origin.watch_loaders()
shell.refuse_bypass()
routes.register()
