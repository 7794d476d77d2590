"""The command line of ``tacoctl``: its verbs, their arguments, and the values that these take."""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import suppress
from typing import Any

from tacod_client.dtypes import ATTENTIONS, COMPUTE_DTYPES, WEIGHTS
from tacod_client.streams import stdout
from tacod_client.text import typed

__all__ = ["parser"]

MOST = 2**31 - 1
"""The largest count."""
MOST_PIXELS = 2**20
"""The longest side of a picture."""
MOST_RANKS = 64
"""As many as ``group.ranks`` may be; a plan for many more takes minutes."""
MOST_STEPS = 10_000

EPILOG = """\
exit codes: 0 ok, 1 failed, 2 usage, 3 daemon not reachable, 4 no such job or model,
69 unavailable, 75 queue full, 77 not allowed, 78 configuration"""


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error if its help can't be written; argparse's own drops it."""

    def print_help(self, file: Any = None) -> None:
        """Write the help to ``file``, by default to stdout. Raises `OSError`."""
        with stdout():
            (file or sys.stdout).write(self.format_help())


def parser() -> argparse.ArgumentParser:
    """The command line of ``tacoctl``."""
    anywhere = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    anywhere.add_argument(
        "--endpoint",
        metavar="E",
        type=_given,
        help="where tacod listens (default $TACOD_ENDPOINT, then the usual places)",
    )
    anywhere.add_argument("--json", action="store_true", help="print one JSON document")
    top = _Parser(
        prog="tacoctl",
        description="Looks at tacod and tells it what to do.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[anywhere],
    )
    top.set_defaults(watch=None)
    sub = top.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, help_text: str) -> argparse.ArgumentParser:
        return sub.add_parser(name, help=help_text, description=help_text, parents=[anywhere])

    for name, help_text in (
        ("status", "what tacod is doing: ranks, models, queue"),
        ("stats", "what it has done: forwards, times of a step and where they went"),
    ):
        verb(name, help_text).add_argument(
            "--watch", nargs="?", type=_seconds, const=2.0, metavar="S", help="again every S seconds (default 2)"
        )
    verb("models", "the loaded models")
    load = verb("load", "load a model file on all ranks")
    load.add_argument(
        "path", type=_name, help="a model file or diffusers folder, absolute or relative to one of models.roots"
    )
    load.add_argument(
        "--dtype",
        choices=COMPUTE_DTYPES,
        metavar="DTYPE",
        help="compute dtype: fp32, bf16, fp16, or fp8 for the blocks' matrices (default: as the device suits); with "
        "_weight_only behind it, a quantized model's activations are never quantized",
    )
    load.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="where they lie: replicated (whole on each GPU), sharded (a share on each GPU), host (in the host's "
        "memory), auto (as many blocks on each GPU as models.memory_bytes allows; the default)",
    )
    load.add_argument(
        "--lora",
        action="append",
        type=_lora,
        default=[],
        metavar="FILE[=STRENGTH]",
        help="a LoRA file to merge in, at a strength (default 1); may be given several times",
    )
    verb("unload", "give a model's memory back").add_argument(
        "model", type=_name, help="a model id, or a unique start of one"
    )
    _add_sample(verb("sample", "run a sampler with conditioning from a file, and write the latent"))
    verb("ps", "the running and the queued jobs")
    verb("cancel", "cancel a job").add_argument("job", type=_name, help="a job id, as ps shows it")
    verb("ping", "the round trip to the daemon")
    verb("reload", "read the configuration again, as `systemctl reload tacod` does; needs sudo")
    drain = verb("drain", "end what runs, take no new work, and stop; needs sudo")
    drain.add_argument("--wait", action="store_true", help="until it has stopped")
    keygen = verb("keygen", "make a pair of CURVE keys, for TCP; overwrites nothing")
    keygen.add_argument("name", nargs="?", default="client", help="of the files (default client)")
    keygen.add_argument("--folder", type=_given, metavar="DIR", help="where they go (default ~/.config/tacod)")
    _add_plan(verb("plan", "how a model file would be spread over ranks; needs no daemon"))
    _add_bench(verb("bench", "time a forward on one rank and on all, and say what bounds it"))
    demo = verb("demo", "a throw-away tacod draws a picture with the embedded model")
    demo.add_argument("prompt", nargs="?", help="what to draw")
    demo.add_argument("--ranks", type=_ranks, metavar="N", help="how many ranks (default 3)")
    demo.add_argument("--output", type=_given, metavar="FILE", help="where the picture goes (default demo.png)")
    top_verb = verb("top", "a live view: ranks, memory, queue, step times; ctrl-C ends it")
    top_verb.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="S", help="seconds between looks, default 1"
    )
    top_verb.add_argument("--once", action="store_true", help="one look, then end")
    doctor = verb("doctor", "look for what stands in the way, and say what to do")
    doctor.add_argument(
        "--config", type=_given, metavar="FILE", help="the daemon's configuration (default /etc/tacod/config.toml)"
    )
    doctor.add_argument("--no-bandwidth", action="store_true", help="don't measure how fast GPUs reach each other")
    service = verb("install-service", "put the systemd unit in place, and say what was done; needs sudo")
    service.add_argument("--prefix", type=_given, default="/", metavar="DIR", help="what to install under (default /)")
    service.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    service.add_argument("--gpus", type=_names, metavar="3,4,5", help="the GPUs of a new configuration")
    service.add_argument(
        "--comfyui", type=_given, metavar="DIR", help="the ComfyUI whose networks the daemon may run, if it has none"
    )
    service.add_argument("--uninstall", action="store_true", help="take away what was installed")
    nodes = verb("install-nodes", "link the nodes into a ComfyUI, and check its Python; done again, it changes nothing")
    nodes.add_argument(
        "path",
        nargs="?",
        type=_given,
        metavar="COMFYUI_PATH",
        help="the folder with ComfyUI's main.py (default $COMFYUI_PATH, or the current folder); $COMFYUI_PYTHON is its "
        "Python (default its own venv or .venv, or the one that runs tacoctl)",
    )
    nodes.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    nodes.add_argument("--uninstall", "--remove", action="store_true", help="remove the link")
    verb("version", "the version of tacoctl, and of the daemon if it runs")
    completion = verb("completion", "print a completion script for your shell")
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return top


def _add_sample(sample: argparse.ArgumentParser) -> None:
    sample.add_argument("model", type=_name, help="a model id or a unique start of one, or a file as for load")
    sample.add_argument(
        "inputs",
        type=_given,
        help="a .safetensors file with positive.context, positive.y, … and, where cfg is not 1, negative.context, …; "
        "it may hold noise, latent and sigmas too (noise.0, noise.1, … for a model of several latents)",
    )
    sample.add_argument(
        "--output", type=_given, default="latent.safetensors", metavar="FILE", help="default latent.safetensors"
    )
    sample.add_argument("--sampler", default="euler", help="default euler; an unknown one is refused with the list")
    sample.add_argument("--steps", type=_steps, default=28, help="default 28; not used if the inputs hold sigmas")
    sample.add_argument("--shift", type=_above_zero, help="a flow's timestep shift, default 3; for no other model")
    sample.add_argument("--cfg", type=_finite, default=1.0, help="guidance scale, default 1 (no negative)")
    sample.add_argument("--seed", type=_seed, default=0, help="of the noise, default 0")
    sample.add_argument("--size", type=_size, default=(1024, 1024), metavar="WxH", help="in pixels, default 1024x1024")
    sample.add_argument("--channels", type=_positive, help="of the latent, default the model's")
    sample.add_argument(
        "--frames", type=_positive, default=1, help="of a video's latent, default 1; for no other model"
    )
    _add_attention(sample)


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("file", type=_given, help="a model file or diffusers folder")
    plan.add_argument("--ranks", type=_ranks, required=True, metavar="N")
    plan.add_argument("--size", type=_size, default=(1024, 1024), metavar="WxH", help="in pixels, default 1024x1024")
    plan.add_argument("--batch", type=_positive, default=1, metavar="B", help="default 1")
    plan.add_argument("--text", type=_positive, default=512, metavar="L", help="text tokens, default 512")
    plan.add_argument(
        "--memory",
        type=_gibs,
        metavar="GIB",
        help="also say where the weights would lie with so many GiB for them on each GPU, as models.memory_bytes; "
        "one number for each rank of unlike GPUs: 24,24,8",
    )
    plan.add_argument(
        "--shares",
        type=_shares,
        metavar="N,N,…",
        help="how much each rank takes, as group.shares: 2,1,1; by default all take the same",
    )
    plan.add_argument(
        "--comfyui",
        type=_given,
        metavar="DIR",
        help="the folder of a ComfyUI, as comfyui.path: its code says how large a network is that no family has",
    )


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument(
        "model",
        nargs="?",
        type=_name,
        help="a model id or a unique start of one, or a file as for load (default: the one used last)",
    )
    bench.add_argument(
        "--size",
        action="append",
        type=_size,
        metavar="WxH",
        help="in pixels, default 1024x1024; may be given several times",
    )
    bench.add_argument("--batch", type=_positive, default=1, metavar="B", help="default 1; 2 is an image with CFG")
    bench.add_argument("--text", type=_positive, metavar="L", help="text tokens (default: as the family has them)")
    bench.add_argument("--rounds", type=_positive, default=10, metavar="N", help="forwards that are timed, default 10")
    _add_attention(bench)


def _add_attention(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--attention",
        choices=ATTENTIONS,
        default="exact",
        metavar="KERNEL",
        help="the kernel of the blocks' attention: exact (the default), sage (SageAttention 2), int8 (comfy-kitchen), "
        "fa3 (FlashAttention 3); refused where a card or a package doesn't allow it",
    )


def _seconds(text: str) -> float:
    value = _number(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"expected 0.1 to 3600 seconds, got {text!r}")
    return value


def _number(text: str) -> float:
    """A finite number; not a number for any other text."""
    with suppress(ValueError):
        return value if math.isfinite(value := float(text)) else math.nan
    return math.nan


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError("expected indexes or UUIDs with commas between, such as 3,4,5")
    return names


def _given(text: str) -> str:
    """Refuse an empty text, which a shell makes of a variable that isn't set: it never stands for a default."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a name, or leave it out")
    return text


def _name(text: str) -> str:
    """A name that goes to the daemon."""
    return typed(_given(text))


def _count(text: str, most: int) -> int:
    if not (text.isascii() and text.isdecimal()) or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text[:40]!r}")
    # Of a number of thousands of digits Python makes none.
    if len(text) > 18 or int(text) > most:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {most}, got {text[:40]!r}")
    return int(text)


def _positive(text: str) -> int:
    return _count(text, MOST)


def _gibs(text: str) -> str:
    """Whole GiB, one number or some with commas; the program counts them."""
    return ",".join(str(_positive(each)) for each in text.split(","))


def _shares(text: str) -> str:
    """Whole numbers with commas; the program counts them."""
    return ",".join(str(_positive(each)) for each in text.split(","))


def _ranks(text: str) -> int:
    return _count(text, MOST_RANKS)


def _steps(text: str) -> int:
    return _count(text, MOST_STEPS)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 20 or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^64 - 1, got {text[:40]!r}")
    return int(text)


def _finite(text: str) -> float:
    if math.isnan(value := _number(text)):
        raise argparse.ArgumentTypeError(f"expected a number, got {text[:40]!r}")
    return value


def _above_zero(text: str) -> float:
    if not (value := _number(text)) > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text[:40]!r}")
    return value


def _lora(text: str) -> tuple[str, float]:
    path, given, strength = text.rpartition("=")
    if not given:
        return _name(text), 1.0
    if not path or math.isnan(_number(strength or "1")):
        raise argparse.ArgumentTypeError(f"expected FILE or FILE=STRENGTH with a number, got {text!r}")
    return _name(path), _number(strength or "1")


def _size(text: str) -> tuple[int, int]:
    sides = [int(side) if side.isascii() and side.isdecimal() and len(side) < 9 else 0 for side in text.split("x")]
    if len(sides) != 2 or not all(16 <= side <= MOST_PIXELS for side in sides):
        raise argparse.ArgumentTypeError(
            f"expected WIDTHxHEIGHT in pixels, such as 1024x768, each from 16 to {MOST_PIXELS}"
        )
    return sides[0], sides[1]
