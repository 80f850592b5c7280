"""What scripts/compose_test.sh asks of a running stack: one check a call, an exit status, one line.

python scripts/compose_checks.py page|generate|heads|engines|prometheus URL ...
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_WAIT_SECONDS = 120.0
_ANSWER_SECONDS = 180.0
_PIP_SETTINGS = ("index-url", "extra-index-url", "find-links", "trusted-host", "default-timeout")


class CheckError(Exception):
    """What was expected, and what came."""


def _get(url: str) -> str:
    with _DIRECT.open(url, timeout=10.0) as response:
        return str(response.read(), "utf-8")


def _wait(what: str, look: Callable[[], Any]) -> Any:
    """What `look` gives as soon as it is true. Raises `CheckError` with what it gave last."""
    end = time.monotonic() + _WAIT_SECONDS
    while not (seen := look()):
        if time.monotonic() > end:
            raise CheckError(f"{what}: not within {_WAIT_SECONDS:.0f} s")
        time.sleep(0.5)
    return seen


def page(options: argparse.Namespace) -> str:
    """The built page and what it loads."""
    html = _get(f"{options.url}/")
    assets = [part.split('"')[0] for part in html.split('="/assets/')[1:]]
    if not assets:
        raise CheckError(f"the page names no assets: {html[:200]}")
    sizes = [len(_get(f"{options.url}/assets/{asset}")) for asset in assets]
    return f"page of {len(html)} characters, {len(assets)} assets of {sum(sizes)}"


def generate(options: argparse.Namespace) -> str:
    """A generation over the WebSocket, with trees, up to its terminal message."""
    wanted = {
        "messages": [{"role": "user", "content": "Name five fruits and five colours."}],
        "max_tokens": options.tokens,
        "ignore_eos": True,
        "tree_debug": True,
    }
    with connect(f"{options.url.replace('http', 'ws', 1)}/generate_stream", proxy=None) as socket:
        socket.send(json.dumps(wanted))
        num_trees = 0
        while True:
            message = json.loads(socket.recv(timeout=_ANSWER_SECONDS))
            num_trees += bool(message.get("tree_debug", {}).get("candidates"))
            if message["type"] in ("finished", "error"):
                break
    if message["type"] == "error":
        raise CheckError(f"generation: {message}")
    usage, speculative = message["usage"], message["metrics"]["speculative_decoding"]
    if usage["completion_tokens"] != options.tokens:
        raise CheckError(f"generation: {usage['completion_tokens']} tokens instead of {options.tokens}")
    if num_trees == 0:
        raise CheckError("generation: not one tree")
    return (
        f"{usage['completion_tokens']} tokens in {speculative['num_spec_steps']} speculative steps, {num_trees} trees"
    )


def _engines(url: str) -> list[dict[str, Any]]:
    return list(json.loads(_get(f"{url}/info"))["engines"])


def heads(options: argparse.Namespace) -> str:
    """The engine serves heads NAME@VERSION."""
    _wait(
        f"heads {options.name}",
        lambda: [engine for engine in _engines(options.url) if engine["heads"]["current"] == options.name],
    )
    return f"the engine serves {options.name}"


def engines(options: argparse.Namespace) -> str:
    """So many engines are known, and ready."""
    _wait(
        f"{options.count} engines ready",
        lambda: [engine["state"] for engine in _engines(options.url)] == ["ready"] * options.count,
    )
    return f"{options.count} engines ready"


def prometheus(options: argparse.Namespace) -> str:
    """Every target is up, the engine's and the gateway's metrics are there, and no alert fires."""

    def ask(query: str) -> list[dict[str, Any]]:
        answer = json.loads(_get(f"{options.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"))
        return list(answer["data"]["result"])

    def all_up() -> bool:
        return {sample["metric"]["job"] for sample in ask("up == 1")} == {"gateway", "engine", "prometheus"}

    _wait("targets up", all_up)
    tokens = _wait("tokens counted", lambda: ask("sum(gorgon:generation_tokens_total) > 0"))
    return f"all targets up, {float(tokens[0]['value'][1]):.0f} tokens counted"


def pip_configuration(options: argparse.Namespace) -> str:
    """Write pip's settings of this machine, and the local folders that they name, for an image to be made of them."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        name = name.removeprefix(":env:.").removeprefix("global.").removeprefix("install.")
        if name in _PIP_SETTINGS:
            settings.setdefault(name, []).extend(value.strip("'\"").replace("\\n", " ").split())
    root = Path(options.folder)
    lines = ["[global]", "cert = /etc/ssl/certs/ca-certificates.crt"]
    for name, values in settings.items():
        kept = [value for value in dict.fromkeys(values) if not value.startswith("file:")]
        if kept:
            lines.append(f"{name} = {' '.join(kept if name in ('find-links', 'extra-index-url') else kept[-1:])}")
        for place in filter(lambda value: Path(value).is_absolute(), kept):
            shutil.copytree(place, root / Path(place).relative_to("/"), dirs_exist_ok=True)
    (root / "etc").mkdir(parents=True, exist_ok=True)
    (root / "etc" / "pip.conf").write_text("\n".join(lines) + "\n")
    return f"pip's settings: {', '.join(settings) or 'none'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, check in (("page", page), ("generate", generate), ("heads", heads), ("engines", engines),
                        ("prometheus", prometheus)):  # fmt: skip
        command = commands.add_parser(name, help=check.__doc__)
        command.add_argument("url")
        command.set_defaults(check=check)
        if check is generate:
            command.add_argument("--tokens", type=int, default=64)
        elif check is heads:
            command.add_argument("name")
        elif check is engines:
            command.add_argument("count", type=int)
    command = commands.add_parser("pip-configuration", help=pip_configuration.__doc__)
    command.add_argument("folder")
    command.set_defaults(check=pip_configuration)
    options = parser.parse_args()
    try:
        print(f"  ok: {options.check(options)}", flush=True)
    except (CheckError, OSError, TimeoutError) as error:
        print(f"  failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
