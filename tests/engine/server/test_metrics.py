"""Metrics: the names that dashboards know, and numbers that add up to what the answers reported."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gorgon_engine.engine import Engine, load_parts
from gorgon_engine.events import TokenEvent
from gorgon_engine.graphs import GraphStats
from gorgon_engine.outcome import StepSeconds
from gorgon_engine.recording import RepeatingRecorder
from gorgon_engine.server.loader import engine_config
from gorgon_engine.server.metrics import EngineMetrics, StepTally
from gorgon_engine.server.settings import EngineSettings
from gorgon_engine.server.worker import LoadProgress
from gorgon_protocol.messages import MESSAGE, FinishedMessage

NAMES = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
}

Samples = dict[str, float]


def samples(text: str) -> Samples:
    """name{label="value"} -> value, of our own metrics."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
            name = sample.name.removeprefix("gorgon:")
            if name != sample.name:
                found[f"{name}{{{labels}}}" if labels else name] = sample.value
    return found


def test_the_numbers_are_those_of_the_answers(serve: Any) -> None:
    body = {"prompt": "the cat sat on the mat, the cat", "seed": 1, "ignore_eos": True, "logit_bias": {"5": 60}}
    with serve(num_slots=2) as running:
        running.wait_until_ready()
        ends = []
        for number, fields in enumerate(({}, {"speculation": {"enabled": False}}, {"temperature": 0.7})):
            answer = running.client.post(
                "/generate", json=body | {"request_id": f"r{number}", "max_tokens": 40} | fields
            )
            end = MESSAGE.validate_json(answer.text.splitlines()[-1])
            assert isinstance(end, FinishedMessage)
            ends.append(end)
        assert running.client.post("/generate", json={**body, "request_id": "r", "prompt": None}).status_code == 400
        assert running.client.post("/generate", json={**body, "request_id": "r", "model": "x"}).status_code == 404
        found = samples(running.client.get("/metrics").text)
    spoken = [end.metrics.speculative_decoding for end in ends]
    assert found["generation_tokens_total"] == sum(end.usage.completion_tokens for end in ends) == 120
    assert found["prompt_tokens_total"] == sum(end.usage.prompt_tokens for end in ends)
    assert found['request_success_total{finished_reason="length"}'] == 3
    assert found['request_failure_total{code="not_found"}'] == 1
    accepted = found["spec_decode_num_accepted_tokens_total"]
    assert accepted == sum(m.num_accepted_draft_tokens for m in spoken)
    assert accepted > 20, "one token for ever: lookup guesses it"
    assert found["spec_decode_num_draft_tokens_total"] == sum(m.num_draft_tokens for m in spoken)
    steps = found['decode_steps_total{kind="plain"}'] + found['decode_steps_total{kind="speculative"}']
    assert steps == sum(m.num_spec_steps for m in spoken) == found["spec_decode_tree_nodes_count"]
    assert found['decode_steps_total{kind="plain"}'] >= 39, "the request without speculation"
    assert found["spec_decode_num_drafts_total"] == found['decode_steps_total{kind="speculative"}']
    positions = [v for k, v in found.items() if k.startswith("spec_decode_num_accepted_tokens_per_pos_total")]
    assert sum(positions) == accepted
    histogram = spoken[0].acceptance_histogram
    assert len(positions) >= len(histogram) - 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert found[f"{name}_count"] == 3
    assert found["request_speedup_count"] == 3
    assert found["inter_token_latency_seconds_count"] == steps
    assert found['step_seconds_total{verb="verify"}'] > 0
    assert found['plain_tokens_per_second{batch_size="1"}'] > 0
    assert found["engine_ready"] == 1
    missing = {n for n in NAMES if not any(k == n or k.startswith(n + "{") for k in found)}
    assert not missing


def event(*, num_nodes: int, num_accepted: int, step: int = 1) -> TokenEvent:
    return TokenEvent(
        request_id="r",
        token_ids=[1] * (num_accepted + 1),
        pieces=["a"] * (num_accepted + 1),
        num_accepted=num_accepted,
        step=step,
        num_nodes=num_nodes,
        logprobs=None,
        trace=None,
        seconds=StepSeconds(0.1, 0.2, 0.3, 0.4),
        batch_size=3,
    )


@pytest.fixture
def metrics() -> EngineMetrics:
    return EngineMetrics(
        num_running=lambda: 2.0, num_waiting=lambda: 3.0, kv_cache_usage=lambda: 0.25, is_ready=lambda: 1.0
    )


def test_a_step_counts_each_depth_that_was_reached(metrics: EngineMetrics) -> None:
    tally = StepTally()
    for one in (
        event(num_nodes=8, num_accepted=3),
        event(num_nodes=4, num_accepted=1),
        event(num_nodes=4, num_accepted=0),
        event(num_nodes=1, num_accepted=0),
        event(num_nodes=1, num_accepted=0, step=0),
    ):
        metrics.tally(tally, one)
    metrics.add(tally)
    found = samples(metrics.render().decode())
    assert found["generation_tokens_total"] == 9
    assert found["spec_decode_num_drafts_total"] == 3
    assert found["spec_decode_num_draft_tokens_total"] == 13
    assert found["spec_decode_num_accepted_tokens_total"] == 4
    per_position = [found[f'spec_decode_num_accepted_tokens_per_pos_total{{position="{i}"}}'] for i in range(3)]
    assert per_position == [2, 1, 1]
    assert found['decode_steps_total{kind="plain"}'] == 1
    assert found['step_seconds_total{verb="commit"}'] == 0.4, "the pass that all shared, once"
    assert (found["num_requests_running"], found["num_requests_waiting"], found["kv_cache_usage_perc"]) == (2, 3, 0.25)


def recorded(settings: EngineSettings, progress: LoadProgress) -> Engine:
    """An engine that launches steps as recordings, as one on a GPU does."""
    config = engine_config(settings)
    parts = load_parts(config)
    return Engine(
        backbone=parts.backbone,
        tokenizer=parts.tokenizer,
        drafters=parts.drafters,
        config=config,
        recorder=RepeatingRecorder(),
    )


def test_it_is_told_how_steps_are_launched(serve: Any) -> None:
    body = {"prompt": "the cat sat on the mat, the cat", "seed": 1, "ignore_eos": True, "max_tokens": 24}
    with serve(recorded, num_slots=2) as running:
        running.wait_until_ready()
        engine = running.service.engine
        assert running.info()["kernels"] == f"{engine.backbone.kernels} in graphs"
        for number, fields in enumerate(({}, {}, {"repetition_penalty": 1.3})):
            answer = running.client.post("/generate", json=body | {"request_id": f"r{number}"} | fields)
            assert isinstance(MESSAGE.validate_json(answer.text.splitlines()[-1]), FinishedMessage)
            running.wait_for(lambda: not engine.has_work)
            found = samples(running.client.get("/metrics").text)
        assert found == samples(running.client.get("/metrics").text), "what was counted is counted once"
    stats = engine.graph_stats
    assert found['graph_steps_total{kind="replayed"}'] == stats.num_replayed > 0
    assert found['graph_steps_total{kind="first_run"}'] == stats.num_first_runs > 0
    assert found['graph_steps_total{kind="eager"}'] == sum(stats.num_eager.values())
    assert found['graph_eager_steps_total{reason="penalties"}'] == stats.num_eager["penalties"] >= 20
    assert found["num_graphs"] == stats.num_graphs > 0
    assert found["graph_capture_seconds_total"] == pytest.approx(stats.capture_seconds)
    assert any(name.startswith("engine_info{") and 'graphs="yes"' in name for name in found)


def test_without_graphs_nothing_is_told_of_them(running: Any) -> None:
    assert running.info()["kernels"] == running.service.engine.backbone.kernels
    found = samples(running.client.get("/metrics").text)
    assert {value for name, value in found.items() if name.startswith("graph_steps_total")} == {0}
    assert not any(name.startswith("graph_eager_steps_total") for name in found)
    assert any(name.startswith("engine_info{") and 'graphs="no"' in name for name in found)


def test_what_the_engine_counts_is_read_where_the_metrics_are() -> None:
    stats = GraphStats()
    metrics = EngineMetrics(
        num_running=lambda: 0.0, num_waiting=lambda: 0.0, kv_cache_usage=lambda: 0.0, is_ready=lambda: 1.0,
        graph_stats=lambda: stats,
    )  # fmt: skip
    for replayed in (5, 12):
        stats.num_replayed = replayed
        stats.capture_seconds += 0.5
        stats.num_graphs = 20 - replayed
        stats.eager("penalties")
        found = samples(metrics.render().decode())
        assert found['graph_steps_total{kind="replayed"}'] == replayed
        assert found["num_graphs"] == 20 - replayed
    assert found["graph_capture_seconds_total"] == 1.0
    assert found['graph_steps_total{kind="eager"}'] == found['graph_eager_steps_total{reason="penalties"}'] == 2


def test_only_the_heads_in_use_are_named(metrics: EngineMetrics) -> None:
    metrics.set_heads("hydra", "1", "hydra")
    metrics.set_heads("hydra", "2", "hydra")
    named = [name for name in samples(metrics.render().decode()) if name.startswith("heads_info")]
    assert named == ['heads_info{family="hydra",name="hydra",version="2"}']
    metrics.clear_heads()
    assert not any(name.startswith("heads_info") for name in samples(metrics.render().decode()))
