"""Options of the training commands that say where Prometheus finds their metrics."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from gorgon_protocol.environment import refuse_unknown

if TYPE_CHECKING:
    from gorgon_trainer.metrics import TrainerMetrics

F = TypeVar("F", bound=Callable[..., Any])

PREFIX: Final = "GORGON_TRAINER_"
_RANK: Final = "RANK"  # as torchrun tells its processes


@dataclass(frozen=True, slots=True)
class MetricsOptions:
    metrics_port: int | None
    metrics_host: str
    metrics_linger_seconds: float

    @contextmanager
    def served(self) -> Iterator["TrainerMetrics | None"]:
        """The job's metrics, at their port while inside; None without a port, and on all but torchrun's first process.

        Raises `BadRequestError` for a port that cannot be had, or a variable that nobody reads.
        """
        refuse_unknown(os.environ, prefix=PREFIX, fields=MetricsOptions.__dataclass_fields__, service="trainer")
        if self.metrics_port is None or os.environ.get(_RANK, "0") != "0":
            yield None
            return
        from gorgon_trainer.metrics import TrainerMetrics
        from gorgon_trainer.metrics_server import MetricsServer

        metrics = TrainerMetrics()
        with MetricsServer(metrics, self.metrics_host, self.metrics_port) as server:
            click.echo(f"gorgon: metrics: listening on {server.url}", err=True)
            try:
                yield metrics
            except click.ClickException:  # mistyped: nothing has been done
                raise
            except Exception:
                metrics.ended("failed")
                server.wait_for_scrape(self.metrics_linger_seconds)
                raise
            metrics.ended("finished")
            server.wait_for_scrape(self.metrics_linger_seconds)


def metrics_options(command: F) -> F:
    """Where to listen for Prometheus; the command gets it as `metrics`, a `MetricsOptions`."""

    @wraps(command)
    def wrapper(*args: Any, **values: Any) -> Any:
        metrics = MetricsOptions(**{name: values.pop(name) for name in MetricsOptions.__dataclass_fields__})
        return command(*args, metrics=metrics, **values)

    decorated: Any = wrapper
    for option in (
        click.option("--metrics-linger", "metrics_linger_seconds", envvar=f"{PREFIX}METRICS_LINGER_SECONDS",
                     show_envvar=True, type=click.FloatRange(0.0, 3600.0), default=0.0, show_default=True,
                     metavar="S", help="At the end, wait so long for Prometheus to read how it ended."),
        click.option("--metrics-host", envvar=f"{PREFIX}METRICS_HOST", show_envvar=True, default="127.0.0.1",
                     show_default=True, metavar="ADDRESS", help="Address of the metrics port."),
        click.option("--metrics-port", envvar=f"{PREFIX}METRICS_PORT", show_envvar=True,
                     type=click.IntRange(0, 65535), metavar="PORT",
                     help="Tell Prometheus there how it goes (/metrics); 0 takes a free one. Default: nowhere."),
    ):  # fmt: skip
        decorated = option(decorated)
    return decorated
