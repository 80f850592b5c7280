"""The benchmarks of the services still run: their figures are for the documents, their bars for quiet machines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, report: Path, *arguments: object) -> tuple[Any, str]:
    """(the JSON report, standard output)"""
    done = subprocess.run(
        [sys.executable, f"benchmarks/serving/{script}", "--json", str(report), *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text()), done.stdout


def test_relay(tmp_path: Path) -> None:
    report, shown = run(
        "relay.py", tmp_path / "relay.json", "--streams", 8, "--seconds", 1, "--rates", 200, "--rounds", 1, "--idle", 50
    )
    assert report["throughput"]["messages_per_second"] > 200
    (latency,) = report["latencies"]
    assert latency["gateway_rate"] == pytest.approx(latency["direct_rate"], rel=0.3)
    assert latency["gateway_p50"] > 0
    assert report["idle"]["num_sockets"] == 50
    assert "idle sockets" in shown


def test_batching(tmp_path: Path, tiny: Path) -> None:
    rows, shown = run(
        "batching.py",
        tmp_path / "batching.json",
        "--model",
        tiny,
        "--streams",
        1,
        4,
        "--tokens",
        16,
        "--rounds",
        1,
        "--seconds",
        0.3,
    )
    assert [row["num_streams"] for row in rows] == [1, 4]
    assert all(row["off"] > 0 and row["on"] > 0 for row in rows)
    assert "tokens/step" in shown


def test_engine_loss(tmp_path: Path) -> None:
    rows, shown = run("engine_loss.py", tmp_path / "loss.json", "--clients", 6, "--rounds", 1)
    assert [row["scenario"] for row in rows] == [
        "one engine",
        "two engines",
        "one after another",
        "before the first token",
    ]
    assert all(row["num_events"] == 6 for row in rows)
    assert all(0 < row["median"] <= row["p99"] <= row["max"] for row in rows)
    assert "p99" in shown


def test_a_minute_of_soak_leaves_nothing_behind(tmp_path: Path, tiny: Path) -> None:
    """A tiny model: what is looked for is in the services, and they have more to do the quicker answers are."""
    report, _ = run("soak.py", tmp_path / "soak.json", "--model", tiny, "--seconds", 60)
    assert (report["num_left"], report["broken"]) == (0, [])
    kinds = {how.split(":")[0] for how in report["ends"]}
    assert kinds == {"websocket", "rest", "openai", "vanished"}
    assert sum(report["ends"].values()) > 50


@pytest.mark.full
def test_a_minute_of_soak_with_a_real_model(tmp_path: Path, smollm2: Path) -> None:
    report, _ = run("soak.py", tmp_path / "soak.json", "--model", smollm2, "--seconds", 60)
    assert sum(report["ends"].values()) > 50
