#!/usr/bin/env bash
# Make the environment: Debian packages that are missing (as root; else says which), a virtual environment, pinned
# packages. Safe to run again; honours pip's own configuration (indexes, mirrors, proxies, certificates).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}

need_packages() { # need_packages PACKAGE... : install them, or name them and give up
    if [ "$(id -u)" -eq 0 ] && command -v apt-get > /dev/null; then
        echo "setup: installing $*"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
    else
        echo "setup: missing: $*. Install them first (Debian: sudo apt-get install $*), then run make again." >&2
        exit 1
    fi
}

find_python() {
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
        [ -n "$candidate" ] && command -v "$candidate" > /dev/null || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
}

missing=()
python=$(find_python)
if [ -z "$python" ]; then
    missing+=(python3 python3-venv)
elif ! "$python" -c 'import ensurepip, venv' 2> /dev/null; then
    missing+=(python3-venv)
fi
command -v "${CXX:-g++}" > /dev/null || command -v clang++ > /dev/null || missing+=(g++)
[ ${#missing[@]} -eq 0 ] || need_packages "${missing[@]}"
python=${python:-$(find_python)}
if [ -z "$python" ]; then
    echo "setup: no Python 3.11 or newer: install one, or name it with PYTHON=/path/to/python3 make ..." >&2
    exit 1
fi

echo "setup: making $venv with $("$python" --version)"
"$python" -m venv "$venv"
# torch first and by itself: pinned here, it is not replaced by whatever build another package would pull in.
echo "setup: installing torch"
"$venv/bin/pip" install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
echo "setup: installing the other packages, about a minute"
"$venv/bin/pip" install --quiet -c constraints.txt -e '.[engine,gateway,trainer,dev]'
# A CUDA build of torch has brought the Triton that it needs; beside a CPU build any will do: its interpreter runs the GPU
# kernels in the tests.
"$venv/bin/python" -c 'import triton' 2> /dev/null || "$venv/bin/pip" install --quiet --no-deps 'triton==3.6.0'
