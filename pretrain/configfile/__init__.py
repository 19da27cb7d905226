"""Read a config from YAML and dotted overrides. Every mistake is reported with file, line, key and the likely fix."""

from pretrain.configfile.command_line import (
    CommandLine,
    build_parser,
    exit_with_mistake,
    read_command_line,
)
from pretrain.configfile.document import ConfigError
from pretrain.configfile.load import Loaded, flatten, load_config

__all__ = [
    "CommandLine",
    "ConfigError",
    "Loaded",
    "build_parser",
    "exit_with_mistake",
    "flatten",
    "load_config",
    "read_command_line",
]
