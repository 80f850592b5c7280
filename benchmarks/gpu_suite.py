"""Everything that needs a GPU, in one run of under ten minutes: are the kernels right, and what does it all take?

    python benchmarks/gpu_suite.py [--model FOLDER] [--heads FOLDER] [--only NAME,...] [--seconds 580] [--out FOLDER]

Each part is a process of its own with a limit of its own: one that hangs or breaks costs itself. Correctness comes
first, on fresh random inputs, then the engine on the lifted model, then the tables of the kernels.
`benchmarks/gpu/README.md` says what each table means and which figures have a bar. The output folder gets `log.txt`,
all that was said, and `suite.json`. The summary comes last, in it what ran first. Exits with 1 where a part broke,
hung, or was not begun.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
_LEAST_SECONDS = 20.0  # with less time left a part is not begun


@dataclass(frozen=True, slots=True)
class Part:
    """One program of the suite."""

    name: str
    arguments: tuple[str, ...]  # of Python
    limit_seconds: float
    num_lines: int = 12  # of its end, in the summary
    needs: str = ""  # a file in the repository, without which it cannot run
    takes_model: bool = False  # --model and --heads
    reports: bool = False  # takes --json FILE


class Outcome(StrEnum):
    OK = "ok"
    FAILED = "FAILED"
    HUNG = "HUNG"
    MISSING = "MISSING"
    LATE = "not begun: no time left"


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    outcome: Outcome
    seconds: float
    tail: list[str]  # of what it said
    report: Any = None  # its own JSON


def _benchmark(name: str, script: str, *arguments: str, limit: float, lines: int, **options: Any) -> Part:
    return Part(name, (script, *arguments), limit, num_lines=lines, needs=script, **options)


def _lifted(*flags: str, limit: float, lines: int, more: tuple[str, ...] = ()) -> Part:
    """Several of its parts in one process: the model is made once, and what is measured is written part by part."""
    names = "+".join(flag.removeprefix("--") for flag in flags)
    script = "benchmarks/engine/lifted.py"
    return _benchmark(
        f"lifted {names}", script, *flags, *more, limit=limit, lines=lines, takes_model=True, reports=True
    )


def _tests() -> Part:
    """The tests that run on a GPU where there is one: most of their time is the compiler's, on one core."""
    folder = "tests/engine/kernels"
    beside = [
        *sorted((ROOT / "tests/engine/drafters").glob("test_eagle_gpu*.py")),
        ROOT / "tests/engine/test_graphs.py",
    ]
    paths = [folder, *(str(path.relative_to(ROOT)) for path in beside if path.exists())]
    several = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    # Other versions of libraries warn of other things, and plugins of others' are not asked for.
    quiet = ("--no-header", "--tb=line", "-p", "no:cacheprovider", "-p", "no:benchmark", "-o", "filterwarnings=default")
    arguments = ("-m", "pytest", *paths, "-q", *quiet, *several)
    return Part("tests", arguments, 170.0, num_lines=16, needs=folder)


PARTS = (
    _tests(),
    _lifted("--memory", "--checks", "--steps", "--control", limit=150.0, lines=42),
    _lifted("--one", "--batches", limit=170.0, lines=40, more=("--seconds", "15")),
    _benchmark("nf4_linear", "benchmarks/kernels/nf4_linear.py", limit=80.0, lines=24),
    _benchmark("tree_attention", "benchmarks/kernels/tree_attention.py", "--flex-seconds", "8", limit=80.0, lines=46),
    _benchmark("step_kernels", "benchmarks/kernels/step_kernels.py", limit=60.0, lines=50),
    _benchmark("eagle_draft", "benchmarks/kernels/eagle_draft.py", limit=70.0, lines=30, reports=True),
)


def run_suite(
    parts: Sequence[Part], out: Path, *, seconds: float, model: Sequence[str] = (), hardware: str = ""
) -> list[Result]:
    """The parts in order, none beyond `seconds` from now. out: a folder, made if it is not there; `suite.json` in it is
    whole after every part. model: the arguments that name it, for those that take one."""
    about = {"hardware": hardware, "commit": _commit()}
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + seconds
    results: list[Result] = []
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        for part in parts:
            result = run_part(part, out, log, seconds=min(part.limit_seconds, ends - time.monotonic()), model=model)
            results.append(result)
            print(f"{part.name}: {result.outcome}, {result.seconds:.0f} s", flush=True)
            write_json(out / "suite.json", about | {"parts": [asdict(one) for one in results]})
    return results


def run_part(part: Part, out: Path, log: IO[str], *, seconds: float, model: Sequence[str]) -> Result:
    """Run one part for so long at most. What it started is ended with it."""
    if part.needs and not (ROOT / part.needs).exists():
        return Result(part.name, Outcome.MISSING, 0.0, [f"{part.needs} is not in this repository"])
    if seconds < min(_LEAST_SECONDS, part.limit_seconds):
        return Result(part.name, Outcome.LATE, 0.0, [])
    report = out / f".{part.name.replace(' ', '-')}.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, *part.arguments]
    command += model if part.takes_model else []
    command += ["--json", str(report)] if part.reports else []
    log.write(f"\n===== {part.name}: {' '.join(command)}\n")
    log.flush()
    start = log.tell()
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        status: int | None = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        _end(process)
    with (out / "log.txt").open(encoding="utf-8", errors="replace") as said:
        said.seek(start)
        lines = said.read().rstrip().splitlines()
    log.seek(0, os.SEEK_END)
    outcome = Outcome.HUNG if status is None else Outcome.OK if status == 0 else Outcome.FAILED
    content = _read_report(report)
    report.unlink(missing_ok=True)
    return Result(part.name, outcome, time.monotonic() - began, lines[-part.num_lines :], content)


def _read_report(path: Path) -> Any:
    """None where the part ended before there was one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and those it started: compilers and workers share its session."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _commit() -> str | None:
    """None for a copy without history."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def summary(results: Sequence[Result]) -> str:
    """The ends of what the parts said, then one line a part. What ran first is what matters most: it comes last, where
    a log that is cut still has it."""
    blocks = ["\n".join([f"\n===== {one.name}", *one.tail]) for one in reversed(results) if one.tail]
    lines = [f"{one.name:40} {one.outcome:24} {one.seconds:6.0f} s" for one in results]
    return "\n".join([*blocks, "\n===== parts", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct; the catalogue's if left out")
    parser.add_argument("--heads", help="EAGLE heads for it; those that come with the program if left out")
    parser.add_argument("--only", help="names of parts, separated by commas; their beginnings are enough")
    parser.add_argument("--seconds", type=float, default=580.0, help="for everything")
    parser.add_argument("--out", type=Path, default=Path("gpu-suite"))
    arguments = parser.parse_args()
    wanted = tuple((arguments.only or "").split(","))
    parts = [part for part in PARTS if part.name.startswith(wanted)]
    if not parts:
        names = ", ".join(part.name for part in PARTS)
        raise SystemExit(f"gpu_suite: no part is named {arguments.only}: choose of {names}")
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu_suite: torch sees no CUDA GPU here; the tests of the kernels run without one")
    hardware = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(hardware, flush=True)
    named = {"--model": arguments.model, "--heads": arguments.heads}
    model = [text for option, value in named.items() if value is not None for text in (option, value)]
    results = run_suite(parts, arguments.out, seconds=arguments.seconds, model=model, hardware=hardware)
    print(summary(results))
    if any(result.outcome is not Outcome.OK for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
