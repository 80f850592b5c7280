"""The suite ends whatever its parts do, and says what became of each."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    """By its path: it is a script, and its folder is no place for modules."""
    spec = importlib.util.spec_from_file_location("gpu_suite", ROOT / "benchmarks" / "gpu_suite.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_suite"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def program(suite: ModuleType, name: str, text: str, **options: object) -> object:
    return suite.Part(name, ("-c", text), **({"limit_seconds": 120.0} | options))


def test_every_part_is_told_about(suite: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [
        program(suite, "good", "print('first'); print('table')", num_lines=1),
        program(suite, "bad", "print('wrong bits'); raise SystemExit(3)"),
        program(suite, "gone", "print('never')", needs="benchmarks/kernels/no_such_kernel.py"),
        program(suite, "last", "print('still here')"),
    ]
    results = suite.run_suite(parts, tmp_path / "out", seconds=600.0, hardware="a card")
    assert [result.outcome.name for result in results] == ["OK", "FAILED", "MISSING", "OK"]
    assert [result.tail for result in results] == [
        ["table"],
        ["wrong bits"],
        ["benchmarks/kernels/no_such_kernel.py is not in this repository"],
        ["still here"],
    ]
    said = suite.summary(results)
    assert said.index("wrong bits") < said.index("===== parts") < said.index("MISSING")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "first\ntable" in log
    assert log.index("===== good") < log.index("===== bad") < log.index("still here")
    written = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert written["hardware"] == "a card"
    assert [one["outcome"] for one in written["parts"]] == ["ok", "FAILED", "MISSING", "ok"]
    assert "bad: FAILED" in capsys.readouterr().out


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_hangs_is_ended_with_all_that_it_started(suite: ModuleType, tmp_path: Path) -> None:
    child = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(3600)"
    )
    parts = [program(suite, "hangs", child, limit_seconds=3.0), program(suite, "next", "print('goes on')")]
    results = suite.run_suite(parts, tmp_path, seconds=600.0)
    assert [result.outcome.name for result in results] == ["HUNG", "OK"]
    started = int(results[0].tail[0])
    deadline = time.monotonic() + 60.0  # the kernel delivers the signal when it likes
    while is_alive(started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(started)


def test_nothing_is_begun_without_time(suite: ModuleType, tmp_path: Path) -> None:
    results = suite.run_suite([program(suite, "late", "print('late')")], tmp_path, seconds=5.0)
    assert [result.outcome.name for result in results] == ["LATE"]
    assert "late" not in (tmp_path / "log.txt").read_text()


def test_a_report_and_the_model_are_passed_on(suite: ModuleType, tmp_path: Path) -> None:
    text = (
        "import json, sys\n"
        "given = sys.argv[1:]\n"
        "json.dump({'model': given[given.index('--model') + 1]}, open(given[given.index('--json') + 1], 'w'))"
    )
    parts = [program(suite, "reports", text, takes_model=True, reports=True)]
    (result,) = suite.run_suite(parts, tmp_path, seconds=600.0, model=["--model", "some folder"])
    assert result.report == {"model": "some folder"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "suite.json"]


def test_a_report_that_was_cut_off_is_no_report(suite: ModuleType, tmp_path: Path) -> None:
    text = "import sys; open(sys.argv[sys.argv.index('--json') + 1], 'w').write('{\"half')"
    (result,) = suite.run_suite([program(suite, "cut", text, reports=True)], tmp_path, seconds=600.0)
    assert result.report is None


def test_its_parts_are_programs_of_this_repository(suite: ModuleType) -> None:
    assert len({part.name for part in suite.PARTS}) == len(suite.PARTS)
    for part in suite.PARTS:
        assert part.needs
        assert part.arguments[0] == "-m" or part.arguments[0] == part.needs
    for name in ("tests/engine/kernels", "benchmarks/engine/lifted.py", "benchmarks/kernels/nf4_linear.py"):
        assert (ROOT / name).exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nonsense"], "gpu_suite: no part is named nonsense: choose of tests, "),
        (["--only", "tests"], "gpu_suite: torch sees no CUDA GPU here"),
    ],
)
def test_what_cannot_run_says_so_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--out", str(tmp_path / "out"), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
