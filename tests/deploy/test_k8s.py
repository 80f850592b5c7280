"""k8s/: rendered by kubectl, checked against Kubernetes' schemas, a policy lint, and what Gorgon itself needs."""

import ipaddress
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from gorgon_cli.main import cli as gorgon
from gorgon_cli.train import distill
from gorgon_engine.server.settings import EngineSettings
from gorgon_gateway.settings import GatewaySettings
from support.manifests import K8S, OVERLAYS, ROOT, Manifest, Overlay, Pod, tool
from support.metrics import DASHBOARDS, RULES, exported_names

KUBERNETES = ("1.30", "1.35")
CUSTOM = (
    "ServiceMonitor",
    "PodMonitor",
    "PrometheusRule",
    "ScaledObject",
)  # of operators, whose schemas are not Kubernetes' own
SECRETS = {"engine-secret": "engine_secret", "redis-password": "redis_password", "api-keys": "api_keys"}
CLUSTER_SCOPED = ("Namespace",)


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> Overlay:
    return Overlay(request.param)


@pytest.fixture(scope="module")
def gpu() -> Overlay:
    return Overlay("gpu")


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_are_what_kubernetes_knows(overlay: Overlay, version: str) -> None:
    checked = 0
    for manifest in overlay.manifests:
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)
            checked += 1
    assert checked > 20


def test_the_schemas_refuse_what_is_misspelt(overlay: Overlay) -> None:
    deployment = overlay.one("Deployment", "engine")
    deployment = {**deployment, "spec": {**deployment["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(deployment, KUBERNETES[-1], strict=True)


def test_the_policy_lint_has_nothing_to_say(overlay: Overlay, tmp_path: Path) -> None:
    (tmp_path / "rendered.yaml").write_text(overlay.text)
    done = subprocess.run(
        [tool("checkov"), "--config-file", str(K8S / "checkov.yaml"), "--directory", str(tmp_path), "--output", "json"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LOG_LEVEL": "ERROR"},
    )
    report = json.loads(done.stdout)
    failed = [f"{check['check_id']} {check['resource']}" for check in report["results"]["failed_checks"]]
    assert failed == []
    assert report["summary"]["passed"] > 100
    assert done.returncode == 0


def test_everything_is_in_the_namespace_that_is_made(overlay: Overlay) -> None:
    namespace = overlay.one("Namespace", "gorgon")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    others = [m for m in overlay.manifests if m["kind"] not in CLUSTER_SCOPED]
    assert [m["metadata"]["name"] for m in others if m["metadata"].get("namespace") != "gorgon"] == []


def test_pods_are_restricted(overlay: Overlay) -> None:
    for pod in overlay.pods:
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == 10001, "the user of the Dockerfiles"
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.spec["automountServiceAccountToken"] is False
        assert pod.spec["enableServiceLinks"] is False, (
            "their variables end a service as settings that it does not know"
        )
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys()
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()


def test_mounts_have_volumes_and_claims_and_secrets_exist(overlay: Overlay) -> None:
    claims = {m["metadata"]["name"] for m in overlay.of_kind("PersistentVolumeClaim")}
    maps = {m["metadata"]["name"] for m in overlay.of_kind("ConfigMap")}
    for pod in overlay.pods:
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        templates = {
            t["metadata"]["name"] for m in overlay.of_kind("StatefulSet") for t in m["spec"]["volumeClaimTemplates"]
        }
        mounted = {mount["name"] for container in pod.containers for mount in container["volumeMounts"]}
        assert mounted <= volumes.keys() | templates
        assert volumes.keys() <= mounted, f"{pod.workload} mounts not all of its volumes"
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            if "configMap" in volume:
                assert volume["configMap"]["name"] in maps
            if "secret" in volume:
                assert volume["secret"]["secretName"] in SECRETS
                assert volume["secret"]["defaultMode"] == 0o440


def test_only_the_trainer_writes_heads_and_nobody_writes_models(gpu: Overlay) -> None:
    for pod in gpu.pods:
        for container in pod.containers:
            for mount in container["volumeMounts"]:
                if mount["name"] == "models" or (mount["name"] == "heads" and "trainer" not in pod.workload):
                    assert mount["readOnly"] is True, (pod.workload, mount)


def test_secrets_are_documented_with_the_keys_that_are_read(overlay: Overlay) -> None:
    readme = (K8S / "README.md").read_text()
    for name, key in SECRETS.items():
        assert f"secret generic {name} --from-file={key}=" in readme.replace("\\\n    ", "")
    assert overlay.of_kind("Secret") == []


@pytest.mark.parametrize(
    ("workload", "settings"), [("Deployment/engine", EngineSettings), ("Deployment/gateway", GatewaySettings)]
)
def test_the_services_accept_their_environment(
    overlay: Overlay,
    workload: str,
    settings: type[EngineSettings] | type[GatewaySettings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in overlay.settings(workload).items():
        monkeypatch.setenv(name, value.replace("$(POD_IP)", "10.1.2.3"))
    read = settings.from_environment()
    (container,) = overlay.pod(workload).spec["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["http"] == read.port
    assert not read.is_loopback
    if isinstance(read, GatewaySettings):
        assert ports["metrics"] == read.metrics_port
        assert not read.is_open
        assert read.static_engines == (), "Redis alone names the engines"
    else:
        assert read.url(0) == "http://10.1.2.3:8101"
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    files = [value for name, value in overlay.settings(workload).items() if name.endswith("_FILE")]
    assert len(files) >= 2
    for file in files:
        assert str(Path(file).parent) in mounts
        assert Path(file).name in SECRETS.values()


@pytest.mark.parametrize(("workload", "rest"), [("Deployment/engine", 7.0), ("Deployment/gateway", 5.0)])
def test_a_pod_has_the_time_to_drain(overlay: Overlay, workload: str, rest: float) -> None:
    """rest: seconds that the service takes behind its drain."""
    pod = overlay.pod(workload)
    (container,) = pod.spec["containers"]
    name, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert name == "sleep"
    (drain,) = (value for key, value in overlay.settings(workload).items() if key.endswith("_DRAIN_SECONDS"))
    assert pod.spec["terminationGracePeriodSeconds"] >= float(seconds) + float(drain) + rest + 5


def test_probes_name_ports_of_their_container(overlay: Overlay) -> None:
    for pod in overlay.pods:
        if pod.workload.startswith("CronJob"):
            continue
        (container,) = pod.spec["containers"]
        ports = {port["name"] for port in container["ports"]}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[kind]
            assert "exec" in probe or probe["httpGet"]["port"] in ports
            if "httpGet" in probe and kind == "livenessProbe":
                assert probe["httpGet"]["path"].endswith("/live"), "loading or draining is no reason to be killed"


def test_an_engine_is_replaced_without_a_spare_gpu(gpu: Overlay) -> None:
    assert gpu.one("Deployment", "engine")["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    (container,) = gpu.pod("Deployment/engine").spec["containers"]
    assert container["image"].endswith("-cuda")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["resources"]["requests"]["nvidia.com/gpu"] == "1"


def test_what_an_autoscaler_scales_has_no_replicas_of_its_own(overlay: Overlay) -> None:
    scaled = {m["spec"]["scaleTargetRef"]["name"] for m in overlay.of_kind("HorizontalPodAutoscaler", "ScaledObject")}
    assert scaled >= {"gateway"}
    for name in scaled:
        assert "replicas" not in overlay.one("Deployment", name)["spec"], "each `apply` would set them back"


def test_services_and_budgets_choose_pods_that_exist(overlay: Overlay) -> None:
    def chosen(selector: dict[str, str]) -> list[str]:
        return [pod.workload for pod in overlay.pods if selector.items() <= pod.labels.items()]

    for service in overlay.of_kind("Service"):
        (workload,) = chosen(service["spec"]["selector"])
        (container,) = overlay.pod(workload).spec["containers"]
        ports = {port["name"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for budget in overlay.of_kind("PodDisruptionBudget"):
        assert len(chosen(budget["spec"]["selector"]["matchLabels"])) == 1
        assert budget["spec"]["maxUnavailable"] == 1, "minAvailable 1 would hold up a node for ever with one replica"


def test_scrapes_find_services_and_their_jobs_are_those_of_the_rules(gpu: Overlay) -> None:
    for monitor in gpu.of_kind("ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        (service,) = (s for s in gpu.of_kind("Service") if wanted.items() <= s["metadata"]["labels"].items())
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] in ("gateway", "engine")
    engine = gpu.one("ServiceMonitor", "engine")["spec"]["endpoints"][0]
    credentials = engine["authorization"]["credentials"]
    assert SECRETS[credentials["name"]] == credentials["key"], "the engine's /metrics wants its secret"


def told_ports(container: dict[str, Any]) -> set[int]:
    """Where a container's trainers tell Prometheus how it goes: by its options, else by its environment."""
    given = re.findall(r"--metrics-port=(\S+)", " ".join(container["command"])) or [
        item["value"] for item in container.get("env", ()) if item["name"] == "GORGON_TRAINER_METRICS_PORT"
    ]
    loop = [str(number) for number in range(4)] if "for i in 0 1 2 3;" in container["command"][-1] else [""]
    return {int(port.replace("$i", number)) for port in given for number in loop}


def test_stages_of_the_trainer_tell_prometheus_at_ports_that_they_declare(overlay: Overlay) -> None:
    variables = {option.envvar for option in distill.params if isinstance(option, click.Option) and option.envvar}
    told: dict[str, int] = {}
    for container in overlay.pod("CronJob/trainer").containers:
        declared = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
        assert told_ports(container) == set(declared.values())
        assert not declared.keys() & told.keys(), "names are a pod's"
        told |= declared
        environment = {item["name"]: item["value"] for item in container.get("env", ())}
        assert environment.keys() <= variables
        assert not declared or environment["GORGON_TRAINER_METRICS_HOST"] == "0.0.0.0"
    assert len(told) == (5 if overlay.name == "gpu" else 1)


def test_prometheus_finds_the_trainer_and_is_let_in(gpu: Overlay) -> None:
    pod, monitor = gpu.pod("CronJob/trainer"), gpu.one("PodMonitor", "trainer")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= pod.labels.items()
    assert pod.labels[monitor["jobLabel"]] == "trainer"
    ports = {port["name"]: port["containerPort"] for one in pod.containers for port in one.get("ports", ())}
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} == ports.keys()
    policy = gpu.one("NetworkPolicy", "metrics")["spec"]
    assert selects(policy["podSelector"], pod.labels)
    (rule,) = policy["ingress"]
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    for port in ports.values():
        assert any(one["port"] <= port <= one.get("endPort", one["port"]) for one in rule["ports"]), port


def allowed(overlay: Overlay, sender: dict[str, str], receiver: dict[str, str], port: int) -> bool:
    """Whether the policies let one pod speak to another, as a network plugin decides it."""
    policies = [m["spec"] for m in overlay.of_kind("NetworkPolicy")]

    def direction(kind: str, own: dict[str, str], other: dict[str, str], rules: str, peers: str) -> bool:
        applying = [p for p in policies if kind in p["policyTypes"] and selects(p["podSelector"], own)]
        return not applying or any(
            port in {p["port"] for p in rule["ports"]}
            and any("podSelector" in peer and selects(peer["podSelector"], other) for peer in rule[peers])
            for policy in applying
            for rule in policy.get(rules, ())
        )

    return direction("Egress", sender, receiver, "egress", "to") and direction(
        "Ingress", receiver, sender, "ingress", "from"
    )


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    expressions = selector.get("matchExpressions", ())
    assert all(expression["operator"] == "In" for expression in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


def test_pods_reach_what_they_need_and_nothing_else(overlay: Overlay) -> None:
    pods = {pod.labels["app.kubernetes.io/component"]: pod.labels for pod in overlay.pods}
    assert pods.keys() == {"gateway", "engine", "redis", "trainer"}
    denial = overlay.one("NetworkPolicy", "nothing")["spec"]
    assert denial == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ports = {"gateway": 8100, "engine": 8101, "redis": 6379, "trainer": 29500}
    ways = {
        (sender, receiver)
        for sender in pods
        for receiver in pods
        if sender != receiver and allowed(overlay, pods[sender], pods[receiver], ports[receiver])
    }
    assert ways == {("gateway", "engine"), ("gateway", "redis"), ("engine", "redis")}


def test_the_ingress_waits_longer_than_the_gateway(gpu: Overlay, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in gpu.settings("Deployment/gateway").items():
        monkeypatch.setenv(name, value)
    settings = GatewaySettings.from_environment()
    annotations = gpu.one("Ingress", "gateway")["metadata"]["annotations"]
    longest = max(settings.request_seconds, settings.idle_seconds)
    waits = {name: value for name, value in annotations.items() if "timeout" in name}
    assert len(waits) == 4
    assert all(float(value.removesuffix("s")) > longest for value in waits.values())
    assert int(annotations["nginx.ingress.kubernetes.io/proxy-body-size"].removesuffix("m")) << 20 == (
        settings.max_body_bytes
    )


def commands(pod: Pod) -> Iterator[list[str]]:
    """The arguments of every `gorgon` that a pod starts."""
    for container in pod.containers:
        command = container["command"]
        if command[0] == "sh":
            (script,) = re.findall(r"gorgon ([^&]*)&", command[-1])
            command = ["gorgon", *(word.replace("$i", "0") for word in script.split())]
        elif command[0] == "torchrun":
            at = command.index("-m")
            assert command[at + 1] == "gorgon_cli"
            command = ["gorgon", *command[at + 2 :]]
        assert command[0] == "gorgon"
        yield command[1:]


def parse(command: click.Command, arguments: list[str], parent: click.Context | None = None) -> list[str]:
    """The names of the commands that take them. Raises `click.UsageError` as the program would."""
    context = command.make_context(command.name, list(arguments), parent=parent)
    rest = [*context._protected_args, *context.args]
    if not isinstance(command, click.Group) or not rest:
        return [str(command.name)]
    _, inner, remaining = command.resolve_command(context, rest)
    assert inner is not None
    return [str(command.name), *parse(inner, remaining, context)]


def test_the_trainer_is_started_as_the_program_understands_it(overlay: Overlay) -> None:
    stages = [parse(gorgon, command)[1:] for command in commands(overlay.pod("CronJob/trainer"))]
    if overlay.name == "gpu":
        assert stages == [["train", "data"], ["train", "distill"], ["train", "heads"], ["heads", "publish"]]
    else:
        assert stages == [["train"], ["heads", "publish"]]


def test_the_trainer_runs_a_process_a_gpu(gpu: Overlay) -> None:
    stages = {container["name"]: container for container in gpu.pod("CronJob/trainer").containers}
    assert stages["heads"]["command"][:3] == ["torchrun", "--standalone", "--nproc-per-node=4"]
    assert "for i in 0 1 2 3; do" in stages["distill"]["command"][-1]
    for name in ("heads", "distill"):
        assert stages[name]["resources"]["limits"]["nvidia.com/gpu"] == "4"


def triggers(overlay: Overlay) -> dict[str, Manifest]:
    return {trigger["name"]: trigger for trigger in overlay.one("ScaledObject", "engine")["spec"]["triggers"]}


def test_autoscaling_asks_for_metrics_that_exist(gpu: Overlay) -> None:
    names = {name for one in triggers(gpu).values() for name in re.findall(r"gorgon\w*:\w+", one["metadata"]["query"])}
    assert names == {"gorgon:num_requests_waiting", "gorgon:num_requests_running", "gorgon:kv_cache_usage_perc"}
    assert names <= exported_names()


@pytest.mark.parametrize(
    ("trigger", "waiting", "running", "cache", "replicas"),
    [
        ("requests", 0, 5, 0.1, 1),  # 5 of 8 slots of one engine
        ("requests", 20, 8, 0.9, 5),  # a queue
        ("requests", 0, 16, 0.9, 3),  # two engines, both full, nothing waits
        ("kv-cache", 0, 3, 0.5, 1),
        ("kv-cache", 0, 3, 1.7, 3),  # two engines at 85 %: long sequences
    ],
)
def test_autoscaling_by_prometheus_itself(
    gpu: Overlay, tmp_path: Path, trigger: str, waiting: int, running: int, cache: float, replicas: int
) -> None:
    """KEDA's AverageValue: as many replicas as bring the sum down to the threshold each, rounded up."""
    metadata = triggers(gpu)[trigger]["metadata"]
    rule = {"record": "replicas", "expr": f"ceil(({metadata['query']}) / {metadata['threshold']})"}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "scaling", "rules": [rule]}]}))
    labels = 'namespace="gorgon", job="engine"'
    values = {
        f'gorgon:num_requests_waiting{{{labels}, pod="a"}}': waiting,
        f'gorgon:num_requests_running{{{labels}, pod="a"}}': running / 2,
        f'gorgon:num_requests_running{{{labels}, pod="b"}}': running / 2,
        f'gorgon:kv_cache_usage_perc{{{labels}, pod="a"}}': cache / 2,
        f'gorgon:kv_cache_usage_perc{{{labels}, pod="b"}}': cache / 2,
        'gorgon:num_requests_waiting{namespace="other", job="engine", pod="c"}': 99,
    }
    case = {
        "interval": "1m",
        "input_series": [{"series": series, "values": f"{value}x3"} for series, value in values.items()],
        "promql_expr_test": [
            {"expr": "replicas", "eval_time": "2m", "exp_samples": [{"labels": "replicas", "value": replicas}]}
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": [case]}))
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_and_dashboards_are_those_of_observability(gpu: Overlay) -> None:
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    assert gpu.one("PrometheusRule", "gorgon")["spec"]["groups"] == groups, "run scripts/k8s_rules.py"
    dashboards = gpu.one("ConfigMap", "dashboards")["data"]
    assert {name: json.loads(text) for name, text in dashboards.items()} == {
        path.name: json.loads(path.read_text()) for path in DASHBOARDS
    }


def test_images_are_those_of_the_dockerfiles(overlay: Overlay) -> None:
    version = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    known = {service["image"] for service in version.values()}
    for pod in overlay.pods:
        for container in pod.containers:
            image = container["image"]
            assert image in known or image.removesuffix("-cuda") in known
            assert not image.endswith(":latest")


def test_nothing_names_an_address(overlay: Overlay) -> None:
    for found in re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", overlay.text):
        assert ipaddress.ip_address(found).is_unspecified, found
