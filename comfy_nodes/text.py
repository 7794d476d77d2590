"""What the display nodes say, line by line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["info_text", "stats_text", "success_text", "version_text"]


def success_text(info: Mapping[str, Any]) -> str:
    """What the console shows once a model is in the daemon."""
    return "\n".join(
        (
            "TACO-DiT model loaded successfully:",
            f"  - Parallel enabled: {info['world_size'] > 1}",
            f"  - Model type: {info['family']}",
            "  - xDit wrapper: True",
        )
    )


def info_text(info: Mapping[str, Any]) -> str:
    """A loader's TACO_DIT_INFO."""
    if not info["enabled"]:
        return "TACO-DiT is off: this model runs in ComfyUI, on one device."
    devices = ", ".join(info["devices"])
    lines = [
        f"Model: {info['name']} ({info['family']}, {_count(info['parameters'])} parameters, {info['dtype']})",
        f"Ranks: {info['world_size']} ({devices})" + (f" of group {info['group']}" if info.get("group") else ""),
        f"Plan: {info['plan']}",
        f"Weights: {info['weights']}",
        *([f"Memory: {_memory(info)}"] if any(info["streamed_bytes"]) else []),
        *([f"Quantized: {_layers(info['quantization'])}"] if info["quantization"] else []),
        f"Daemon: tacod {info['version']} at {info['endpoint']}, {info['state']}",
    ]
    if info["patches"]:
        lines.insert(3, f"Patches: {info['patches']} (LoRA and the like), applied in the daemon")
    if info["note"]:
        lines.append(f"Asked for, but not possible: {info['note']}")
        lines.append("Planned instead: what the daemon finds fastest")
    lines += [f"Note: {remark}" for remark in info["remarks"]]
    return "\n".join(lines)


def version_text(daemon: str, client: str) -> str:
    """What to say of a daemon and a client of different versions; nothing if they are of one."""
    if daemon == client:
        return ""
    return (
        f"the daemon is TACO-DiT {daemon}, and the client in ComfyUI's Python is {client}. What the older one doesn't "
        "know it refuses by name; install the same version for both"
    )


def stats_text(stats: Mapping[str, Any]) -> str:
    """A run's TACO_DIT_STATS."""
    if not stats["enabled"]:
        return f"TACO-DiT was off: {stats['steps']} steps in {stats['seconds']:.2f} s, on one device."
    lines = [
        f"Model: {stats['model']} ({stats['family']})",
        f"Steps: {stats['steps']} in {stats['seconds']:.2f} s "
        f"(mean {_seconds(stats['step_mean_s'])}, p95 {_seconds(stats['step_p95_s'])})",
        f"Forwards: {stats['forwards']}, {stats['parallel_forwards']} of them parallel, on {stats['ranks']} ranks",
        f"Plan: {stats['plan']}",
        f"Split: {_split(stats)}",
        f"Speed: {_speed(stats)}",
        f"Executions so far: {stats['executions']}, {_seconds(stats['mean_s'])} on average",
    ]
    if stats["retries"]:
        lines.insert(4, f"Retries: {stats['retries']} (ranks were lost and replaced; the result is the same)")
    return "\n".join(lines)


def _memory(info: Mapping[str, Any]) -> str:
    """Where weights lie that aren't whole on each rank."""
    where = "with the other ranks" if info["placement"] == "sharded" else "in the host's memory"
    held, fetched = ([f"{each / 2**30:.1f} GiB" for each in info[key]] for key in ("resident_bytes", "streamed_bytes"))
    if len(set(zip(held, fetched, strict=True))) == 1:
        return f"{held[0]} of the weights on each rank; {fetched[0]} lie {where} and are fetched in each forward"
    return (
        f"{', '.join(held)} of the weights on ranks 0 to {len(held) - 1}; what they lack lies {where}, and they fetch "
        f"{', '.join(fetched)} in each forward"
    )


def _split(stats: Mapping[str, Any]) -> str:
    names = ("compute", "collective", "wire", "queue", "client")
    total = stats["forward_s"] or 1.0
    parts = {name: stats[f"{name}_s"] for name in names}
    return ", ".join(f"{name} {_seconds(seconds)} ({seconds / total:.0%})" for name, seconds in parts.items())


def _speed(stats: Mapping[str, Any]) -> str:
    alone = stats["single_rank_s"]
    if alone is None:
        return "not compared yet (run once with auto_detect off, sequence_parallel_degree 1, cfg_parallel off)"
    return f"{alone / stats['forward_s']:.2f} times one rank, which takes {_seconds(alone)} for these forwards"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def _layers(formats: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count} layer{'s' * (count != 1)})" for name, count in formats.items())


def _count(n: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)
