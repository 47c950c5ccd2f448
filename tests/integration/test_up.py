"""`tandem up` as a process of its own, over fake children."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

FAKE_UP = Path(__file__).with_name("fake_up.py")
ROOT = FAKE_UP.parent.parent.parent


class Up:
    """A running launcher and what its children recorded."""

    def __init__(self, directory: Path, *flags: str, **env: str) -> None:
        self._events = directory / "events"
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE_UP), "--http-port=0", "--grpc-port=0", *flags],
            env=os.environ | {"FAKE_DIR": str(directory), "PYTHONPATH": str(ROOT)} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ready_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def finish(self) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=20)
        return self.process.returncode, stdout, stderr

    def events(self, kind: str) -> list[dict]:
        if not self._events.exists():
            return []
        events = [json.loads(line) for line in self._events.read_text().splitlines()]
        return [event for event in events if event["event"] == kind]

    def pids(self) -> list[int]:
        return [event["pid"] for event in self.events("start")]


@pytest.fixture
def start(tmp_path):
    running = []

    def starter(*flags, **env):
        running.append(Up(tmp_path, *flags, **env))
        return running[-1]

    yield starter
    for up in running:
        up.process.kill()
        up.process.communicate()


def wait_until(condition, seconds=10.0):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "it did not happen"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ready_line_shares_settings_and_drains_gateway_first(start):
    up = start("--prefill=1", "--decode=2", "--threads=3", "--admin-key=secret", FAKE_DRAIN_S="0.3")
    word, http, grpc = up.ready_line().split()
    assert (word, grpc) == ("ready", "grpc=127.0.0.1:5")
    assert http.startswith("http=http://127.0.0.1:")
    started = {event["name"]: event for event in up.events("start")}
    assert set(started) == {"gateway", "prefill-0", "decode-0", "decode-1"}
    worker = started["decode-1"]
    assert worker["flags"]["gateway"] == "127.0.0.1:7"
    assert Path(worker["flags"]["model"]) == ROOT / "tandem" / "demo_model"
    assert worker["env"]["OMP_NUM_THREADS"] == "3"
    assert worker["env"]["TANDEM_ADMIN_KEY"] == "secret"
    assert "admin-key" not in worker["flags"]
    up.process.send_signal(signal.SIGTERM)
    code, rest, _ = up.finish()
    assert (code, rest) == (0, "")
    assert not any(alive(pid) for pid in up.pids())
    gateway_end = next(event["at"] for event in up.events("end") if event["name"] == "gateway")
    workers_told = [event["at"] for event in up.events("sigterm") if event["name"] != "gateway"]
    assert len(workers_told) == 3
    assert min(workers_told) > gateway_end


def test_child_that_cannot_start_is_one_line_and_exit_code_2(start):
    up = start(FAKE_FAIL="decode-0")
    code, stdout, stderr = up.finish()
    assert (code, stdout) == (2, "")
    assert [line for line in stderr.splitlines() if "error" in line] == [
        "error: --model: decode-0 does not like it"
    ]
    assert not any(alive(pid) for pid in up.pids())


def test_missing_model_starts_nothing(start):
    up = start("--model=/no/such/place")
    code, _, stderr = up.finish()
    assert code == 2
    assert stderr == "error: --model /no/such/place: no such directory, and not a hub id (owner/name)\n"
    assert up.pids() == []


def test_killed_launcher_leaves_no_orphans(start):
    up = start()
    up.ready_line()
    pids = up.pids()
    assert len(pids) == 3
    up.process.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_second_signal_kills_at_once(start):
    up = start(FAKE_STUBBORN="gateway")
    up.ready_line()
    up.process.send_signal(signal.SIGINT)
    wait_until(lambda: up.events("sigterm"))
    up.process.send_signal(signal.SIGINT)
    assert up.finish()[0] == 130
    wait_until(lambda: not any(alive(pid) for pid in up.pids()))


def test_signal_during_the_start_stops_everything(start):
    up = start("--prefill=0", FAKE_DRAIN_S="0.1")
    wait_until(lambda: up.events("start"))
    up.process.send_signal(signal.SIGTERM)
    assert up.finish()[0] == 0
    assert not any(alive(pid) for pid in up.pids())


def test_dead_children_come_back_and_the_gateway_keeps_its_ports(start):
    up = start("--prefill=0")
    ready = up.ready_line()
    for event in up.events("start"):
        os.kill(event["pid"], signal.SIGKILL)
    wait_until(lambda: len(up.events("start")) == 4)
    again = [event for event in up.events("start")[2:] if event["name"] == "gateway"]
    assert f"http=http://127.0.0.1:{again[0]['flags']['http-port']} " in ready
    up.process.send_signal(signal.SIGTERM)
    code, _, stderr = up.finish()
    assert code == 0
    assert "decode-0 was killed by signal 9; starting again in 0.5 s" in stderr
