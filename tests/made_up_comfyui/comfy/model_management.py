"""Looks for GPUs as it is imported, unless it is told to stay on the CPU."""

from __future__ import annotations

import logging

import torch
from comfy.cli_args import args

if not args.cpu and not torch.cuda.is_available():
    raise RuntimeError("a rank on a CPU has looked for GPUs")
logging.info("TOTAL VRAM of the made-up ComfyUI")
