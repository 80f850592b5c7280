"""Write the Grafana dashboards (schema version 39, Grafana 10 and later) of observability/grafana/dashboards.

    python scripts/dashboards.py [--check]

Each dashboard is a list of rows of panels below; each panel has a title, a question that it answers, a unit and its
queries. --check writes nothing and fails where a file differs.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "observability" / "grafana" / "dashboards"
WIDTH = 24
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}


@dataclass(frozen=True, slots=True)
class Query:
    expression: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    question: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    width: int = 8
    height: int = 7
    maximum: float | None = None
    shows_name: bool = False  # a stat's legend, not its value


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]


def quantiles(metric: str, by: str = "") -> tuple[Query, ...]:
    labels = f"{by}, le" if by else "le"
    legend = f"{{{{{by}}}}} " if by else ""
    return tuple(
        Query(f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket[5m])))", f"{legend}p{round(100 * q)}")
        for q in (0.5, 0.95, 0.99)
    )


def rate(metric: str, by: str, window: str = "5m") -> Query:
    return Query(f"sum by ({by}) (rate({metric}[{window}]))", " ".join(f"{{{{{name}}}}}" for name in by.split(", ")))


def stat(title: str, question: str, unit: str, expression: str) -> Panel:
    return Panel(title, question, unit, (Query(expression),), kind="stat", width=4, height=4)


OVERVIEW = Dashboard(
    "gorgon-overview",
    "Gorgon: overview",
    (
        (
            "Now",
            (
                stat("Tokens a second", "What do all engines generate?", "short",
                     "sum(instance:gorgon_generation_tokens:rate1m)"),
                stat("Measured speedup", "Half of the requests decode faster than plain by this factor.", "none",
                     "avg(instance:gorgon_request_speedup:p50_15m)"),
                stat("Engines ready", "How many take requests?", "none", "max(gorgon_gateway:engines_ready)"),
                stat("Running", "Generations under way at the gateways.", "none",
                     "sum(gorgon_gateway:num_requests_running)"),
                stat("Waiting", "Requests without a slot.", "none", "sum(gorgon:num_requests_waiting)"),
                stat("Faults", "Share of generations that end with an error of ours.", "percentunit",
                     "sum(job:gorgon_gateway_faults:rate5m) / (sum(job:gorgon_gateway_generations:rate5m) > 0)"),
            ),
        ),
        (
            "What users feel",
            (
                Panel("Time to first token", "How long until something appears?", "s",
                      quantiles("gorgon_gateway:time_to_first_token_seconds")),
                Panel("Between tokens", "How steadily does it go on, a token?", "s",
                      quantiles("gorgon_gateway:inter_token_latency_seconds")),
                Panel("Whole requests", "How long does an answer take?", "s",
                      quantiles("gorgon_gateway:e2e_request_latency_seconds")),
                Panel("Generations by outcome", "Do they end as they should?", "reqps",
                      (rate("gorgon_gateway:request_success_total", "finished_reason"),
                       rate("gorgon_gateway:request_failure_total", "code"))),
                Panel("Tokens a second by engine", "Who does the work?", "short",
                      (Query("instance:gorgon_generation_tokens:rate1m", "{{instance}}"),)),
                Panel("Prompt tokens a second", "How much is read?", "short",
                      (rate("gorgon:prompt_tokens_total", "instance"),)),
            ),
        ),
        (
            "What to scale on",
            (
                Panel("Queue", "Do requests wait for slots?", "none",
                      (Query("sum by (instance) (gorgon:num_requests_waiting)", "{{instance}} waiting"),
                       Query("sum by (instance) (gorgon:num_requests_running)", "{{instance}} running"))),
                Panel("Time in the queue", "And how long?", "s",
                      quantiles("gorgon:request_queue_time_seconds")),
                Panel("KV cache in use", "Is memory what limits?", "percentunit",
                      (Query("gorgon:kv_cache_usage_perc", "{{instance}}"),), maximum=1.0),
                Panel("Prefill", "Do long prompts hold others up?", "s",
                      quantiles("gorgon:request_prefill_time_seconds")),
                Panel("Memory", "Resident, each process.", "bytes",
                      (Query("process_resident_memory_bytes{job=~\"engine|gateway\"}", "{{job}} {{instance}}"),)),
                Panel("CPU", "Cores in use, each process.", "none",
                      (Query("rate(process_cpu_seconds_total{job=~\"engine|gateway\"}[1m])", "{{job}} {{instance}}"),)),
            ),
        ),
    ),
)  # fmt: skip

SPECULATION = Dashboard(
    "gorgon-speculation",
    "Gorgon: speculation",
    (
        (
            "Is it worth it?",
            (
                Panel("Measured speedup", "Decode speed over the engine's own plain decoding, by request: above 1 or "
                      "it costs.", "none", quantiles("gorgon:request_speedup")),
                Panel("Plain decoding as measured at start-up", "What speedups are relative to, a stream.", "short",
                      (Query("gorgon:plain_tokens_per_second", "{{instance}} batch of {{batch_size}}"),)),
                Panel("Share of plain steps", "How often is a tree not worth its rows (load, or nothing to guess)?",
                      "percentunit", (Query("instance:gorgon_plain_step_share:rate5m", "{{instance}}"),), maximum=1.0),
            ),
        ),
        (
            "What is guessed right",
            (
                Panel("Acceptance length", "Tokens a verification step emits, by engine.", "none",
                      (Query("instance:gorgon_acceptance_length:rate5m", "{{instance}}"),)),
                Panel("Acceptance length by heads", "Do the new heads guess better than those before?", "none",
                      (Query("avg by (name, version) (instance:gorgon_acceptance_length:rate5m * on (job, instance) "
                             "group_right gorgon:heads_info)", "{{name}}@{{version}}"),)),
                Panel("Accepted by position", "Of the trees verified, the share whose branch reaches this depth.",
                      "percentunit",
                      (Query("sum by (position) (rate(gorgon:spec_decode_num_accepted_tokens_per_pos_total[5m])) "
                             "/ on () group_left sum(rate(gorgon:spec_decode_num_drafts_total[5m]))",
                             "depth {{position}} + 1"),), maximum=1.0),
                Panel("Nodes accepted", "Of what is drafted, how much is kept? Low is no harm where rows are cheap.",
                      "percentunit", (Query("instance:gorgon_draft_acceptance:rate5m", "{{instance}}"),), maximum=1.0),
                Panel("Heads in use", "Name and version that each engine drafts with.", "none",
                      (Query("gorgon:heads_info", "{{instance}}: {{name}}@{{version}} ({{family}})"),)),
                Panel("Changes of heads", "Taken up or refused.", "none",
                      (Query("sum by (instance, result) (increase(gorgon:heads_swaps_total[15m]))",
                             "{{instance}} {{result}}"),)),
            ),
        ),
        (
            "What it costs",
            (
                Panel("Tree size", "Rows of a verification pass for one sequence.", "none",
                      quantiles("gorgon:spec_decode_tree_nodes")),
                Panel("Step time by verb", "Where does a second go? On a GPU all zero: measuring would mean waiting.",
                      "percentunit", (rate("gorgon:step_seconds_total", "verb"),)),
                Panel("Drafted tokens a second", "Nodes verified beside the roots.", "short",
                      (rate("gorgon:spec_decode_num_draft_tokens_total", "instance"),)),
                Panel("Steps launched as graphs", "On a GPU: what is no graph is hundreds of launches. Rises as the "
                      "sizes that come are recorded.", "percentunit",
                      (Query('sum by (instance) (rate(gorgon:graph_steps_total{kind="replayed"}[5m])) '
                             "/ (sum by (instance) (rate(gorgon:graph_steps_total[5m])) > 0)", "{{instance}}"),),
                      maximum=1.0),
                Panel("Steps without a graph", "Why? Penalties, biases and lossy rules are what requests ask for; "
                      "not recorded: the log says which sizes.", "ops",
                      (rate("gorgon:graph_eager_steps_total", "reason"),)),
            ),
        ),
    ),
)  # fmt: skip

GATEWAY = Dashboard(
    "gorgon-gateway",
    "Gorgon: gateway",
    (
        (
            "Traffic",
            (
                Panel("HTTP requests", "By route and status.", "reqps",
                      (rate("gorgon_gateway:http_requests_total", "route, code"),)),
                Panel("WebSockets", "Open now.", "none",
                      (Query("sum by (instance) (gorgon_gateway:websocket_connections)", "{{instance}}"),)),
                Panel("Tokens passed on", "A second.", "short",
                      (rate("gorgon_gateway:generation_tokens_total", "instance", "1m"),)),
                Panel("Time a token", "A generation's mean, behind the first token.", "s",
                      quantiles("gorgon_gateway:request_time_per_output_token_seconds")),
            ),
        ),
        (
            "Engines",
            (
                Panel("Engines", "Known and ready, as each gateway sees them.", "none",
                      (Query("gorgon_gateway:engines_known", "{{instance}} known"),
                       Query("gorgon_gateway:engines_ready", "{{instance}} ready"))),
                Panel("Sent elsewhere", "Asked again before anything came, or gone on with in mid-stream.", "reqps",
                      (Query("sum(rate(gorgon_gateway:retries_total[5m]))", "retried"),
                       Query("sum(rate(gorgon_gateway:resumptions_total[5m]))", "resumed"))),
                Panel("Failures by code", "Which?", "reqps", (rate("gorgon_gateway:request_failure_total", "code"),)),
            ),
        ),
        (
            "Callers",
            (
                Panel("Over a limit", "By the limit.", "reqps", (rate("gorgon_gateway:rate_limited_total", "limit"),)),
                Panel("Limits in Redis", "1 while they are; absent without Redis.", "none",
                      (Query("gorgon_gateway:limiter_redis_up", "{{instance}}"),
                       Query("sum by (instance) (rate(gorgon_gateway:limiter_fallbacks_total[5m]))",
                             "{{instance}} counted in process, a second"))),
                Panel("Slow readers", "Messages joined for them, and streams ended.", "ops",
                      (Query("sum(rate(gorgon_gateway:merged_messages_total[5m]))", "messages joined"),
                       Query("sum(rate(gorgon_gateway:slow_readers_total[5m]))", "streams ended"))),
            ),
        ),
    ),
)  # fmt: skip

TRAINER = Dashboard(
    "gorgon-trainer",
    "Gorgon: trainer",
    (
        (
            "Now",
            (
                Panel("Stage", "What is it doing?", "none", (Query("gorgon_trainer:stage == 1", "{{stage}}"),),
                      kind="stat", width=4, height=4, shows_name=True),
                stat("Progress", "How much of the training is done?", "percentunit",
                     "max(gorgon_trainer:step / gorgon_trainer:max_steps)"),
                stat("Left", "How long will the stage take at this pace?", "s", "max(gorgon_trainer:seconds_left)"),
                stat("Held-out acceptance", "Tokens a step that the heads are worth by now.", "none",
                     "max(gorgon_trainer:held_out_acceptance_length)"),
                stat("Last checkpoint", "What would a kill cost now?", "s",
                     "time() - max(gorgon_trainer:checkpoint_timestamp_seconds)"),
                stat("Memory", "Resident, each process.", "bytes",
                     "max(process_resident_memory_bytes{job=\"trainer\"})"),
            ),
        ),
        (
            "Is it learning?",
            (
                Panel("Loss", "Does it still fall?", "none", (Query("gorgon_trainer:loss", "{{instance}}"),)),
                Panel("Loss by head", "Which heads find it hard? Far ones more than near ones.", "none",
                      (Query("gorgon_trainer:head_loss", "head {{head}}"),)),
                Panel("Learning rate", "Warm-up, then down to the end of the run.", "none",
                      (Query("gorgon_trainer:learning_rate", "{{instance}}"),)),
                Panel("Held-out acceptance length", "Tokens a step expected on answers not trained on: what counts. "
                      "Falling while the loss falls too: overfitting.", "none",
                      (Query("gorgon_trainer:held_out_acceptance_length", "{{instance}}"),)),
                Panel("Held-out accuracy by head", "How often is a head's first choice right?", "percentunit",
                      (Query("gorgon_trainer:held_out_accuracy", "head {{head}}"),), maximum=1.0),
                Panel("Heads published and served", "Did the engines take up what was published? Engines by version, "
                      "beside a 1 for each version published within the day.", "none",
                      (Query("max by (name, version) (max_over_time(gorgon_trainer:published_info[1d]))",
                             "{{name}}@{{version}} published"),
                       Query("sum by (name, version) (gorgon:heads_info)", "{{name}}@{{version}} engines"))),
            ),
        ),
        (
            "How fast?",
            (
                Panel("Positions a second", "How fast is it trained, all processes together?", "short",
                      (rate("gorgon_trainer:positions_total", "instance", "2m"),)),
                Panel("Steps", "How far, of how many? Flat is a stand-still, or an evaluation.", "none",
                      (Query("gorgon_trainer:step", "{{instance}} done"),
                       Query("gorgon_trainer:max_steps", "{{instance}} in all"),
                       Query("gorgon_trainer:checkpoint_step", "{{instance}} saved"))),
                Panel("Age of the last checkpoint", "What a kill would cost: a saw-tooth.", "s",
                      (Query("time() - gorgon_trainer:checkpoint_timestamp_seconds", "{{instance}}"),)),
                Panel("Tokens distilled a second", "How fast does the backbone answer?", "short",
                      (rate("gorgon_trainer:distilled_tokens_total", "instance", "2m"),)),
                Panel("Prompts left", "How much is there to answer, by process?", "none",
                      (Query("gorgon_trainer:prompts_left", "{{instance}}"),)),
                Panel("Shards left", "Whole ones are on the disk: what a kill does not cost.", "none",
                      (Query("gorgon_trainer:shards_left", "{{instance}}"),)),
            ),
        ),
    ),
)  # fmt: skip

DASHBOARDS: Sequence[Dashboard] = (OVERVIEW, SPECULATION, GATEWAY, TRAINER)


def render(dashboard: Dashboard) -> str:
    content = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["gorgon"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": []},
        "annotations": {"list": [_swaps()]},
        "panels": list(_panels(dashboard)),
    }
    return json.dumps(content, indent=2) + "\n"


def _swaps() -> dict[str, Any]:
    """A line wherever new heads were taken up."""
    return {
        "name": "new heads",
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": "purple",
        "expr": 'changes(gorgon:heads_swaps_total{result="taken"}[1m]) > 0',
        "titleFormat": "new heads on {{instance}}",
    }


def _panels(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    number, top = 1, 0
    for title, panels in dashboard.rows:
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1},
        }
        number, top, left = number + 1, top + 1, 0
        for panel in panels:
            if left + panel.width > WIDTH:
                top, left = top + panel.height, 0
            yield _panel(panel, number, left, top)
            number, left = number + 1, left + panel.width
        top += panels[-1].height


def _panel(panel: Panel, number: int, left: int, top: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.question,
        "datasource": DATASOURCE,
        "gridPos": {"x": left, "y": top, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"textMode": "name"} if panel.shows_name else {},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": DATASOURCE,
                "expr": query.expression,
                "legendFormat": query.legend or "__auto",
            }
            for place, query in enumerate(panel.queries)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    files = {FOLDER / f"{dashboard.uid.removeprefix('gorgon-')}.json": render(dashboard) for dashboard in DASHBOARDS}
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text() != text]
    if is_check and stale:
        sys.exit(f"{', '.join(path.name for path in stale)}: not what scripts/dashboards.py says: run it")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_text(files[path])


if __name__ == "__main__":
    main()
