"""What runs on a device: one process a rank, all doing the same in the same order."""

import gc

# What importing torch makes stays: to look for garbage in it meanwhile would take a tenth of that time.
_collects = gc.isenabled()
gc.disable()
try:
    import torch  # noqa: F401
finally:
    if _collects:
        gc.enable()
