"""The command line of the launch scripts: `--config FILE key.path=value ...`."""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NoReturn

from pretrain.config.schema import alternatives, default_text, dotted, sections, sections_at, union_name
from pretrain.config.section import Section
from pretrain.configfile.document import ConfigError
from pretrain.configfile.load import Config, load_config
from pretrain.errors import UserError
from pretrain.outcome import EXIT_USER_ERROR
from pretrain.rank_variables import check_rank_variables, is_first_rank


@dataclass(frozen=True)
class CommandLine(Generic[Config]):
    """The parsed command line of a launch script.

    Attributes:
        config: The config.
        text: The whole config as YAML, with the origin of each value as a comment.
        resume: Whether the run must continue from a checkpoint.
    """

    config: Config
    text: str
    resume: bool


def read_command_line(
    config_class: type[Config], description: str, example: str, *, resumable: bool
) -> CommandLine[Config]:
    """Parse `--config FILE key.path=value ...`. On mistakes, print them and exit with code 2.

    Args:
        config_class: Class of the config.
        description: Purpose of the script, for --help.
        example: Command line to show in --help.
        resumable: Whether the script has the option --resume.
    """
    arguments = build_parser(config_class, description, example, resumable=resumable).parse_intermixed_args()
    try:
        check_rank_variables(os.environ)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)  # on every rank, because the ranks are what is wrong
        sys.exit(EXIT_USER_ERROR)
    try:
        loaded = load_config(config_class, arguments.config, arguments.overrides)
    except ConfigError as error:
        exit_with_mistake(str(error))
    if arguments.print_config:
        if is_first_rank(os.environ):
            print(loaded.text, end="")
        sys.exit(0)
    return CommandLine(loaded.config, loaded.text, resumable and arguments.resume)


def build_parser(
    config_class: type[Section], description: str, example: str, *, resumable: bool
) -> argparse.ArgumentParser:
    """Build the command-line parser of a launch script.

    Args:
        config_class: Class of the config.
        description: Purpose of the script, for --help.
        example: Command line to show in --help.
        resumable: Whether the script has the option --resume.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}\n\nkeys and defaults:\n{_reference(config_class)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML file with the config")
    parser.add_argument("--print-config", action="store_true", help="print every value with its origin and exit")
    if resumable:
        resume_help = "exit with an error if the run folder has no checkpoint; by default it starts from step 0"
        parser.add_argument("--resume", action="store_true", help=resume_help)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="values that override the file's, such as optimizer.learning_rate=3e-4",
    )
    return parser


def exit_with_mistake(message: str) -> NoReturn:
    """Print a user's mistake on the first rank and exit with code 2."""
    if is_first_rank(os.environ):
        print(message, file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def _reference(config_class: type[Section]) -> str:
    """Return every key with its default and description, by section."""
    lines = []
    for above, section in sections(config_class):
        fields = {key: field for key, field in section.model_fields.items() if not alternatives(field)}
        name = union_name(section) if len(sections_at(config_class, above)) > 1 else ""
        if above:
            lines += ["", f"{dotted(above)} with name={name}:" if name else f"{dotted(above)}:"]
        for name, field in fields.items():
            lines.append(f"  {dotted((*above, name)) + ': ' + default_text(field):<52} {field.description or ''}")
    return "\n".join(lines)
