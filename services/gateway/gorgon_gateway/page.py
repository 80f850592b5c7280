"""The page: what `web/` was built to, at `/` and `/assets/*`.

The built files lie beside this module, or where `GORGON_GATEWAY_WEB_ROOT` says. Assets carry a hash of their content in
their names: browsers keep them for good, and ask for the page itself each time.
"""

import os
import re
from pathlib import Path
from typing import Final

import anyio
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from gorgon_gateway.settings import PREFIX
from gorgon_protocol.errors import BadRequestError

ASSETS: Final = "/assets"
BUILT: Final = Path(__file__).with_name("static")
_INDEX: Final = "index.html"
_REVALIDATE: Final = {"Cache-Control": "no-cache"}
_FOR_GOOD: Final = "public, max-age=31536000, immutable"
_NOT_BUILT: Final = """<!doctype html>
<html lang="en">
  <head><meta charset="utf-8"><title>Gorgon</title><link rel="icon" href="data:,"></head>
  <body>
    <h1>Gorgon</h1>
    <p>The gateway runs; its page was not built. Build it with <code>make web</code> and load this again.</p>
    <p>The API is served: <a href="/health/ready">/health/ready</a>, <a href="/openapi.json">/openapi.json</a>.</p>
  </body>
</html>
"""


def page_routes(web_root: Path | None) -> list[BaseRoute]:
    """web_root: a folder with a built page; None: the one beside this module, which may come while the gateway runs.
    Raises `BadRequestError` where a given one holds no page."""
    if web_root is not None and not (web_root / _INDEX).is_file():
        raise BadRequestError(f"{PREFIX}WEB_ROOT: {web_root}: holds no {_INDEX}: build the page with `make web`")
    root = BUILT if web_root is None else web_root

    async def page(_: Request) -> Response:
        index = root / _INDEX
        if not await anyio.Path(index).is_file():
            return HTMLResponse(_NOT_BUILT, headers=_REVALIDATE)
        return FileResponse(index, headers=_REVALIDATE)

    return [Route("/", page), Mount(ASSETS, _Assets(root / ASSETS.strip("/")))]


class _Assets(StaticFiles):
    """Files that never change; as the `.gz` beside them where there is one and the browser takes it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(directory=folder, check_dir=False)

    async def check_config(self) -> None:
        """The folder may be missing: then nothing is found in it."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        zipped = Path(f"{os.fspath(full_path)}.gz")
        is_zipped = _takes_gzip(Headers(scope=scope)) and zipped.is_file()
        if is_zipped:  # "a.js.gz" has the media type of "a.js"
            response = super().file_response(zipped, zipped.stat(), scope, status_code)
            response.headers["Content-Encoding"] = "gzip"
        else:
            response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers["Cache-Control"] = _FOR_GOOD
        response.headers["Vary"] = "Accept-Encoding"
        return response


def _takes_gzip(headers: Headers) -> bool:
    """Whether `Accept-Encoding` names gzip, and not with a weight of 0."""
    for coding in headers.get("accept-encoding", "").split(","):
        name, _, weight = coding.partition(";")
        if name.strip().lower() == "gzip":
            return re.fullmatch(r"\s*q=0(\.0*)?\s*", weight) is None
    return False
