"""Faults on purpose, for tests."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from tacod.config.section import CountOrZero, Section

__all__ = ["I_KNOW", "Fault", "Testing"]


I_KNOW = "this daemon fails on purpose"


class Fault(Section):
    """One fault in a rank, on purpose."""

    kind: Literal["raise", "out_of_memory", "exit", "segfault", "sleep", "slow", "collective"]
    """``collective`` waits for an exchange that no other rank takes part in, for ever, as ``sleep`` does in Python.
    ``slow`` waits for `seconds` and goes on."""
    at: Literal["start", "load", "unload", "forward", "call", "sample"] = "forward"
    """In which work; each step of a sampling run is one."""
    when: Literal["before", "after", "block", "written"] = "before"
    """Before the rank's part of the work, so that the others wait for it, after it, before a block of a watched
    forward, or in rank 0 between the writing of a result to a client's memory and its completion."""
    block: CountOrZero | None = None
    """With ``block``: before which one; each of them if absent."""
    seconds: PositiveFloat = 1.0
    rank: CountOrZero | None = None
    """Which rank; all of them if absent."""
    group: str | None = None
    """In which group; in each of them if absent."""
    skip: CountOrZero = 0
    """How many times such work goes well first."""
    always: bool = False
    """Whether it happens every time from then on, not once."""

    @model_validator(mode="after")
    def _can_be(self) -> Fault:
        if self.at == "start" and (self.when != "before" or self.kind in ("collective", "out_of_memory")):
            raise ValueError(f'at = "start" is before all work: no {self.kind} there, and nothing after it')
        if self.when == "block" and self.at not in ("forward", "sample"):
            raise ValueError(f'when = "block": there are none in {self.at}; use at = "forward" or "sample"')
        if self.when == "written" and self.at != "forward":
            raise ValueError(f'when = "written": no {self.at} writes to a client\'s memory; use at = "forward"')
        if self.block is not None and self.when != "block":
            raise ValueError('block is for when = "block" alone; remove it, or set that')
        return self


class Testing(Section):
    """Faults on purpose, so that tests can watch how tacod handles them."""

    i_know: Literal["this daemon fails on purpose"]
    faults: list[Fault] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _is_meant(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("i_know") != I_KNOW:
            raise ValueError(f'is for tests alone; remove it, or set i_know = "{I_KNOW}" in it')
        return values
