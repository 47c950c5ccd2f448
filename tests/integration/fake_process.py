"""Stands in for a gateway or a worker of ours: `fake_process.py ROLE --flag=value…`.

It obeys variables: FAKE_DIR is where it writes one file per event; FAKE_FAIL names a role or worker id that
cannot start; FAKE_CRASH one that dies as soon as the file `crash` is there; FAKE_STUBBORN one that ignores
SIGTERM; FAKE_DRAIN_S is how long the gateway drains.
Every worker that started within FAKE_DIR counts as ready at the gateway, but for the pid in the file `stuck`.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DIR = Path(os.environ["FAKE_DIR"])
ROLE = sys.argv[1]
FLAGS = dict(flag.removeprefix("--").partition("=")[::2] for flag in sys.argv[2:])
NAME = FLAGS.get("worker-id", ROLE)


def record(event):
    """One event, in order, for the test to read."""
    line = {"at": time.monotonic(), "name": NAME, "event": event, "pid": os.getpid(), "flags": FLAGS}
    line["env"] = {
        key: value for key, value in os.environ.items() if key.startswith(("OMP_", "GOMP_", "TANDEM_"))
    }
    with (DIR / "events").open("a") as file:
        file.write(json.dumps(line) + "\n")


def worker(path):
    """As the gateway lists it."""
    pid, stuck = int(path.read_text()), DIR / "stuck"
    is_down = stuck.exists() and int(stuck.read_text()) == pid
    return {"id": path.name, "pid": pid, "state": "down" if is_down else "ready", "attached": not is_down}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"workers": [worker(path) for path in (DIR / "workers").iterdir()]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def main():
    if os.environ.get("FAKE_FAIL") in (ROLE, NAME):
        print("a warning on the way", file=sys.stderr)
        print(f"error: --model: {NAME} does not like it", file=sys.stderr)
        sys.exit(2)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: (record("sigterm"), stop.set()))
    record("start")
    (DIR / "workers").mkdir(exist_ok=True)
    if ROLE == "gateway":
        server = ThreadingHTTPServer(("127.0.0.1", int(FLAGS["http-port"])), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        http, internal = server.server_port, int(FLAGS["internal-port"]) or 7
        print(
            f"listening http=http://127.0.0.1:{http} grpc=127.0.0.1:5 internal=127.0.0.1:{internal}",
            flush=True,
        )
    else:
        draft = DIR / f"draft-{NAME}"
        draft.write_text(str(os.getpid()))
        draft.rename(DIR / "workers" / NAME)
        print("a word on stdout", flush=True)
    while os.environ.get("FAKE_CRASH") == NAME and not stop.wait(0.01):
        if (DIR / "crash").exists():
            os.kill(os.getpid(), signal.SIGKILL)
    while not stop.wait(0.05) or os.environ.get("FAKE_STUBBORN") in (ROLE, NAME):
        pass
    if ROLE == "gateway":
        time.sleep(float(os.environ.get("FAKE_DRAIN_S", "0")))
    record("end")


main()
