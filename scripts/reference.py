"""Write docs/reference: settings, metrics, API and commands, each out of the code that they describe.

    python scripts/reference.py [--check]

--check writes nothing and fails where a file in the repository is not what the code says.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from gorgon_cli import train
from gorgon_cli.main import cli
from gorgon_cli.train_metrics import PREFIX
from gorgon_engine.server.metrics import EngineMetrics
from gorgon_engine.server.settings import EngineSettings
from gorgon_gateway.app import create_app
from gorgon_gateway.observability.metrics import GatewayMetrics
from gorgon_gateway.settings import GatewaySettings
from gorgon_protocol import errors, messages, metrics, requests
from gorgon_trainer.metrics import TrainerMetrics

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "<!-- Written by `make reference` out of the code: change that, not this. -->\n"

MESSAGES: tuple[type[BaseModel], ...] = (
    messages.StatusMessage,
    messages.TokenMessage,
    messages.TreeDebug,
    messages.StepSeconds,
    messages.TokenLogprob,
    messages.TopLogprob,
    messages.FinishedMessage,
    metrics.Usage,
    messages.GenerationMetrics,
    metrics.SpeculativeDecodingMetrics,
    messages.ErrorMessage,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    pages = {"settings.md": settings(), "metrics.md": metric_pages(), "api.md": api(), "cli.md": commands()}
    stale = [name for name, text in pages.items() if not _is_current(FOLDER / name, text)]
    if is_check and stale:
        sys.exit(f"docs/reference is not what the code says ({', '.join(stale)}): run `make reference`")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (FOLDER / name).write_text(pages[name])


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = [names, ["---"] * len(names), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |\n" for line in lines
    )


def settings() -> str:
    parts = [
        NOTE,
        "# Settings\n\nRead from the environment once, at the start. Empty variables count as unset; an unknown one "
        "with the service's prefix, or a value that does not fit, ends the service with one line that names it.\n",
    ]
    for title, model in (("The gateway", GatewaySettings), ("The engine", EngineSettings)):
        parts.append(f"\n## {title}\n\n{_settings_table(model)}")
    rows = [
        (
            f"`{option.envvar}`",
            f"`{value}`" if isinstance(value := option.default, str | float) else "unset",
            option.help or "",
        )
        for option in train.distill.params
        if isinstance(option, click.Option) and str(option.envvar).startswith(PREFIX)
    ]
    parts.append(
        "\n## The trainer\n\nOf `gorgon train --preset`, `distill` and `heads`, whose options come before it. All else "
        f"is an option alone.\n\n{table(('variable', 'default', 'what it is'), rows)}"
    )
    return "".join(parts)


def _settings_table(model: type[BaseSettings]) -> str:
    prefix = model.model_config["env_prefix"]
    rows = (
        (f"`{prefix}{name.upper()}`", _default(field), field.description or "")
        for name, field in model.model_fields.items()
    )
    return table(("variable", "default", "what it is"), rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "made at the start"
    value = field.default
    if value is None or value == ():
        return "unset"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def metric_pages() -> str:
    engine = EngineMetrics(
        num_running=lambda: 0.0, num_waiting=lambda: 0.0, kv_cache_usage=lambda: 0.0, is_ready=lambda: 0.0
    )
    parts = [
        NOTE,
        "# Metrics\n\nFor Prometheus, at `/metrics`. Take rates of the counters (`rate()`), never quotients of their "
        "lifetime sums. A counter's samples carry the suffix `_total`, a histogram's `_bucket`, `_sum` and `_count`.\n",
    ]
    for title, registry in (
        ("The engine", engine.registry),
        ("The gateway", GatewayMetrics().registry),
        ("The trainer, with `--metrics-port`", TrainerMetrics().registry),
    ):
        parts.append(f"\n## {title}\n\n{_metrics_table(registry)}")
    return "".join(parts)


def _metrics_table(registry: CollectorRegistry) -> str:
    labels = {name: collector for collector, names in registry._collector_to_names.items() for name in names}
    rows = []
    for family in sorted(registry.collect(), key=lambda family: family.name):
        collector = labels.get(family.name)
        names = getattr(collector, "_labelnames", ())
        suffix = "_total" if family.type == "counter" else ""
        rows.append((f"`{family.name}{suffix}`", family.type, ", ".join(f"`{n}`" for n in names), family.documentation))
    return table(("name", "type", "labels", "what it is"), rows)


def api() -> str:
    app = create_app(GatewaySettings(), {})
    document = app.openapi()
    parts = [
        NOTE,
        "# API\n\nOf the gateway. The machine-readable description is at `/openapi.json`. Where the gateway has API "
        "keys, send one as `Authorization: Bearer KEY`.\n\n## Routes\n\n",
        table(("route", "what it does"), _routes(document)),
        '\n## WebSocket `/generate_stream`\n\nThe client sends a `GenerateRequest`, and `{"type": "cancel"}` to end '
        "it early. The gateway answers with messages, each a text frame of JSON with a `type`:\n\n"
        "    status*  token*  (finished | error)\n\nExactly one of the last two comes, whatever happens; then the next "
        "request may be sent on the same socket.\n",
    ]
    parts += [_model(model) for model in (requests.GenerateRequest, requests.ChatMessage, requests.Speculation)]
    parts += [_model(model) for model in MESSAGES]
    parts.append('\n## Errors\n\nREST: the status, and `{"error": {...}}`; on a WebSocket an `ErrorMessage`.\n\n')
    parts.append(table(("code", "status"), sorted(_errors())))
    return "".join(parts)


def _routes(document: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            text = operation.get("description") or operation.get("summary", "")
            yield f"`{method.upper()} {path}`", text.split("\n\n")[0]


def _model(model: type[BaseModel]) -> str:
    schema = model.model_json_schema(mode="serialization" if model.__module__ != requests.__name__ else "validation")
    rows = (
        (f"`{name}`", _type(field), field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
    )
    text = f"\n### {model.__name__}\n\n"
    if model.__doc__:
        text += " ".join(model.__doc__.split("\n\n")[0].split()) + "\n\n"
    return text + table(("field", "type", "what it is"), rows)


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[1]
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(part) for part in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f'`"{value}"`' for value in schema["enum"])
    if "const" in schema:
        return f'`"{schema["const"]}"`'
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    text = str(schema.get("type", "anything"))
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    if low is not None and high is not None and high < 2**31 - 1:
        text += f", {low:g} to {high:g}"
    elif low is not None:
        text += f", {'above' if 'exclusiveMinimum' in schema else 'from'} {low:g}"
    return text


def _errors() -> Iterable[tuple[str, str]]:
    waiting = [errors.GorgonError]
    while waiting:
        error = waiting.pop()
        waiting += error.__subclasses__()
        if not error.__name__.startswith("_") and error.__module__ == errors.__name__:
            yield f"`{error.code}`", str(error.http_status)


def commands() -> str:
    parts = [NOTE, "# Commands\n"]
    context = click.Context(cli, info_name="gorgon", terminal_width=100, max_content_width=100)
    parts += _command(cli, context)
    return "".join(parts)


def _command(command: click.Command, context: click.Context) -> Iterable[str]:
    yield f"\n## {context.command_path}\n\n```\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                yield from _command(child, click.Context(child, info_name=name, parent=context, terminal_width=100))


if __name__ == "__main__":
    main()
