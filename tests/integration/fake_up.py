"""`tandem up` over fake processes."""

import sys
from pathlib import Path

from tandem.launcher import up

FAKE = Path(__file__).with_name("fake_process.py")

sys.exit(up(sys.argv[1:], program=lambda role: [sys.executable, "-S", str(FAKE), role]))
