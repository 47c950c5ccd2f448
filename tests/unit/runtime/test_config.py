"""Precedence, one-line errors, and flags that survive the way to another process."""

from pathlib import Path

import pytest

from runtime import config
from runtime.errors import StartupError
from runtime.settings import GatewaySettings, UpSettings, WorkerSettings


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tandem.toml"
    monkeypatch.setattr(config, "CONFIG_FILE", path)
    monkeypatch.setitem(config.Settings.model_config, "toml_file", path)
    for cls in (GatewaySettings, UpSettings, WorkerSettings):
        monkeypatch.setitem(cls.model_config, "toml_file", path)
    return path


def gateway(*argv: str) -> GatewaySettings:
    return config.parse(GatewaySettings, list(argv), prog="tandem gateway")


def test_flags_beat_environment_beats_file_beats_default(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gateway().http_port == 8000
    toml.write_text("http_port = 8001\ngrpc_port = 50001\nlog_level = 'error'\n")
    assert gateway().http_port == 8001
    monkeypatch.setenv("TANDEM_HTTP_PORT", "8002")
    monkeypatch.setenv("TANDEM_GRPC_PORT", "50002")
    assert gateway().http_port == 8002
    settings = gateway("--http-port=8003")
    assert (settings.http_port, settings.grpc_port, settings.log_level) == (8003, 50002, "error")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--http-port=70000"], r"--http-port: .*65535"),
        (["--http-port=x"], "--http-port: .*integer"),
        (["--log-level=loud"], "--log-level: .*'debug'"),
        (["--nope"], "--nope"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(argv: list[str], message: str) -> None:
    with pytest.raises(StartupError, match=message) as caught:
        gateway(*argv)
    assert "\n" not in caught.value.message


def test_a_key_that_nobody_knows_is_refused(toml: Path) -> None:
    toml.write_text("htpp_port = 1\n")
    with pytest.raises(StartupError, match="unknown setting 'htpp_port'; did you mean 'http_port'"):
        gateway()
    toml.write_text("http-port = 1\n")
    with pytest.raises(StartupError, match="did you mean 'http_port'"):
        gateway()
    toml.write_text("prefill = 2\n")  # a setting of `tandem up`
    gateway()
    toml.write_text("http_port = ")
    with pytest.raises(StartupError, match=r"tandem\.toml"):
        gateway()


def test_flags_for_another_process_give_the_same_settings() -> None:
    argv = ["--gateway=a:1", "--gateway=b:2", "--threads=2", "--max-model-len=100"]
    settings = config.parse(WorkerSettings, argv, prog="tandem prefill")
    assert settings.gateway == ["a:1", "b:2"]
    assert config.parse(WorkerSettings, config.to_argv(settings), prog="tandem prefill") == settings
    quiet = config.parse(GatewaySettings, ["--no-reflection"], prog="tandem gateway")
    assert config.parse(GatewaySettings, config.to_argv(quiet), prog="tandem gateway") == quiet


def test_a_secret_may_stand_in_a_file(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "admin_key"
    monkeypatch.setenv("TANDEM_ADMIN_KEY_FILE", str(secret))
    toml.write_text("admin_key = 'least'\n")
    with pytest.raises(StartupError, match="TANDEM_ADMIN_KEY_FILE: cannot read"):
        gateway()
    secret.write_text("\n")
    assert gateway().admin_key == "least"  # an empty file, /dev/null for example, is no key
    secret.write_text("from a file\n")
    assert gateway().admin_key == "from a file"
    monkeypatch.setenv("TANDEM_ADMIN_KEY", "from a variable")
    assert gateway().admin_key == "from a variable"
    assert gateway("--admin-key=flag").admin_key == "flag"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 1 << 20),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("2GB", 2_000_000_000),
        ("8g", 8 * 10**9),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert config.parse_bytes(text, "--kv-cache-memory") == size


@pytest.mark.parametrize("text", ["", "many", "-1GiB", "1PiB"])
def test_what_is_not_a_size_names_the_flag(text: str) -> None:
    with pytest.raises(StartupError, match="--kv-cache-memory"):
        config.parse_bytes(text, "--kv-cache-memory")


def test_every_setting_has_help() -> None:
    for cls in (UpSettings, GatewaySettings, WorkerSettings):
        for name, field in cls.model_fields.items():
            assert field.description, f"{cls.__name__}.{name}"


def test_secrets_are_shown_nowhere(toml: Path) -> None:
    settings = config.parse(UpSettings, ["--api-keys=hush", "--admin-key=hush"], prog="tandem up")
    assert config.secret_names(UpSettings) == ["internal_secret", "admin_key", "api_keys"]
    assert "hush" not in repr(settings)
    assert not any("hush" in word for word in config.to_argv(settings))
    assert config.secrets_env(settings) == {"TANDEM_API_KEYS": "hush", "TANDEM_ADMIN_KEY": "hush"}
    toml.write_text('api_keys = ["hush"]\n')
    with pytest.raises(StartupError, match=r"--api-keys: .*string") as caught:
        gateway()
    assert "hush" not in caught.value.message
