#!/bin/sh
# Creates .venv with a Python of at least 3.11: `tools/make_venv.sh DIRECTORY`. What is missing on this
# machine is named in one line, with the command that installs it.
set -eu

venv=$1
[ -x "$venv/bin/python" ] && [ -x "$venv/bin/pip" ] && exit 0

missing() {
    echo "error: $1; on Debian and Ubuntu: sudo apt-get install $2" >&2
    exit 2
}

recent() {
    command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    recent "$python" && break
    python=
done
if [ -z "$python" ]; then
    found=$("${PYTHON:-python3}" --version 2>/dev/null || echo none)
    missing "Python 3.11 or newer is needed, found: $found" "python3.11 python3.11-venv"
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    missing "Python $version has no venv module" "python$version-venv"
"$python" -m venv "$venv"
