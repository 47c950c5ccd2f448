"""The peers' own Python environments, with pinned versions, and their form of the checkpoint."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

INSTALL_TIMEOUT_S = 1800
EXPORT_TIMEOUT_S = 600


@dataclass(frozen=True)
class Environment:
    """Installs in order, each a pip command line; a later one may leave dependencies out."""

    name: str
    installs: tuple[tuple[str, ...], ...]

    def python(self, root: Path) -> Path:
        """The interpreter; RuntimeError if something could not be installed."""
        place = root / self.name
        python, stamp = place / "bin" / "python", place / ".installed"
        wanted = repr(self.installs)
        if not stamp.is_file() or stamp.read_text() != wanted:
            print(f"installing {self.name} into {place}", file=sys.stderr)
            _run([sys.executable, "-m", "venv", "--clear", str(place)], INSTALL_TIMEOUT_S)
            for packages in self.installs:
                _run([str(python), "-m", "pip", "install", "--quiet", *packages], INSTALL_TIMEOUT_S)
            stamp.write_text(wanted)
        return python


TRANSFORMERS = Environment("transformers", (("torch==2.13.0", "transformers==5.23.0", "psutil==7.2.2"),))

OPENVINO = Environment("openvino", (("openvino==2026.4.1", "openvino-genai==2026.4.1.0"),))

OPENVINO_EXPORT = Environment(
    "openvino-export",
    (
        ("torch==2.13.0", "transformers==5.5.4", "openvino==2026.4.1", "nncf==3.4.0", "requests==2.34.2"),
        ("--no-deps", "optimum==2.3.0", "optimum-intel==2.2.0"),
    ),
)
"""optimum-intel's own bound on transformers is older than the version that works."""


def export_openvino(root: Path, checkpoint: Path) -> Path:
    """OpenVINO's form of a checkpoint, fp32 weights; made once."""
    target = root / "openvino-model"
    if not (target / "openvino_model.xml").is_file():
        command = [
            str(OPENVINO_EXPORT.python(root)), "-m", "optimum.commands.optimum_cli", "export", "openvino",
            "--model", str(checkpoint), "--task", "text-generation-with-past", "--weight-format", "fp32",
            "--disable-convert-tokenizer", str(target),
        ]  # fmt: skip
        _run(command, EXPORT_TIMEOUT_S)
    return target


def _run(command: list[str], timeout_s: float) -> None:
    """RuntimeError with the last line of what the command said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"{' '.join(command[:6])} …: {last}")
