"""The load test itself: every kind of user does real work, and what came of it is told."""

import csv
import http.server
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.fake_engine import FakeEngine, Faults
from support.services import gateway_service

LOCUSTFILE = Path(__file__).parent / "locustfile.py"
PATHS = {"REST": "/generate", "SSE": "/v1/chat/completions", "WebSocket": "/generate_stream"}


@dataclass(frozen=True, slots=True)
class Report:
    status: int  # of the exit
    rows: dict[tuple[str, str], dict[str, Any]]  # of the statistics, by (type, name)
    answers: list[dict[str, Any]]

    def total(self, kind: str, field: str = "num_requests") -> int:
        return sum(row[field] for (name, _), row in self.rows.items() if name == kind)


@dataclass(frozen=True, slots=True)
class Served:
    report: Report
    folder: Path
    num_requests: int  # that the engine got


def locust(url: str, folder: Path, *options: str, seconds: int = 3) -> Report:
    # Not the statistics of --csv: the last second is not in them.
    run = subprocess.run(
        [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, "--headless", "--users", "6",
         "--spawn-rate", "6", "--run-time", f"{seconds}s", "--only-summary", "--json-file", str(folder / "report"),
         "--csv", str(folder / "report"), "--html", str(folder / "report.html"),
         "--answers", str(folder / "answers.jsonl"), *options],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert (folder / "report.json").exists(), run.stderr
    rows = json.loads((folder / "report.json").read_text())
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return Report(run.returncode, {(row["method"], row["name"]): row for row in rows}, answers)


def failures(folder: Path) -> str:
    with (folder / "report_failures.csv").open(newline="") as file:
        return "\n".join(row["Error"] for row in csv.DictReader(file))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    with FakeEngine(step_seconds=0.01) as engine, gateway_service(engines=engine.url) as gateway:
        report = locust(gateway.url, folder, "--max-tokens", "20", "--stop-timeout", "30")
        return Served(report, folder, len(engine.requests))


def test_every_kind_of_user_is_served_and_measured(served: Served) -> None:
    report = served.report
    assert report.status == 0
    for kind, path in PATHS.items():
        row = report.rows[kind, path]
        assert row["num_requests"] > 2
        assert row["num_failures"] == 0
        assert row["total_content_length"] == 20 * row["num_requests"]  # tokens
    for kind in ("SSE", "WebSocket"):
        whole, ttft, itl, speed = (report.rows[name, PATHS[kind]] for name in (kind, "ttft", "itl", "tokens/s"))
        assert 0 < ttft["total_response_time"] < whole["total_response_time"]
        # Seven messages in about 80 ms or more.
        assert itl["min_response_time"] > 1.0
        assert speed["max_response_time"] < 1000.0
    assert report.total("refused") == 0
    assert "/generate_stream" in (served.folder / "report.html").read_text()


def test_each_answer_is_a_line(served: Served) -> None:
    # What was asked is answered when the run is over, and nothing is asked after it.
    answers = served.report.answers
    assert {answer["outcome"] for answer in answers} == {"answered"}
    assert Counter(answer["interface"] for answer in answers) == {kind: served.report.total(kind) for kind in PATHS}
    assert len(answers) == served.num_requests
    for answer in answers:
        assert answer["num_tokens"] == 20
        assert answer["begun_at"] < answer["ended_at"]
        if answer["interface"] == "REST":
            assert answer["ttft_seconds"] is answer["itl_seconds"] is None
        else:
            assert 0 < answer["ttft_seconds"] < answer["ended_at"] - answer["begun_at"]
            assert answer["itl_seconds"] > 1e-3


def test_who_is_refused_comes_back_when_told(tmp_path: Path) -> None:
    with (
        FakeEngine(faults=Faults(refuse="queue_full", times=9)) as engine,
        gateway_service(engines=engine.url) as gateway,
    ):
        report = locust(gateway.url, tmp_path, "--stop-timeout", "30")
    assert report.status == 0  # no failure, but a row of its own
    assert report.total("refused") == 9
    assert {answer["outcome"] for answer in report.answers} == {"answered"}
    refused = [answer for answer in report.answers if answer["num_refused"]]
    assert sum(answer["num_refused"] for answer in refused) == 9
    assert {answer["interface"] for answer in refused} == set(PATHS)  # six users begin with six refusals
    for answer in refused:
        seconds = answer["ended_at"] - answer["begun_at"]
        assert seconds >= answer["num_refused"] * 1.0  # that the engine asks for
        assert answer["ttft_seconds"] is None or answer["ttft_seconds"] >= answer["num_refused"] * 1.0
    # Each attempt went to the engine, which has refused nine of them.
    assert len(engine.requests) == len(report.answers) + 9


def test_errors_are_failures_with_their_reasons(tmp_path: Path) -> None:
    faults = Faults(error_after=2)
    with FakeEngine(faults=faults) as engine, gateway_service(engines=engine.url) as gateway:
        report = locust(gateway.url, tmp_path, "--stop-timeout", "30")
    assert report.status == 1
    for kind in PATHS:
        assert report.total(kind, "num_failures") == report.total(kind) > 1
    assert {answer["outcome"] for answer in report.answers} == {"failed"}
    assert all("asked for by the test" in answer["error"] for answer in report.answers)
    assert "asked for by the test" in failures(tmp_path)


@contextmanager
def busy_without_a_time() -> Iterator[str]:
    """A server that answers 429 to everybody and does not say for how long."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b'{"error": {"message": "not now"}}'
            self.send_response(429)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_refusal_that_does_not_say_when_to_come_back_is_a_failure(tmp_path: Path) -> None:
    with busy_without_a_time() as url:
        report = locust(url, tmp_path, "--stop-timeout", "30", seconds=2)
    assert report.status == 1
    assert report.total("refused") == 0
    for kind in PATHS:
        assert report.total(kind, "num_failures") == report.total(kind) > 1
    assert all("429" in answer["error"] for answer in report.answers)


def test_answers_that_the_end_cuts_off_are_told(tmp_path: Path) -> None:
    with FakeEngine(step_seconds=1.0) as engine, gateway_service(engines=engine.url) as gateway:
        report = locust(gateway.url, tmp_path, seconds=2)
    assert report.status == 0
    assert [answer["outcome"] for answer in report.answers] == ["cut"] * 6
    assert {answer["ended_at"] for answer in report.answers} == {None}
