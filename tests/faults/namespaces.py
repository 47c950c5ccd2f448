"""Network namespaces joined to this one by a virtual cable, with a packet filter inside: real lost packets.

Needs root, `ip` and `iptables`; `why_not` says what is missing.
"""

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

NET = "10.213.{number}.{host}"
_numbers = itertools.count(os.getpid() % 200)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str | None:
    """Why there are no namespaces here; None if there are."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "iptables") if shutil.which(name) is None]
    if missing:
        return f"network namespaces need {', '.join(missing)}"
    try:
        with namespace() as made, made.dropping(1.0):
            return None
    except RuntimeError as error:
        return str(error)


@dataclass(frozen=True)
class Namespace:
    """One namespace; `here` and `there` are the two ends of the cable."""

    name: str
    here: str
    there: str

    def command(self, *words: str) -> list[str]:
        """A command that runs inside."""
        return ["ip", "netns", "exec", self.name, *words]

    @contextlib.contextmanager
    def dropping(self, share: float) -> Iterator[None]:
        """So many of the packets that come in are dropped, 0 to 1, inside the block."""
        how = ["-m", "statistic", "--mode", "random", "--probability", str(share)] if share < 1 else []
        rule = ["INPUT", "-s", self.here, *how, "-j", "DROP"]
        _run(*self.command("iptables", "-w", "-I", *rule))
        try:
            yield
        finally:
            _run(*self.command("iptables", "-w", "-D", *rule))

    def num_dropped(self) -> int:
        """Packets that the first rule has dropped."""
        rows = _run(*self.command("iptables", "-w", "-L", "INPUT", "-v", "-x", "-n")).splitlines()
        rules = [row.split() for row in rows if " DROP " in row]
        return int(rules[0][0]) if rules else 0


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """A new namespace, which is gone at the end of the block with its cable."""
    number = next(_numbers) % 250
    made = Namespace(f"tandem-{os.getpid()}-{number}", *(NET.format(number=number, host=h) for h in (1, 2)))
    near, far = f"tn{number}a", f"tn{number}b"
    _run("ip", "netns", "add", made.name)
    try:
        _run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", made.name)
        _run("ip", "addr", "add", f"{made.here}/24", "dev", near)
        _run("ip", "link", "set", near, "up")
        _run(*made.command("ip", "addr", "add", f"{made.there}/24", "dev", far))
        _run(*made.command("ip", "link", "set", far, "up"))
        _run(*made.command("ip", "link", "set", "lo", "up"))
        yield made
    finally:
        _run("ip", "netns", "del", made.name)
        subprocess.run(["ip", "link", "del", near], capture_output=True)
