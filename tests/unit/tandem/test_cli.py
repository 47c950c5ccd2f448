"""The command line: exit codes, one-line errors, origins of settings."""

import pytest

from runtime import config
from tandem import cli, settings_view


@pytest.fixture
def run(monkeypatch, capsys):
    def runner(*argv):
        monkeypatch.setattr("sys.argv", ["tandem", *argv])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return runner


def test_version(run):
    code, out, err = run("version")
    assert code == 0
    assert out.strip()
    assert err == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["no-such-command"],
        ["complete"],
        ["complete", "x", "--max-tokens", "many"],
        ["up", "--decode", "0"],
        ["up", "--no-such-flag"],
        ["up", "--model", "/no/such/place"],
        ["config", "show", "worker"],
        ["config", "show", "decode", "--port", "x"],
        ["bench", "--goodput", "speed:3"],
        ["bench", "--backend", "carrier-pigeon"],
        ["bench", "--request-rate", "0"],
    ],
    ids=" ".join,
)
def test_usage_errors_are_one_line_and_exit_code_2(run, argv):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_failed_requests_are_exit_code_1(run):
    code, out, err = run("complete", "hello", "--grpc", "127.0.0.1:1")
    assert (code, out) == (1, "")
    assert err.startswith("error: cannot reach 127.0.0.1:1 (")
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [["--http", "http://127.0.0.1:1"], ["--grpc", "127.0.0.1:1"]])
def test_health_of_nobody(run, argv):
    code, out, _ = run("health", *argv)
    assert code == 1
    assert "127.0.0.1:1" in out


def test_ctrl_c_is_130_without_a_traceback(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tandem.terminal.complete", interrupted)
    assert run("complete", "x") == (130, "", "")


def test_help_of_a_process_is_that_of_its_settings(run):
    code, out, _ = run("up", "--help")
    assert code == 0
    assert "--prefill" in out
    assert "Decode workers." in out


def test_no_arguments_show_the_help(run):
    code, out, _ = run()
    assert code == 0
    assert "Usage: tandem" in out


def test_origins(run, monkeypatch, tmp_path):
    file = tmp_path / "tandem.toml"
    file.write_text('threads = 3\nhttp_port = 9\ndtype = "float32"\n')
    for module in (config, settings_view):
        monkeypatch.setattr(module, "CONFIG_FILE", file)
    monkeypatch.setitem(config.Settings.model_config, "toml_file", file)
    monkeypatch.setitem(settings_view.UpSettings.model_config, "toml_file", file)
    monkeypatch.setenv("TANDEM_HTTP_PORT", "10")
    monkeypatch.setenv("TANDEM_ADMIN_KEY", "secret")
    code, out, _ = run("config", "show", "up", "--dtype", "bfloat16", "--no-reflection")
    assert code == 0
    found = {words[0]: words[1:] for words in map(str.split, out.splitlines())}
    assert found["--dtype"] == ["bfloat16", "flag"]
    assert found["--reflection"] == ["False", "flag"]
    assert found["--http-port"] == ["10", "environment"]
    assert found["--threads"] == ["3", "file"]
    assert found["--decode"] == ["1", "default"]
    assert found["--admin-key"] == ["***", "environment"]
    assert found["--chat-template"] == ["unset", "default"]


def test_processes_are_entered_by_exec(run, monkeypatch):
    seen = []

    def execve(path, argv, env):
        seen.append((path, argv[1:], env["OMP_WAIT_POLICY"]))
        raise SystemExit(0)

    monkeypatch.setattr("os.execve", execve)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    run("decode", "--port", "3", "--help")
    assert seen[0][1] == ["-P", "-m", "decode_svc", "--port", "3", "--help"]
