"""What every arm of `make bench-cpu` has in common: the job, the clock, the protocol. Standard library only,
because each peer runs in an environment of its own.

The driver starts an arm with the path of a job file and writes a line for each round; the arm answers with
one line of JSON on its standard output, the first time when it is ready. It computes nothing between rounds.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an arm is told."""

    model: str
    """Directory of the Hugging Face checkpoint."""
    peer_model: str
    """Directory of the checkpoint in the peer's own format, where it has one."""
    dtype: str
    """float32 or bfloat16."""
    threads: int
    max_num_batched_tokens: int
    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(p) + n for p, n in zip(self.prompts, self.output_lens, strict=True))


@dataclass(kw_only=True)
class Round:
    """What one round cost."""

    cpu_s: float = 0.0
    """User and system time of all processes of the arm."""
    wall_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)


class Recorder:
    """Collects the tokens of a round with their times; request i is the i-th of the job."""

    def __init__(self, num_requests: int) -> None:
        self._start = time.perf_counter()
        self._last = [self._start] * num_requests
        self.round = Round(outputs=[[] for _ in range(num_requests)])

    def tokens(self, request: int, token_ids: list[int]) -> None:
        """New tokens of a request; several at once count as gaps of zero after the first."""
        now, output = time.perf_counter(), self.round.outputs[request]
        for token_id in token_ids:
            gaps = self.round.itl_s if output else self.round.ttft_s
            gaps.append(now - self._last[request])
            self._last[request] = now
            output.append(token_id)

    def finish(self, cpu_s: float) -> Round:
        """The round is over."""
        self.round.cpu_s = cpu_s
        self.round.wall_s = time.perf_counter() - self._start
        return self.round


def own_cpu_s() -> float:
    """CPU time of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def serve(prepare: Callable[[Job], Callable[[Job], Round]], packages: Sequence[str]) -> None:
    """Run an arm: `prepare` loads the model and returns what runs a round of a job.

    The versions of `packages` go into the report.
    """
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library's chatter must not mix with the answers
    run = prepare(job)
    _say(answers, {"versions": {name: metadata.version(name) for name in packages}})
    for _ in sys.stdin:
        _say(answers, asdict(run(job)))


def _say(answers: Any, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=answers, flush=True)
