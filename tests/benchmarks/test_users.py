"""The table of Locust's users: made of real runs, its counts are those of the services, and what is wrong shows."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.fake_engine import FakeEngine, Faults
from support.models import tiny_llama
from support.services import gateway_service
from support.vocabularies import CHATML, byte_level_bpe, save

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Done:
    status: int
    shown: str
    said: str  # on standard error
    report: list[dict[str, Any]]

    @property
    def cells(self) -> list[list[str]]:
        """Of the table at the end."""
        lines = [line for line in self.shown.splitlines() if line.startswith("|")]
        assert self.shown.endswith("\n".join(lines) + "\n")
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def users(folder: Path, *arguments: object) -> Done:
    report = folder / "users.json"
    run = subprocess.run(
        [sys.executable, "benchmarks/serving/users.py", "--json", str(report), *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    return Done(run.returncode, run.stdout, run.stderr, json.loads(report.read_text()) if report.exists() else [])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("users") / "tiny", vocab_size=352, hidden_size=64, max_positions=8192)
    return save(byte_level_bpe(), folder, bos="<|endoftext|>", eos="<|im_end|>", chat_template=CHATML)


def test_a_stack_of_its_own(tmp_path: Path, tiny: Path) -> None:
    done = users(
        tmp_path, "--model", tiny, "--users", "1,4", "--seconds", 3, "--warmup", 1, "--max-tokens", 16,
        "--num-slots", 2, "--max-waiting", 5,
    )  # fmt: skip
    assert done.status == 0, done.shown + done.said
    assert "2 slots, 5 may wait" in done.shown.splitlines()[0]
    assert [cells[0] for cells in done.cells] == ["1", "4"]
    for measurement in done.report:
        row = measurement["row"]
        assert row["num_requests"] > 1
        assert 0 < row["ttft_milliseconds"]["p50"] <= row["ttft_milliseconds"]["p95"]
        assert 0 < row["itl_milliseconds"]["p50"] <= row["itl_milliseconds"]["p95"]
        assert row["errors"] == {}
        # Nothing is in flight at the end, so there is no difference to be explained.
        assert [agreement["service"] for agreement in measurement["agreements"]] == ["gateway", "engine"]
        for agreement in measurement["agreements"]:
            assert agreement["counted"] == agreement["locust"]
            assert agreement["locust"]["num_answered"] == row["num_requests"]
            assert agreement["locust"]["num_tokens"] >= row["num_requests"]


def test_refusals_are_counted_and_are_no_errors(tmp_path: Path) -> None:
    with (
        FakeEngine(num_slots=1, max_waiting=0, step_seconds=0.05) as engine,
        gateway_service(engines=engine.url) as gateway,
    ):
        done = users(tmp_path, "--host", gateway.url, "--users", 4, "--seconds", 3, "--warmup", 0, "--max-tokens", 20)
    assert done.status == 0, done.shown + done.said
    (measurement,) = done.report
    assert measurement["row"]["num_refused"] >= 3  # four begin within the second, and one has a place
    assert measurement["row"]["errors"] == {}
    (agreement,) = measurement["agreements"]
    assert agreement["service"] == "gateway"
    assert agreement["counted"] == agreement["locust"]
    (cells,) = done.cells
    assert cells[-2:] == [str(measurement["row"]["num_refused"]), "0"]


def test_errors_are_counted_and_end_in_failure(tmp_path: Path) -> None:
    with (
        FakeEngine(faults=Faults(error_after=2)) as engine,
        gateway_service(engines=engine.url) as gateway,
    ):
        done = users(tmp_path, "--host", gateway.url, "--users", 3, "--seconds", 2, "--warmup", 0)
    assert done.status == 1
    row = done.report[0]["row"]
    assert sum(row["errors"].values()) == row["num_requests"] > 2
    assert any("asked for by the test" in error for error in row["errors"])
    assert "asked for by the test" in done.shown
    (cells,) = done.cells
    assert cells == ["3", str(row["num_requests"]), "0.00", "- / -", "- / -", "0", "-", "0", str(row["num_requests"])]


def test_counters_that_disagree_end_in_failure(tmp_path: Path) -> None:
    with (
        FakeEngine() as engine,
        gateway_service(engines=engine.url) as gateway,
        gateway_service(engines=engine.url) as other,
    ):
        done = users(
            tmp_path, "--host", gateway.url, "--metrics", f"{other.url}/metrics",
            "--users", 2, "--seconds", 2, "--warmup", 0,
        )  # fmt: skip
    assert done.status == 1
    assert done.report[0]["row"]["errors"] == {}
    assert "gateway: 0 answers, 0 tokens, 0 refusals: DISAGREES" in done.shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--users", "1,many"], "argument --users: 'many' is not a whole number from 1 on"),
        (["--seconds", "0"], "argument --seconds: '0' is not a whole number from 1 on"),
        (["--metrics", "http://127.0.0.1:9"], "--metrics and --api-key-file belong to the gateway of --host"),
        (["--api-key-file", "/no/such/key"], "there is no file /no/such/key"),
        (["--json", "/no/such/folder/report.json"], "there is no folder /no/such/folder"),
        (["--host", "http://127.0.0.1:9"], "users.py: http://127.0.0.1:9/info cannot be read"),
        (["--host", "gateway:8100"], "argument --host: 'gateway:8100' is not a URL like http://127.0.0.1:8100"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    done = users(tmp_path, *arguments)
    assert done.status != 0
    assert complaint in done.said.splitlines()[-1]
    assert done.report == []
    assert "Traceback" not in done.said


def test_what_is_no_gateway_and_no_page_of_counters_is_told(tmp_path: Path) -> None:
    with FakeEngine() as engine, gateway_service(engines=engine.url) as gateway:
        engine_itself = users(tmp_path, "--host", engine.url)
        fake = users(tmp_path, "--host", gateway.url, "--metrics", f"{engine.url}/metrics")
        other = users(tmp_path, "--host", gateway.url, "--metrics", f"{engine.url}/info")
    assert engine_itself.said == f"users.py: {engine.url} is no gateway: its /info names no engines\n"
    assert fake.said.startswith(f"users.py: no counters of a gateway at {engine.url}/metrics")
    assert other.said.startswith(f"users.py: {engine.url}/info is no page of counters")
    assert engine_itself.status == fake.status == other.status == 1
