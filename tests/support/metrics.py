"""What the services export, and what rules and dashboards ask for."""

import json
from pathlib import Path

from gorgon_engine.server.metrics import EngineMetrics
from gorgon_gateway.observability.metrics import GatewayMetrics
from gorgon_trainer.metrics import TrainerMetrics

_OBSERVABILITY = Path(__file__).parents[2] / "observability"
RULES = sorted((_OBSERVABILITY / "prometheus" / "rules").glob("*.yml"))
DASHBOARDS = sorted((_OBSERVABILITY / "grafana" / "dashboards").glob("*.json"))

_SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "info": ("_info",),
    "histogram": ("_bucket", "_sum", "_count"),
}


def exported_names() -> set[str]:
    """Of every sample that engine, gateway and trainer can give."""
    engine = EngineMetrics(
        num_running=lambda: 0.0, num_waiting=lambda: 0.0, kv_cache_usage=lambda: 0.0, is_ready=lambda: 0.0
    )
    gateway = GatewayMetrics()
    gateway.limiter_redis_up(True)
    return {
        family.name + suffix
        for registry in (engine.registry, gateway.registry, TrainerMetrics().registry)
        for family in registry.collect()
        for suffix in _SUFFIXES[family.type]
    }


def dashboard_queries() -> list[tuple[str, str]]:
    """(dashboard / panel, query) of every panel."""
    return [
        (f"{path.stem} / {panel['title']}", target["expr"])
        for path in DASHBOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", ())
    ]
