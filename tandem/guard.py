"""Runs a program so that it ends with its parent: `python -I -S guard.py PARENT_PID PROGRAM ARGUMENT…`.

The kernel sends SIGTERM to the program when the process that started it dies, by kill -9 too. The setting
survives exec, so it holds from before the program's first instruction. Standard library only: this
runs as a bare script, before every child of `tandem up`.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Become `argv[2:]`, bound to the life of process `argv[1]`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(argv[1]):  # it died before the kernel knew that we care
        sys.exit(1)
    os.execv(argv[2], argv[2:])


if __name__ == "__main__":
    main(sys.argv)
