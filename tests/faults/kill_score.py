"""The kill score: 8 clients, 100 requests each, one spare of everything, one kill at half-time.

`make kill-score` plays it four times: with no kill, and with kill -9 of a prefill worker, of a decode worker
and of one of two gateways. Each request's tokens are compared with those of an undisturbed run. There is no
supervisor: what is killed stays dead.
"""

import argparse
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.harness import eventually
from tests.faults.faults import kill
from tests.faults.fleet import Fleet

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "kill_score.md"
NUM_CLIENTS = 8
NUM_PROMPTS = 16
LAST_TOKEN_ID = 4095
TARGETS = ("nobody", "prefill", "decode", "gateway")


@dataclass
class Score:
    """One run."""

    target: str
    answers: Counter[str] = field(default_factory=Counter)
    """`exact`, `failed`, or `mismatch`, and `lost`: under way at the gateway that was killed."""
    under_way: int = 0
    """Requests at the victim when it was killed."""
    longest_s: float = 0.0
    quiet_s: float = 0.0
    """From the last answer until nothing was held."""
    released_s: float | None = None
    """From the gateway's death until workers held nothing for it."""
    errors: list[str] = field(default_factory=list)

    @property
    def is_perfect(self) -> bool:
        """Whether nothing failed but what went down with its own gateway."""
        wrong = self.answers["failed"] + self.answers["mismatch"]
        return not wrong and (self.target == "gateway" or not self.answers["lost"])

    def row(self) -> str:
        """One line of the table."""
        a = self.answers
        released = "" if self.released_s is None else f"{self.released_s:.2f}"
        return (
            f"| {self.target} | {a.total()} | {self.under_way} | {a['failed']} | {a['mismatch']} "
            f"| {a['lost']} | {self.longest_s:.2f} | {released} | {self.quiet_s:.2f} |"
        )


class Clients:
    """Threads that each send their requests one after the other; half of them to each gateway."""

    def __init__(self, fleet: Fleet, score: Score, per_client: int, want: list[list[int]]) -> None:
        self._fleet, self._score, self._want = fleet, score, want
        self._lock = threading.Lock()
        self.num_done = 0
        self.victim: str | None = None
        self._per_client = per_client
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(NUM_CLIENTS)]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Until every request has ended."""
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        gateways = list(self._fleet.urls)
        gateway = gateways[number % len(gateways)]
        with httpx.Client(timeout=120) as client:
            for count in range(self._per_client):
                which = rng.randrange(NUM_PROMPTS)
                salt = f"{number}/{count}" if rng.random() < 0.5 else ""
                start_s = time.monotonic()
                ending, error = self._ask(client, gateway, which, salt)
                if ending == "lost":
                    gateway = next(each for each in gateways if each != gateway)
                self._note(ending, error, time.monotonic() - start_s)

    def _ask(self, client: httpx.Client, gateway: str, which: int, salt: str) -> tuple[str, str]:
        try:
            tokens = ask(client, self._fleet.urls[gateway], which, salt)
        except (httpx.HTTPError, AssertionError) as error:
            return "lost" if gateway == self.victim else "failed", f"{type(error).__name__} {error}"
        return ("exact", "") if tokens == self._want[which] else ("mismatch", f"prompt {which}")

    def _note(self, ending: str, error: str, seconds: float) -> None:
        with self._lock:
            self.num_done += 1
            self._score.answers[ending] += 1
            self._score.errors += [error] if error else []
            self._score.longest_s = max(self._score.longest_s, seconds)


def ask(client: httpx.Client, url: str, which: int, salt: str = "") -> list[int]:
    """One seeded completion; AssertionError unless it is a 200."""
    rng = random.Random(which)
    length = rng.choice((20, 100, 400, 900))
    body: dict[str, Any] = {
        "prompt": [rng.randrange(3, LAST_TOKEN_ID) for _ in range(length)],
        "max_tokens": rng.choice((16, 40, 80)),
        "temperature": 0.9,
        "seed": which,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    body |= {"cache_salt": salt} if salt else {}
    answer = client.post(f"{url}/v1/completions", json=body)
    is_ok = answer.status_code == 200
    assert is_ok, f"{answer.status_code} {answer.text}"
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def play(target: str, per_client: int) -> Score:
    """One run with one kill at half-time."""
    score = Score(target)
    with Fleet(gateways=2) as fleet:
        with httpx.Client(timeout=60) as client:
            want = [ask(client, fleet.urls["gateway-0"], which) for which in range(NUM_PROMPTS)]
        clients = Clients(fleet, score, per_client, want)
        clients.start()
        eventually(lambda: clients.num_done >= NUM_CLIENTS * per_client // 2, 600, "half-time")
        if target != "nobody":
            _strike(fleet, clients, score)
        clients.join()
        survivor = "gateway-1" if target == "gateway" else "gateway-0"
        score.quiet_s = eventually(lambda: not fleet.held(survivor), 5, "quiet")
    return score


def _strike(fleet: Fleet, clients: Clients, score: Score) -> None:
    if score.target == "gateway":
        clients.victim = "gateway-0"
        score.under_way = fleet.state("gateway-0")["requests"]
        gateway_id = fleet.gateway_id("gateway-0")
        kill(fleet.members["gateway-0"].pid)
        start_s = time.monotonic()
        eventually(lambda: not fleet.attached(gateway_id, "gateway-1"), 10, "release")
        score.released_s = time.monotonic() - start_s
    else:
        victim = fleet.busy(score.target)
        score.under_way = fleet.worker(victim)["attempts"]
        kill(fleet.members[victim].pid)


HEAD = """# Kill score

8 clients send {per_client} requests each, one after the other; two gateways, two prefill and two decode
workers, no supervisor; `kill -9` at half-time. Tokens are compared with those of an undisturbed run.

| killed | requests | under way there | failed | other tokens | lost with their gateway | longest request, s \
| workers free of it after, s | quiet after, s |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> int:
    """The exit code: 0 if every run was perfect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-client", type=int, default=100)
    parser.add_argument("--only", choices=TARGETS)
    arguments = parser.parse_args()
    scores = []
    for target in [arguments.only] if arguments.only else TARGETS:
        scores.append(play(target, arguments.per_client))
        print(scores[-1].row(), *scores[-1].errors[:5], sep="\n", flush=True)
    if not arguments.only:
        rows = [score.row() for score in scores]
        RESULT.write_text(HEAD.format(per_client=arguments.per_client) + "\n".join(rows) + "\n")
    return 0 if all(score.is_perfect for score in scores) else 1


if __name__ == "__main__":
    raise SystemExit(main())
