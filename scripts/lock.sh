#!/usr/bin/env bash
# Write constraints.txt from what is installed now, without local version labels (+cpu) and GPU-only packages, which
# torch's own build brings.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
{
    echo "# Pinned versions of everything that the tests ran with: made by \`make lock\`."
    "$venv/bin/pip" freeze --exclude-editable | grep -v -i -E '^(nvidia|cuda|triton)' | sed -E 's/\+[a-z0-9.]+$//; s#^torch @ .*/torch-([0-9.]+).*#torch==\1#'
} > constraints.txt
