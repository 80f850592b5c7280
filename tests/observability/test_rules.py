"""Rules, alerts and dashboards: sound, tested, and about metrics that exist."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.metrics import DASHBOARDS, RULES, dashboard_queries, exported_names

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "observability" / "prometheus"
NAME = re.compile(r"\b(?:instance:|job:)?gorgon(?:_gateway)?[:_][a-z0-9_]+(?::[a-z0-9_]+)?")


def promtool(*arguments: object) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", *RULES)


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    """With a file where docker-compose.yml mounts the engines' secret: promtool looks whether it is there."""
    configuration = (PROMETHEUS / "prometheus.yml").read_text()
    secret = tmp_path / "engine_secret"
    secret.write_text("secret")
    (tmp_path / "rules").symlink_to(PROMETHEUS / "rules")
    placed = tmp_path / "prometheus.yml"
    placed.write_text(configuration.replace("/run/secrets/engine_secret", str(secret)))
    promtool("check", "config", placed)


def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", PROMETHEUS / "tests" / "alerts.yml")


def test_every_alert_has_a_test_that_it_fires() -> None:
    rules = yaml.safe_load((PROMETHEUS / "rules" / "alerts.yml").read_text())
    tests = yaml.safe_load((PROMETHEUS / "tests" / "alerts.yml").read_text())
    fired = {
        check["alertname"] for test in tests["tests"] for check in test["alert_rule_test"] if check.get("exp_alerts")
    }
    assert fired == {rule["alert"] for group in rules["groups"] for rule in group["rules"]}


def test_dashboards_are_what_their_script_says() -> None:
    script = ROOT / "scripts" / "dashboards.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_lie_beside_each_other(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    panels: list[dict[str, Any]] = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken, panel["title"]
        assert all(0 <= x < 24 for x, _ in cells), panel["title"]
        taken |= cells


def recorded_names() -> set[str]:
    rules = [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
    return {rule["record"] for rule in rules if "record" in rule}


def test_every_metric_that_is_asked_for_exists() -> None:
    known = exported_names() | recorded_names()
    rules = [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
    asked = [rule["expr"] for rule in rules] + [query for _, query in dashboard_queries()]
    named = {name for expression in asked for name in NAME.findall(expression)}
    assert len(named) > 40
    assert named <= known, sorted(named - known)


def test_every_recorded_series_is_used() -> None:
    asked = " ".join([query for _, query in dashboard_queries()] + [(PROMETHEUS / "rules" / "alerts.yml").read_text()])
    assert not [name for name in recorded_names() if name not in asked]
