"""The load test itself: every kind of user does real work, and the report is written."""

import csv
import subprocess
import sys
from pathlib import Path

from support.fake_engine import FakeEngine, Faults
from support.services import gateway_service

LOCUSTFILE = Path(__file__).parent / "locustfile.py"


def locust(url: str, folder: Path, *options: str) -> tuple[int, dict[tuple[str, str], dict[str, str]]]:
    """Exit status, and the rows of the statistics by (type, name)."""
    run = subprocess.run(
        [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, "--headless", "--users", "6",
         "--spawn-rate", "6", "--run-time", "4s", "--only-summary", "--csv", str(folder / "report"),
         "--html", str(folder / "report.html"), *options],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    with (folder / "report_stats.csv").open(newline="") as file:
        rows = {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}
    assert ("", "Aggregated") in rows, run.stderr
    return run.returncode, rows


def test_every_kind_of_user_is_served_and_measured(tmp_path: Path) -> None:
    with FakeEngine(step_seconds=0.01) as engine, gateway_service(engines=engine.url) as gateway:
        status, rows = locust(gateway.url, tmp_path, "--max-tokens", "20")
    assert status == 0
    assert int(rows["", "Aggregated"]["Failure Count"]) == 0
    for kind, path in (("REST", "/generate"), ("SSE", "/v1/chat/completions"), ("WebSocket", "/generate_stream")):
        row = rows[kind, path]
        assert int(row["Request Count"]) > 3
        assert float(row["Average Content Size"]) == 20  # tokens
    for path in ("/v1/chat/completions", "/generate_stream"):
        whole, ttft = rows[{"/generate_stream": "WebSocket"}.get(path, "SSE"), path], rows["ttft", path]
        assert 0 < float(ttft["Average Response Time"]) < float(whole["Average Response Time"])
        # Seven messages in about 80 ms or more.
        assert float(rows["itl", path]["Min Response Time"]) > 1.0
        assert float(rows["tokens/s", path]["Max Response Time"]) < 1000.0
    assert "/generate_stream" in (tmp_path / "report.html").read_text()


def test_refusals_are_failures_with_their_reasons(tmp_path: Path) -> None:
    faults = Faults(error_after=2)
    with FakeEngine(faults=faults) as engine, gateway_service(engines=engine.url) as gateway:
        status, rows = locust(gateway.url, tmp_path)
    assert status == 1
    aggregated = rows["", "Aggregated"]
    assert int(aggregated["Failure Count"]) == int(aggregated["Request Count"]) > 3
    assert "asked for by the test" in (tmp_path / "report_failures.csv").read_text()
