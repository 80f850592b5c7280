"""The manifests of k8s/, as kubectl renders them."""

import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = ("cpu-dev", "gpu")
TOOLS = ROOT / ".venv" / "tools" / "bin"

Manifest = dict[str, Any]

_WORKLOADS = ("Deployment", "StatefulSet", "CronJob")


def tool(name: str) -> str:
    """Where scripts/k8s_tools.sh has put it."""
    found = shutil.which(name, path=str(TOOLS))
    assert found is not None, f"{name} is missing: scripts/k8s_tools.sh installs it"
    return found


def render(folder: Path) -> str:
    """What `kubectl apply -k` would send. It may warn of nothing."""
    done = subprocess.run([tool("kubectl"), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@dataclass(frozen=True, slots=True)
class Pod:
    """The pod of a workload."""

    workload: str  # kind/name
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


class Overlay:
    """One overlay, rendered."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def text(self) -> str:
        return render(K8S / "overlays" / self.name)

    @cached_property
    def manifests(self) -> list[Manifest]:
        return list(yaml.safe_load_all(self.text))

    def of_kind(self, *kinds: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] in kinds]

    def one(self, kind: str, name: str) -> Manifest:
        (found,) = (m for m in self.of_kind(kind) if m["metadata"]["name"] == name)
        return found

    @cached_property
    def pods(self) -> list[Pod]:
        pods = []
        for manifest in self.of_kind(*_WORKLOADS):
            spec = manifest["spec"]
            template = spec["jobTemplate"]["spec"]["template"] if manifest["kind"] == "CronJob" else spec["template"]
            name = f"{manifest['kind']}/{manifest['metadata']['name']}"
            pods.append(Pod(name, template["metadata"]["labels"], template["spec"]))
        return pods

    def pod(self, workload: str) -> Pod:
        (found,) = (pod for pod in self.pods if pod.workload == workload)
        return found

    def settings(self, workload: str) -> dict[str, str]:
        """The environment of its one container, without what the node fills in."""
        (container,) = self.pod(workload).spec["containers"]
        environment: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            environment |= self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        return environment | {item["name"]: item["value"] for item in container.get("env", ()) if "value" in item}
