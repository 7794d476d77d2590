"""What a configuration names beside itself: keys and paths, looked at before they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tacod.config import Config, ConfigError
from tacod.serving import places
from tacod.serving.access import Keys

__all__ = ["faults"]


def faults(path: str, config: Config) -> Iterator[ConfigError]:
    """What would end a start with this configuration, whose file is ``path``; changes nothing."""
    looks: list[Callable[[], object]] = [
        lambda: Keys.read(path, config.curve),
        lambda: places.check(path, config),
    ]
    for look in looks:
        try:
            look()
        except ConfigError as error:
            yield error
