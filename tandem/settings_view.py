"""`tandem config show`: every setting of a process with its value and where that came from."""

import os
import sys
import tomllib
from dataclasses import dataclass

from pydantic_settings import CliSettingsSource

from runtime.config import CONFIG_FILE, ENV_PREFIX, Settings, parse, secret_names, values_of_named_files
from runtime.errors import StartupError
from runtime.settings import GatewaySettings, UpSettings, WorkerSettings

CLASSES: dict[str, type[Settings]] = {
    "up": UpSettings,
    "gateway": GatewaySettings,
    "prefill": WorkerSettings,
    "decode": WorkerSettings,
}
"""Command -> its settings."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting."""

    name: str
    """As a flag."""
    value: str
    origin: str
    """flag, environment, file or default."""


def rows(command: str, argv: list[str]) -> list[Row]:
    """All settings of `tandem COMMAND ARGV`, as declared; StartupError if they are wrong."""
    cls = CLASSES[command]
    settings = parse(cls, argv, prog=f"tandem {command}")
    flags = _flags(cls, argv)
    named_files = values_of_named_files(cls)
    variables = {name.upper() for name in os.environ}
    file = tomllib.loads(CONFIG_FILE.read_text()) if CONFIG_FILE.is_file() else {}
    found = []
    for name in cls.model_fields:
        if name in flags:
            origin = "flag"
        elif (ENV_PREFIX + name).upper() in variables or name in named_files:
            origin = "environment"
        else:
            origin = "file" if name in file else "default"
        value = _shown(getattr(settings, name), secret=name in secret_names(cls))
        found.append(Row(name="--" + name.replace("_", "-"), value=value, origin=origin))
    return found


def _shown(value: object, *, secret: bool) -> str:
    if value is None:
        return "unset"
    if secret:
        return "***"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _flags(cls: type[Settings], argv: list[str]) -> set[str]:
    """Names of the settings that the command line gives."""
    source = CliSettingsSource[Settings](cls, cli_parse_args=argv, cli_exit_on_error=False)
    return set(source())


def show(words: list[str]) -> None:
    """Print the settings of `tandem WORDS`; without a command, those of `tandem up`."""
    command = words[0] if words and not words[0].startswith("-") else "up"
    if command not in CLASSES:
        raise StartupError(f"config show {command}: expected one of {', '.join(CLASSES)}")
    found = rows(command, words[1:] if words[:1] == [command] else words)
    widths = [max(len(row.name) for row in found), max(len(row.value) for row in found)]
    for row in found:
        sys.stdout.write(f"{row.name:{widths[0]}}  {row.value:{widths[1]}}  {row.origin}\n")
