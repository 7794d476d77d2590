"""The configuration: one TOML file, checked whole, frozen.

Unknown keys are errors, and every error reads ``file:key: reason``.
"""

from tacod.config.config import Config
from tacod.config.file import load_config, to_toml
from tacod.config.group import Group, check_apart
from tacod.config.section import ConfigError, ConfigUnreadable
from tacod.config.sections import Curve, Models
from tacod.config.testing import I_KNOW, Fault, Testing

__all__ = [
    "I_KNOW",
    "Config",
    "ConfigError",
    "ConfigUnreadable",
    "Curve",
    "Fault",
    "Group",
    "Models",
    "Testing",
    "check_apart",
    "load_config",
    "to_toml",
]
