"""On an Intel CPU, has MKL give what it gives on others, if this is imported before torch.

MKL chooses another exp, sin and order of sums on Intel's CPUs than on AMD's. The embedding of 1000 times a timestep
then differs in the sixth digit from the goldens'. ``MKL_CBWR=COMPATIBLE`` is its setting for results that do not depend
on the CPU (Conditional Numerical Reproducibility, in Intel's manual of MKL). Daemons that tests start inherit it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

with suppress(OSError):
    if "GenuineIntel" in Path("/proc/cpuinfo").read_text():
        os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
