"""Users of the running stack, by Locust: latencies, tokens/s, refusals and errors of each number of users.

    PYTHONPATH=tests python benchmarks/serving/users.py [--users 1,8,32,100] [--seconds 60] [--max-tokens 64]
        [--host URL] [--json FILE]

Starts `python -m gorgon_engine` and `python -m gorgon_gateway` as they are when nothing is set, or takes the gateway of
`--host URL`. `tests/load/locustfile.py` asks first turns of MT-bench through all three interfaces at temperature 0.7; a
user thinks for 0.1 to 1 s between two answers, so one user does not keep an engine busy. With fewer users than
interfaces the streamed ones come first. The client runs on the same machine, and its work is part of what is measured.

    requests        questions; each counts once, however often it was refused before it was taken
    ttft, itl       milliseconds of streamed answers to the first text and, an answer's mean, for each token behind it
    tokens/s        of all users from the first question to the last answer; and of one stream, the median
    refused         429s that say when to come back. The user comes back then: ttft begins with the first asking
    other errors    everything else that is no answer

Questions that were asked when the time is over are answered first. What Locust reports must then agree with what the
services have counted (`/metrics`): answers and tokens with gateway and engine, refusals with the gateway. With `--host`
give the pages of both by `--metrics URL ...`; unset, it is the gateway's on its own port.

The exit status is 1 where there are other errors or where the counts disagree.

Predictions: no other errors, whatever the number; tokens/s grow up to the number of slots (8) and stay there, behind it
ttft grows instead; refusals from slots + max_waiting (8 + 64) users on.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from service_counters import Agreement, Counts, Pages, read_page

from gorgon_protocol.errors import GorgonError, UnavailableError
from support.services import engine_service, gateway_service

LOCUSTFILE = Path(__file__).parents[2] / "tests" / "load" / "locustfile.py"
USERS = {"WebSocket": "WebSocketUser", "SSE": "SseUser", "REST": "RestUser"}  # the first of them come first
WARMUP_USERS = 8
STOP_SECONDS = 120  # for the last answers


@dataclass(frozen=True, slots=True)
class Load:
    """What every number of users does."""

    seconds: int
    max_tokens: int
    temperature: float
    api_key_file: Path | None


@dataclass(frozen=True, slots=True)
class Stack:
    """A running gateway, and the pages that its counters and those of its engines are on."""

    url: str
    metrics_urls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """What Locust has written about one number of users."""

    num_users: int
    answers: list[dict[str, Any]]  # the locustfile's `Answer`s
    counts: Counts  # of Locust's own statistics


@dataclass(frozen=True, slots=True)
class Quantiles:
    """None where there was nothing to measure."""

    p50: float | None
    p95: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quantiles":
        """The nearest ranks."""
        ordered = sorted(values)
        p50, p95 = (ordered[math.ceil(share * len(ordered)) - 1] if ordered else None for share in (0.50, 0.95))
        return cls(p50, p95)


@dataclass(frozen=True, slots=True)
class Row:
    """One number of users."""

    num_users: int
    num_requests: int
    requests_per_second: float  # answered
    ttft_milliseconds: Quantiles
    itl_milliseconds: Quantiles
    tokens_per_second: float  # of all users
    stream_tokens_per_second: float | None  # of one answer behind its first token, the median
    num_refused: int
    errors: dict[str, int]  # what they say -> times

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number of users, and whether to believe it."""

    row: Row
    agreements: list[Agreement]

    @property
    def is_good(self) -> bool:
        return not self.row.errors and all(agreement.holds for agreement in self.agreements)

    def __str__(self) -> str:
        lines = [f"{self.row.num_users} users: Locust: {self.agreements[0].locust}"]
        lines += [f"  {agreement}" for agreement in self.agreements]
        lines += [f"  {count} x {error}" for error, count in self.row.errors.items()]
        return "\n".join(lines)


def run_locust(url: str, num_users: int, load: Load) -> Run:
    """Raises `UnavailableError` with Locust's own words where it did not do what it should."""
    with tempfile.TemporaryDirectory(prefix="users-") as name:
        answers_file, statistics_file = Path(name) / "answers.jsonl", Path(name) / "statistics.json"
        key = [] if load.api_key_file is None else ["--api-key-file", load.api_key_file]
        command = [
            sys.executable, "-m", "locust", "-f", LOCUSTFILE, "--host", url, "--headless", "--only-summary",
            "--users", num_users, "--spawn-rate", num_users, "--run-time", load.seconds, "--stop-timeout", STOP_SECONDS,
            # Not --csv: that is written once a second, and the answers of the last one are not in it.
            "--json-file", statistics_file.with_suffix(""), "--answers", answers_file,
            "--max-tokens", load.max_tokens, "--temperature", load.temperature, *key,
            *list(USERS.values())[:num_users],
        ]  # fmt: skip
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if not statistics_file.exists():
            raise UnavailableError(f"Locust ended with {done.returncode}: {_complaint(done.stderr)}")
        answers = [json.loads(line) for line in answers_file.read_text(encoding="utf-8").splitlines()]
        rows = json.loads(statistics_file.read_text(encoding="utf-8"))
    # Its status is 1 for failures, and for what its users stumbled over, of which nothing else tells.
    if done.returncode != any(answer["outcome"] == "failed" for answer in answers):
        raise UnavailableError(f"Locust ended with {done.returncode}: {_complaint(done.stderr)}")
    return Run(num_users, answers, _locust_counts(rows))


def _complaint(log: str) -> str:
    """The last error in Locust's log, or its last line."""
    lines = log.strip().splitlines() or ["it says nothing"]
    return next((line for line in reversed(lines) if "/ERROR/" in line), lines[-1])


def _locust_counts(rows: list[dict[str, Any]]) -> Counts:
    answers = [row for row in rows if row["method"] in USERS]
    return Counts(
        num_answered=sum(row["num_requests"] - row["num_failures"] for row in answers),
        num_tokens=sum(row["total_content_length"] for row in answers),
        num_refused=sum(row["num_requests"] for row in rows if row["method"] == "refused"),
    )


def summarise(run: Run) -> Row:
    answered = [answer for answer in run.answers if answer["outcome"] == "answered"]
    begun_at = min((answer["begun_at"] for answer in run.answers), default=0.0)
    seconds = max((answer["ended_at"] or 0.0 for answer in run.answers), default=0.0) - begun_at
    ttft, itl = (
        [answer[name] for answer in answered if answer[name] is not None] for name in ("ttft_seconds", "itl_seconds")
    )
    errors = Counter(
        answer["error"] or f"not answered {STOP_SECONDS} s after the end"
        for answer in run.answers
        if answer["outcome"] != "answered"
    )
    return Row(
        num_users=run.num_users,
        num_requests=len(run.answers),
        requests_per_second=len(answered) / seconds if answered else 0.0,
        ttft_milliseconds=Quantiles.of([1e3 * value for value in ttft]),
        itl_milliseconds=Quantiles.of([1e3 * value for value in itl]),
        tokens_per_second=sum(answer["num_tokens"] for answer in answered) / seconds if answered else 0.0,
        stream_tokens_per_second=statistics.median(1.0 / value for value in itl) if itl else None,
        num_refused=run.counts.num_refused,
        errors=dict(errors),
    )


def agreements(run: Run, counted: Mapping[str, Counts], max_tokens: int) -> list[Agreement]:
    """One a service."""
    num_without = sum(answer["outcome"] != "answered" for answer in run.answers)
    # Who is cut off may have been refused without hearing of it.
    max_ahead = Counts(num_without, num_without * max_tokens, num_without)
    return [Agreement(service, run.counts, counts, max_ahead) for service, counts in counted.items()]


def measure(stack: Stack, numbers: Sequence[int], load: Load, warmup_seconds: int) -> Iterator[Measurement]:
    """One a number of users, as they come. Raises `UnavailableError`."""
    pages = Pages(stack.metrics_urls)
    pages.wait_until_idle()
    if warmup_seconds:
        run_locust(stack.url, min(max(numbers), WARMUP_USERS), replace(load, seconds=warmup_seconds))
    for num_users in numbers:
        pages.wait_until_idle()
        before = pages.counts()
        run = run_locust(stack.url, num_users, load)
        pages.wait_until_idle()
        counted = {service: counts - before[service] for service, counts in pages.counts().items()}
        yield Measurement(summarise(run), agreements(run, counted, load.max_tokens))


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    lines = [
        "| users | requests | requests/s | ttft p50 / p95, ms | itl p50 / p95, ms | tokens/s | of a stream "
        "| refused (429) | other errors |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ttft, itl = row.ttft_milliseconds, row.itl_milliseconds
        cells = (
            row.num_users, row.num_requests, f"{row.requests_per_second:.2f}",
            f"{_shown(ttft.p50, 0)} / {_shown(ttft.p95, 0)}", f"{_shown(itl.p50, 1)} / {_shown(itl.p95, 1)}",
            f"{row.tokens_per_second:.0f}", _shown(row.stream_tokens_per_second, 0), row.num_refused, row.num_errors,
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def describe(stack: Stack, api_key_file: Path | None) -> str:
    """What serves, and how many it serves at once. Raises `UnavailableError`."""
    headers = {} if api_key_file is None else {"Authorization": f"Bearer {api_key_file.read_text().strip()}"}
    page = read_page(f"{stack.url}/info", headers)
    try:
        return "\n".join(
            f"{engine['model']}, {engine['kernels']}, heads {engine['heads']['current']}: "
            f"{engine['num_slots']} slots, {engine['max_waiting']} may wait"
            for engine in json.loads(page)["engines"]
        )
    except (ValueError, LookupError, TypeError):
        raise UnavailableError(f"{stack.url} is no gateway: its /info names no engines") from None


@contextmanager
def running_stack(arguments: argparse.Namespace) -> Iterator[Stack]:
    """That of --host, or one of our own."""
    if arguments.host is not None:
        yield Stack(arguments.host, tuple(arguments.metrics or [f"{arguments.host}/metrics"]))
        return
    with (
        engine_service(
            model=arguments.model, num_slots=arguments.num_slots, max_waiting=arguments.max_waiting
        ) as engine,
        gateway_service(engine) as gateway,
    ):
        yield Stack(gateway.url, (f"{gateway.url}/metrics", f"{engine.url}/metrics"))


def _whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return number


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme != "http" or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL like http://127.0.0.1:8100")
    return text.rstrip("/")


def _file(text: str) -> Path:
    if not (path := Path(text)).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", default="1,8,32,100", help="numbers of them, with commas between")
    parser.add_argument("--seconds", type=_whole(1), default=60, help="of each number")
    parser.add_argument("--warmup", type=_whole(0), default=5, help="seconds before them")
    parser.add_argument("--max-tokens", type=_whole(1), default=64, help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--model", default="smollm2", help="of an engine of our own")
    parser.add_argument("--num-slots", type=_whole(1), help="of it; its default if unset")
    parser.add_argument("--max-waiting", type=_whole(0), help="as above")
    parser.add_argument("--host", type=_url, help="URL of a running gateway, used by nobody else")
    parser.add_argument(
        "--metrics", type=_url, nargs="+", metavar="URL", help="pages of counters, of it and its engines"
    )
    parser.add_argument("--api-key-file", type=_file, help="holds the key that it asks for")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    try:
        arguments.users = [_whole(1)(number) for number in arguments.users.split(",")]
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --users: {error}")
    if arguments.host is None and (arguments.metrics or arguments.api_key_file):
        parser.error("--metrics and --api-key-file belong to the gateway of --host: give that, too")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        parser.error(f"argument --json: there is no folder {arguments.json.parent}")
    return arguments


def main() -> int:
    arguments = _arguments()
    load = Load(arguments.seconds, arguments.max_tokens, arguments.temperature, arguments.api_key_file)
    measurements: list[Measurement] = []
    with running_stack(arguments) as stack:
        print(describe(stack, arguments.api_key_file), flush=True)
        for measurement in measure(stack, arguments.users, load, arguments.warmup):
            measurements.append(measurement)
            print(measurement, flush=True)
    rows = [measurement.row for measurement in measurements]
    print(table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(measurement) for measurement in measurements], indent=1) + "\n")
    return 0 if all(measurement.is_good for measurement in measurements) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GorgonError as error:
        sys.exit(f"users.py: {error}")
