"""Grafana's provisioning: of the form that its documentation gives, and about what docker-compose.yml starts.

https://grafana.com/docs/grafana/latest/administration/provisioning/
"""

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from jsonschema import Draft202012Validator

from support.metrics import DASHBOARDS

ROOT = Path(__file__).parents[2]
PROVISIONING = ROOT / "observability" / "grafana" / "provisioning"
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]

TEXT, FLAG, NUMBER = {"type": "string", "minLength": 1}, {"type": "boolean"}, {"type": "integer"}


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


DATASOURCES = closed(
    ["apiVersion", "datasources"],
    apiVersion={"const": 1},
    prune=FLAG,
    deleteDatasources={"type": "array", "items": closed(["name", "orgId"], name=TEXT, orgId=NUMBER)},
    datasources={
        "type": "array",
        "minItems": 1,
        "items": closed(
            ["name", "type", "access", "url"],
            name=TEXT,
            type=TEXT,
            access={"enum": ["proxy", "direct"]},
            orgId=NUMBER,
            uid={"type": "string", "pattern": "^[A-Za-z0-9_-]{1,40}$"},
            url=TEXT,
            user=TEXT,
            database=TEXT,
            basicAuth=FLAG,
            basicAuthUser=TEXT,
            withCredentials=FLAG,
            isDefault=FLAG,
            jsonData={"type": "object"},
            secureJsonData={"type": "object"},
            version=NUMBER,
            editable=FLAG,
        ),
    },
)
PROVIDERS = closed(
    ["apiVersion", "providers"],
    apiVersion={"const": 1},
    providers={
        "type": "array",
        "minItems": 1,
        "items": closed(
            ["name", "options"],
            name=TEXT,
            orgId=NUMBER,
            folder={"type": "string"},
            folderUid=TEXT,
            type={"const": "file"},
            disableDeletion=FLAG,
            updateIntervalSeconds=NUMBER,
            allowUiUpdates=FLAG,
            options=closed(["path"], path=TEXT, foldersFromFilesStructure=FLAG),
        ),
    },
)


def provisioned(kind: str, schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of every file of that kind, each of its schema."""
    files = sorted((PROVISIONING / kind).glob("*.y*ml"))
    assert files
    contents = [yaml.safe_load(file.read_text()) for file in files]
    for content in contents:
        Draft202012Validator(schema).validate(content)
    return [entry for content in contents for entry in content[kind if kind in content else "providers"]]


def test_the_datasource_is_the_prometheus_of_the_stack() -> None:
    (datasource,) = provisioned("datasources", DATASOURCES)
    assert datasource["type"] == "prometheus"
    address = urlsplit(datasource["url"])
    assert address.hostname in SERVICES
    assert SERVICES[address.hostname]["ports"][0].endswith(f":{address.port}")
    assert set(SERVICES["grafana"]["networks"]) & set(SERVICES[address.hostname]["networks"])


def test_dashboards_are_where_their_provider_looks() -> None:
    (provider,) = provisioned("dashboards", PROVIDERS)
    assert f"./observability/grafana/dashboards:{provider['options']['path']}:ro" in SERVICES["grafana"]["volumes"]
    assert "./observability/grafana/provisioning:/etc/grafana/provisioning:ro" in SERVICES["grafana"]["volumes"]


def test_dashboards_ask_the_datasource_that_is_provisioned() -> None:
    (datasource,) = provisioned("datasources", DATASOURCES)
    for path in DASHBOARDS:
        asked = [panel["datasource"] for panel in json.loads(path.read_text())["panels"] if panel.get("targets")]
        assert asked, path.stem
        assert all(one == {"type": "prometheus", "uid": datasource["uid"]} for one in asked), path.stem
