"""What of the launcher can be judged without processes."""

from dataclasses import replace

import pytest

from runtime.checkpoint_dir import bundled_model
from runtime.config import parse
from runtime.errors import StartupError
from runtime.settings import GatewaySettings, UpSettings, WorkerSettings
from tandem.fleet import Listening
from tandem.launcher import child_env, fleet_plan, located_model, share

WHERE = Listening(http="http://127.0.0.1:81", grpc="127.0.0.1:82", internal="127.0.0.1:83,127.0.0.1:84")


def plan(*argv):
    return fleet_plan(parse(UpSettings, list(argv), prog="tandem up"), {}, lambda role: [role])


def parsed(command):
    cls = GatewaySettings if command[0] == "gateway" else WorkerSettings
    return parse(cls, list(command[1:]), prog="test")


def test_listening_line():
    line = "listening http=http://127.0.0.1:81 grpc=127.0.0.1:82 internal=127.0.0.1:83,127.0.0.1:84"
    assert Listening.parse(line) == WHERE
    assert Listening.parse("listening http=x") is None
    assert Listening.parse("loading a=b") is None


def test_every_flag_reaches_the_processes_that_know_it():
    found = plan("--http-port=0", "--max-num-seqs=7", "--no-reflection", "--host=::1", "--decode=2")
    gateway = parsed(found.gateway(None))
    assert (gateway.http_port, gateway.reflection, gateway.host) == (0, False, "::1")
    assert list(found.workers) == ["prefill-0", "decode-0", "decode-1"]
    worker = parsed(found.workers["decode-1"](WHERE))
    assert (worker.max_num_seqs, worker.host, worker.worker_id) == (7, "::1", "decode-1")
    assert worker.gateway == ["127.0.0.1:83", "127.0.0.1:84"]
    assert found.workers["decode-1"](WHERE)[0] == "decode"


def test_every_worker_gets_its_ranks_and_their_devices():
    found = plan("--prefill-tp=2", "--decode=2", "--prefill-devices=0, 1", "--decode-devices=2,3")
    ranks = {name: parsed(command(WHERE)) for name, command in found.workers.items()}
    assert {name: (each.tensor_parallel_size, each.devices) for name, each in ranks.items()} == {
        "prefill-0": (2, "0,1"),
        "decode-0": (1, "2"),
        "decode-1": (1, "3"),
    }
    on_cpu = plan("--prefill=0", "--decode-tp=4").workers["decode-0"](WHERE)
    assert (parsed(on_cpu).tensor_parallel_size, parsed(on_cpu).devices) == (4, "")


def test_workers_on_one_gpu_share_its_memory():
    flags = ["--prefill-devices=0", "--decode-devices=0,1", "--decode=2", "--gpu-memory-utilization=0.8"]
    found = {name: parsed(command(WHERE)) for name, command in plan(*flags).workers.items()}
    assert {name: (each.devices, each.gpu_memory_utilization) for name, each in found.items()} == {
        "prefill-0": ("0", 0.4),
        "decode-0": ("0", 0.4),
        "decode-1": ("1", 0.8),
    }


def test_too_few_devices_are_refused():
    message = "--decode-devices 0,1,2: 2 decode workers with --decode-tp 2 need 4 devices, got 3"
    with pytest.raises(StartupError, match=message):
        plan("--decode=2", "--decode-tp=2", "--decode-devices=0,1,2")


@pytest.mark.parametrize(
    ("host", "inner"), [("0.0.0.0", "127.0.0.1"), ("10.1.1.1", "127.0.0.1"), ("::1", "::1")]
)
def test_only_the_public_ports_are_for_other_machines(host, inner):
    found = plan(f"--host={host}")
    gateway = parsed(found.gateway(None))
    assert (gateway.host, gateway.internal_host) == (host, inner)
    assert parsed(found.workers["decode-0"](WHERE)).host == inner
    assert (
        parsed(plan(f"--host={host}", "--internal-host=10.2.2.2").gateway(None)).internal_host == "10.2.2.2"
    )


def test_a_restarted_gateway_has_the_same_ports():
    again = parsed(plan("--http-port=0").gateway(replace(WHERE, internal="127.0.0.1:83")))
    assert (again.http_port, again.grpc_port, again.internal_port) == (81, 82, 83)


def test_share_takes_the_common_fields_only():
    settings = parse(UpSettings, ["--threads=2", "--grpc-port=9"], prog="tandem up")
    worker = share(WorkerSettings, settings, port=5)
    assert (worker.threads, worker.port) == (2, 5)
    assert share(GatewaySettings, settings).grpc_port == 9


def test_secrets_are_on_no_command_line():
    found = plan("--admin-key=hush", "--api-keys=hush,hush2", "--internal-secret=hush3")
    assert found.admin_key == found.env["TANDEM_ADMIN_KEY"] == "hush"
    assert found.env["TANDEM_API_KEYS"] == "hush,hush2"
    assert found.env["TANDEM_INTERNAL_SECRET"] == "hush3"
    commands = [found.gateway(None), *(command(WHERE) for command in found.workers.values())]
    assert not any("hush" in word or "secret" in word for command in commands for word in command)


def test_every_fleet_has_a_secret_of_its_own():
    drawn = [plan().env["TANDEM_INTERNAL_SECRET"] for _ in range(2)]
    assert min(map(len, drawn)) > 40
    assert drawn[0] != drawn[1]
    assert "TANDEM_API_KEYS" not in plan().env


def test_environment_of_children():
    env = child_env({"GOMP_SPINCOUNT": "7", "PYTHONPATH": "/mine"}, threads=2)
    assert env["GOMP_SPINCOUNT"] == "7"
    assert env["OMP_WAIT_POLICY"] == "passive"
    assert env["OMP_NUM_THREADS"] == "2"
    assert env["PYTHONPATH"].endswith(":/mine")
    assert "OMP_NUM_THREADS" not in child_env({})


def test_model_on_the_command_line_of_children(tmp_path, monkeypatch):
    assert located_model("") == str(bundled_model())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert located_model("mine") == str(tmp_path / "mine")
    with pytest.raises(StartupError, match="no such directory"):
        located_model("./missing")
