"""How a process gets its settings: flags > TANDEM_* environment > tandem.toml > defaults.

A variable TANDEM_*_FILE names a file that holds the value: a secret then stands in no environment.

A settings class is the only place where a flag, its variable, its default and its help are written.
"""

import difflib
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from runtime.errors import StartupError

ENV_PREFIX = "TANDEM_"
CONFIG_FILE = Path(os.environ.get("TANDEM_CONFIG", "tandem.toml"))

S = TypeVar("S", bound="Settings")


class Settings(BaseSettings):
    """Base of every settings class; fields carry their help as a docstring below them."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        toml_file=CONFIG_FILE,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags and code first, then the environment, then the file."""
        named_files = InitSettingsSource(settings_cls, values_of_named_files(settings_cls))
        return init_settings, env_settings, named_files, TomlConfigSettingsSource(settings_cls)


def parse(cls: type[S], argv: list[str], *, prog: str) -> S:
    """Settings of one process from its command line; raises StartupError with one line."""
    source: CliSettingsSource[Any] = CliSettingsSource(
        cls, cli_prog_name=prog, cli_exit_on_error=False, cli_parse_args=False
    )
    try:
        check_known_names()
        return CliApp.run(cls, cli_args=argv, cli_settings_source=source)
    except ValidationError as error:
        raise StartupError(_explain(error, secret_names(cls))) from None
    except SettingsError as error:
        raise StartupError(f"{prog}: {_last_clause(error)}") from error
    except tomllib.TOMLDecodeError as error:
        raise StartupError(f"{CONFIG_FILE}: {error}") from error


def values_of_named_files(cls: type[BaseSettings]) -> dict[str, Any]:
    """Settings whose TANDEM_<NAME>_FILE variable names a file, by name; an empty file says nothing.

    Raises StartupError naming the variable if the file cannot be read.
    """
    found = {}
    for name in cls.model_fields:
        variable = f"{ENV_PREFIX}{name.upper()}_FILE"
        if path := os.environ.get(variable):
            try:
                value = Path(path).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise StartupError(f"{variable}: cannot read {path} ({error})") from error
            if value:
                found[name] = value
    return found


def check_known_names() -> None:
    """Refuse a key of tandem.toml that no process knows: a typo must not be a silent default."""
    if not CONFIG_FILE.is_file():
        return
    known = {name for cls in _all_settings(Settings) for name in cls.model_fields}
    for key in tomllib.loads(CONFIG_FILE.read_text()):
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise StartupError(f"{CONFIG_FILE}: unknown setting {key!r}{hint}")


def _all_settings(cls: type[Settings]) -> list[type[Settings]]:
    found = [cls]
    for sub in cls.__subclasses__():
        found += _all_settings(sub)
    return found


def to_argv(settings: Settings) -> list[str]:
    """Flags that give another process exactly these settings, but for secrets: see `secrets_env`."""
    argv: list[str] = []
    shown = settings.model_dump(mode="json", exclude=set(secret_names(type(settings))))
    for name, value in shown.items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            argv.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            argv += [f"{flag}={item}" for item in value]
        else:
            argv.append(f"{flag}={value}")
    return argv


def secret_names(cls: type[Settings]) -> list[str]:
    """Settings of this class whose value is shown nowhere."""
    return [name for name, field in cls.model_fields.items() if not field.repr]


def secrets_env(settings: Settings) -> dict[str, str]:
    """Variables that give another process the secrets of `settings`: anybody may read a command line."""
    values = {name: getattr(settings, name) for name in secret_names(type(settings))}
    return {ENV_PREFIX + name.upper(): value for name, value in values.items() if value is not None}


def parse_bytes(text: str, flag: str) -> int:
    """Bytes of a size like 512MiB, 8GiB, 2GB or 1048576; StartupError names the flag."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise StartupError(f"{flag}: {text!r} is not a size like 512MiB or 8GiB")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** (" KMGT".index(unit.upper() or " ")))


def fail(error: StartupError) -> NoReturn:
    """Print the one line that explains why this process cannot start; exit code 2."""
    print(f"error: {error.message}", file=sys.stderr)  # noqa: T201 - the user's terminal is the place
    raise SystemExit(2)


def _explain(error: ValidationError, secrets: list[str]) -> str:
    parts = []
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else ""
        flag = "--" + name.replace("_", "-") if name else "settings"
        got = "" if name in secrets else f" (got {item.get('input')!r})"
        parts.append(f"{flag}: {item['msg']}{got}")
    return "; ".join(parts)


def _last_clause(error: Exception) -> str:
    return str(error).removeprefix("error parsing CLI: ")
