"""`--metrics-port`: what Prometheus reads of a training command as it is typed, and what is said where it cannot."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from cli.conftest import Gorgon
from cli.test_errors import one_line

from gorgon_cli import train
from gorgon_cli.train_metrics import PREFIX, MetricsOptions
from gorgon_engine.models.identity import backbone_identity
from gorgon_protocol.errors import BadRequestError
from gorgon_protocol.manifest import BackboneReference
from gorgon_trainer.data.records import TextRecord, to_line
from gorgon_trainer.metrics import TrainerMetrics
from gorgon_trainer.run_log import read_history
from gorgon_trainer.shards import SPLITS, ShardIndex, ShardWriter, TokenSequence

SECONDS = 120.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_LISTENING = re.compile(r"gorgon: metrics: listening on (http://127\.0\.0\.1:\d+/metrics)\n")
STEPS = ("--max-steps", "3", "--pack-length", "32", "--num-heads", "2", "--num-blocks", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def shards(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics") / "shards"
    reference = BackboneReference(identity=backbone_identity(tiny), name="Tiny")
    index = ShardIndex(backbone=reference, quantization="int8", vocab_size=352, data_sha256="ab" * 32)
    writer = ShardWriter(folder, index)
    for split, count in zip(SPLITS, (24, 4), strict=True):
        rows = [[3 + (first + step) % 300 for step in range(16)] for first in range(count)]
        writer.write(split, 0, [TokenSequence.from_lists(row, [0] * 4 + [1] * 12) for row in rows])
    return folder


@dataclass(slots=True)
class Job:
    """A training command in a process of its own."""

    process: subprocess.Popen[str]
    url: str

    def last_word(self) -> str:
        """What is read of it when it has ended, for which it waits."""
        end = time.monotonic() + SECONDS
        while True:
            with _DIRECT.open(self.url, timeout=10.0) as response:
                text = str(response.read(), "utf-8")
            if re.search(r'gorgon_trainer:outcome\{result="\w+"\} 1\.0', text):
                return text
            assert time.monotonic() < end, text
            time.sleep(0.05)


@contextlib.contextmanager
def job(*arguments: object, **environment: str) -> Iterator[Job]:
    process = subprocess.Popen(
        [sys.executable, "-m", "gorgon_cli", "train", *map(str, arguments)],
        env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = _LISTENING.fullmatch(line)
            assert found is not None, line + process.stderr.read()
            yield Job(process, found[1])
        finally:
            process.kill()


def test_a_job_is_watched_to_its_end(tiny: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("heads", "--shards", shards, "--out", out, "--model", tiny, *STEPS)
    with job(*arguments, "--metrics-port", 0, "--metrics-linger", SECONDS) as running:
        told = running.last_word()
        printed, _ = running.process.communicate(timeout=SECONDS)
        assert (running.process.returncode, printed) == (0, f"{out / 'heads@1'}\n")
    last = read_history(out)[-1]
    assert 'gorgon_trainer:outcome{result="finished"} 1.0' in told
    assert "gorgon_trainer:step 3.0" in told
    assert "gorgon_trainer:max_steps 3.0" in told
    assert f"gorgon_trainer:loss {last['loss']!r}" in told


def test_a_job_that_fails_says_so(tiny: Path, tmp_path: Path) -> None:
    """With the settings out of the environment, as containers have them."""
    arguments = ("heads", "--shards", tmp_path / "nowhere", "--out", tmp_path / "run", "--model", tiny, *STEPS)
    environment = {f"{PREFIX}METRICS_PORT": "0", f"{PREFIX}METRICS_LINGER_SECONDS": str(SECONDS)}
    with job(*arguments, **environment) as running:
        assert 'gorgon_trainer:outcome{result="failed"} 1.0' in running.last_word()
        _, err = running.process.communicate(timeout=SECONDS)
        assert running.process.returncode == 1
    assert str(tmp_path / "nowhere") in one_line(err)


def test_distilling_is_watched(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in SPLITS:
        (data / f"{split}.jsonl").write_bytes(to_line(TextRecord.of(f"the cat {split}", "x")))
    arguments = ("distill", "--data", data, "--out", tmp_path / "shards", "--model", tiny, "--device", "cpu",
                 "--max-new-tokens", 8, "--context", 32, "--passes", 1)  # fmt: skip
    with job(*arguments, "--metrics-port", 0, "--metrics-linger", SECONDS) as running:
        told = running.last_word()
        running.process.communicate(timeout=SECONDS)
    assert "gorgon_trainer:prompts_left 0.0" in told
    assert "gorgon_trainer:shards_left 0.0" in told


@pytest.mark.parametrize("stage", ["heads", "distill", "preset"])
def test_a_port_in_use_is_said_before_anything_is_loaded(
    gorgon: Gorgon, tiny: Path, tmp_path: Path, stage: str
) -> None:
    arguments: dict[str, tuple[object, ...]] = {
        "heads": ("heads", "--shards", tmp_path / "x"),
        "distill": ("distill", "--data", tmp_path / "x"),
        "preset": ("--preset", "smoke"),
    }
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, err = gorgon("train", *arguments[stage], "--out", tmp_path / "y", "--metrics-port", port)
    assert (status, out) == (1, "")
    assert f"port {port} is in use" in one_line(err)
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--metrics-port", "70000"), {}, "'--metrics-port'"),
        (("--metrics-port", "first"), {}, "'first' is not a valid integer range"),
        (("--metrics-port", "0", "--metrics-linger", "-1"), {}, "'--metrics-linger'"),
        ((), {"METRICS_PORT": "first"}, "GORGON_TRAINER_METRICS_PORT"),
    ],
)
def test_what_is_no_port_is_named(
    gorgon: Gorgon,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(PREFIX + name, value)
    status, out, err = gorgon("train", "heads", "--shards", tmp_path, "--out", tmp_path, *arguments)
    assert (status, out) == (2, "")
    assert message in one_line(err)


def test_a_variable_that_nobody_reads_is_refused(
    gorgon: Gorgon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}METRIC_PORT", "9102")
    status, out, err = gorgon("train", "heads", "--shards", tmp_path, "--out", tmp_path / "out")
    assert (status, out) == (1, "")
    assert "GORGON_TRAINER_METRIC_PORT is not a setting of the trainer: did you mean GORGON_TRAINER_METRICS_PORT?" in (
        one_line(err)
    )


def test_a_port_before_the_stage_is_not_lost(gorgon: Gorgon) -> None:
    status, _, err = gorgon("train", "--metrics-port", 0, "heads", "--shards", "x", "--out", "y")
    assert status == 2
    assert "--metrics-port belongs behind the stage" in one_line(err)


def options(**changes: object) -> MetricsOptions:
    values: dict[str, object] = {"metrics_port": 0, "metrics_host": "127.0.0.1", "metrics_linger_seconds": 60.0}
    return MetricsOptions(**(values | changes))  # type: ignore[arg-type]


def test_nobody_asked(capfd: pytest.CaptureFixture[str]) -> None:
    with options(metrics_port=None).served() as metrics:
        assert metrics is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("rank", "is_told"), [("0", True), ("1", False), ("3", False)])
def test_the_first_process_of_torchrun_tells(monkeypatch: pytest.MonkeyPatch, rank: str, is_told: bool) -> None:
    monkeypatch.setenv("RANK", rank)
    with options(metrics_linger_seconds=0.0).served() as metrics:
        assert isinstance(metrics, TrainerMetrics) is is_told


@pytest.mark.parametrize("error", [KeyboardInterrupt, click.UsageError("mistyped")])
def test_nobody_waits_for_what_was_interrupted_or_mistyped(error: BaseException | type[BaseException]) -> None:
    """Or this would take an hour."""
    kind = error if isinstance(error, type) else type(error)
    with pytest.raises(kind), options(metrics_linger_seconds=3600.0).served():
        raise error


def test_what_fails_is_raised_behind_the_last_word() -> None:
    with pytest.raises(BadRequestError, match="no"), options(metrics_linger_seconds=0.0).served() as metrics:
        raise BadRequestError("no")
    assert metrics is not None
    assert 'gorgon_trainer:outcome{result="failed"} 1.0' in metrics.render().decode()


@pytest.mark.parametrize("command", [train.train, train.distill, train.heads])
def test_every_long_command_has_the_options(command: click.Command) -> None:
    variables = {option.envvar for option in command.params if isinstance(option, click.Option) and option.envvar}
    assert variables == {PREFIX + name.upper() for name in MetricsOptions.__dataclass_fields__}
