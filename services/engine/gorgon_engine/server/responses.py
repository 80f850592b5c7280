"""A generation as an HTTP response: lines of JSON as they come, and what happens to a reader that is slow or gone."""

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gorgon_engine.server.generation import Generation
from gorgon_engine.server.logs import logger
from gorgon_engine.server.protocol import abort_connection, unbuffered
from gorgon_engine.server.service import EngineService
from gorgon_protocol.errors import GorgonError, SlowReaderError

NDJSON = "application/x-ndjson"


class MessagesResponse(Response):
    """Streams a generation's messages; the connection's end is the request's."""

    def __init__(self, service: EngineService, generation: Generation) -> None:
        super().__init__(
            media_type=NDJSON, headers={"X-Request-Id": generation.request_id, "Cache-Control": "no-store"}
        )
        del self.headers["content-length"]
        self._service = service
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, generation = self._service, self._generation
        watcher = asyncio.create_task(_disconnected(receive))
        watcher.add_done_callback(lambda _: service.reader_left(generation))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if not (await self._send_lines(send) and await self._send_end(scope, send)):
                logger().warning("reader_cut_off", request_id=generation.request_id, client=generation.client or None)
                abort_connection(scope)
                await watcher
        finally:
            watcher.cancel()

    async def _send_lines(self, send: Send) -> bool:
        """Whether all of them could be sent."""
        limit = self._service.settings.slow_reader_seconds
        try:
            while lines := await self._generation.take_lines():
                try:
                    async with asyncio.timeout(limit):
                        await send({"type": "http.response.body", "body": lines, "more_body": True})
                except TimeoutError:
                    return await self._send_rest(lines, send, limit)
        except Exception as error:  # a message that cannot be written
            logger().error("stream_failed", request_id=self._generation.request_id, exc_info=error)
            self._service.cut(self._generation, GorgonError("the engine failed to report on this request: see its log"))
            raise
        return True

    async def _send_rest(self, unsent: bytes, send: Send, limit: float) -> bool:
        """The reader stood still for too long: it gets what there is and the end, if it ever reads again. The end is
        an error unless the generation was over already.

        unsent: lines of which nothing was written; uvicorn waits for room before it writes, never behind it.
        """
        error = SlowReaderError(
            f"the stream was not read for {limit:g} seconds: read faster, or ask without tree_debug"
        )
        self._service.cut(self._generation, error)
        while lines := await self._generation.take_lines():
            unsent += lines
        try:
            async with asyncio.timeout(limit):
                await send({"type": "http.response.body", "body": unsent, "more_body": True})
        except TimeoutError:
            return False
        return True

    async def _send_end(self, scope: Scope, send: Send) -> bool:
        """As `_send_lines`: behind a long last message the reader may stand still as well. Returns when nothing is
        left in this process, which may end then."""
        try:
            with unbuffered(scope):
                async with asyncio.timeout(self._service.settings.slow_reader_seconds):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            return False
        return True


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone, or the response is complete."""
    while (await receive())["type"] != "http.disconnect":
        pass
