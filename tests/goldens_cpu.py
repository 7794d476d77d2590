"""On an Intel CPU, has MKL give what it gives on others, if this is imported before torch.

MKL chooses another exp, sin and order of sums on Intel's CPUs than on AMD's. The embedding of 1000 times a timestep
then differs in the sixth digit from the goldens'. ``MKL_CBWR=COMPATIBLE`` is its setting for results that do not depend
on the CPU (Conditional Numerical Reproducibility, in Intel's manual of MKL). Daemons that tests start inherit it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

INTEL = False
"""Whether this is one. Two processes give the same bits then only where tensors lie alike, by which MKL orders sums."""
with suppress(OSError):
    INTEL = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
if INTEL:
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
