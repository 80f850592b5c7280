"""Write k8s/components/monitoring/rules.yaml, the Prometheus Operator's form of observability/prometheus/rules."""

import os
from pathlib import Path
from typing import Any

import yaml

_ROOT = Path(__file__).parents[1]
TARGET = _ROOT / "k8s" / "components" / "monitoring" / "rules.yaml"
_HEADER = "# Written by scripts/k8s_rules.py out of observability/prometheus/rules: change those, not this.\n"


def rendered() -> str:
    """The file as it ought to be."""
    files = sorted((_ROOT / "observability" / "prometheus" / "rules").glob("*.yml"))
    groups: list[dict[str, Any]] = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "gorgon", "namespace": "gorgon"},
        "spec": {"groups": groups},
    }
    return _HEADER + yaml.safe_dump(resource, sort_keys=False, width=200)


def main() -> None:
    temporary = TARGET.with_name(f".{TARGET.name}")
    temporary.write_text(rendered())
    os.replace(temporary, TARGET)


if __name__ == "__main__":
    main()
