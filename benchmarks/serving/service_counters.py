"""What gateway and engines have counted (`/metrics`), to hold beside what a client counts."""

import http.client
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from gorgon_protocol.errors import UnavailableError

_PREFIXES = {"gateway": "gorgon_gateway:", "engine": "gorgon:"}
_STATES = ("running", "waiting")
_ANSWERED = frozenset({"stop", "length"})
_REFUSED = frozenset({"queue_full", "rate_limit_exceeded"})
_IDLE_SECONDS = 60.0
_POLL_SECONDS = 0.1
_READ_SECONDS = 10.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Counts:
    """Of the generations since the service began, or of a run."""

    num_answered: int
    num_tokens: int
    num_refused: int

    def __sub__(self, earlier: "Counts") -> "Counts":
        return Counts(
            self.num_answered - earlier.num_answered,
            self.num_tokens - earlier.num_tokens,
            self.num_refused - earlier.num_refused,
        )

    def __str__(self) -> str:
        return f"{self.num_answered} answers, {self.num_tokens} tokens, {self.num_refused} refusals"


@dataclass(frozen=True, slots=True)
class Agreement:
    """What one service has counted in a run, beside what Locust reports."""

    service: str
    locust: Counts
    counted: Counts
    max_ahead: Counts  # what a service may have done for questions without an answer: broken off, or failed

    @property
    def holds(self) -> bool:
        names = ["num_answered", "num_tokens"]
        if self.service == "gateway":  # what an engine refuses the gateway may give to another one
            names.append("num_refused")
        ahead = self.counted - self.locust
        return all(0 <= getattr(ahead, name) <= getattr(self.max_ahead, name) for name in names)

    def __str__(self) -> str:
        verdict = "agrees" if self.holds else f"DISAGREES beyond {self.max_ahead}"
        return f"{self.service}: {self.counted}: {verdict}"


class Pages:
    """The `/metrics` of a stack, added up by service."""

    def __init__(self, urls: Sequence[str]) -> None:
        """Raises `UnavailableError` where a page cannot be read, or where none of them is a gateway's."""
        self._urls = urls
        names = {sample.name for sample in self._samples()}
        self._prefixes = {
            service: prefix for service, prefix in _PREFIXES.items() if f"{prefix}generation_tokens_total" in names
        }
        if "gateway" not in self._prefixes:
            raise UnavailableError(f"no counters of a gateway at {', '.join(urls)}: name their page with --metrics")

    def counts(self) -> dict[str, Counts]:
        """By service."""
        samples = self._samples()
        return {
            service: Counts(
                num_answered=_total(samples, f"{prefix}request_success_total", _ANSWERED),
                num_tokens=_total(samples, f"{prefix}generation_tokens_total"),
                num_refused=_total(samples, f"{prefix}request_failure_total", _REFUSED),
            )
            for service, prefix in self._prefixes.items()
        }

    def wait_until_idle(self) -> None:
        """Until no generation runs or waits. Raises `UnavailableError` where there still is one after a minute."""
        end = time.monotonic() + _IDLE_SECONDS
        while self._is_busy():
            if time.monotonic() > end:
                raise UnavailableError(
                    f"generations still run after {_IDLE_SECONDS:.0f} s: let nobody else use the stack"
                )
            time.sleep(_POLL_SECONDS)

    def _is_busy(self) -> bool:
        samples = self._samples()
        return any(
            _total(samples, f"{prefix}num_requests_{state}") for prefix in self._prefixes.values() for state in _STATES
        )

    def _samples(self) -> list[Sample]:
        return [sample for url in self._urls for sample in _samples_of(url)]


def _samples_of(url: str) -> list[Sample]:
    page = read_page(url)
    try:
        return [sample for family in text_string_to_metric_families(page.decode()) for sample in family.samples]
    except ValueError:
        raise UnavailableError(f"{url} is no page of counters: name those of gateway and engines") from None


def _total(samples: Sequence[Sample], name: str, values: frozenset[str] | None = None) -> int:
    """Of all labels, or of those with one of the values."""
    return round(
        sum(
            sample.value
            for sample in samples
            if sample.name == name and (values is None or not values.isdisjoint(sample.labels.values()))
        )
    )


def read_page(url: str, headers: Mapping[str, str] | None = None) -> bytes:
    """Raises `UnavailableError`."""
    try:
        with _DIRECT.open(urllib.request.Request(url, headers=dict(headers or {})), timeout=_READ_SECONDS) as response:
            return bytes(response.read())
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(f"{url} cannot be read: {error}") from None
