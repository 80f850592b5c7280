"""More clients than places: some wait, the rest are told to come back, nobody is forgotten."""

import asyncio
from pathlib import Path

import aiohttp

from support.services import engine_service, gateway_service

NUM_CLIENTS, NUM_SLOTS, NUM_WAITING = 200, 4, 50
NUM_TOKENS = 150  # an answer lasts longer than all the clients take to ask


def test_two_hundred_clients_on_a_queue_of_fifty(tiny: Path) -> None:
    async def ask(session: aiohttp.ClientSession, url: str, number: int) -> tuple[int, str | None, int]:
        payload = {"prompt": f"cat {number}", "max_tokens": NUM_TOKENS, "ignore_eos": True}
        async with session.post(f"{url}/generate", json=payload) as response:
            answer = await response.json()
            if response.status == 200:
                return 200, None, len(answer["token_ids"])
            assert answer["error"]["code"] == "queue_full", answer
            return response.status, response.headers.get("Retry-After"), 0

    async def all_at_once(url: str) -> list[tuple[int, str | None, int]]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            return await asyncio.gather(*(ask(session, url, number) for number in range(NUM_CLIENTS)))

    with (
        engine_service(model=tiny, num_slots=NUM_SLOTS, max_waiting=NUM_WAITING, ready=False) as engine,
        gateway_service(engine) as gateway,
    ):
        answers = asyncio.run(all_at_once(gateway.url))
        info = engine.get("/info")
        assert (info["num_running"], info["num_waiting"]) == (0, 0)
    served = [answer for answer in answers if answer[0] == 200]
    refused = [answer for answer in answers if answer[0] == 429]
    assert len(served) + len(refused) == NUM_CLIENTS
    assert len(served) >= NUM_SLOTS + NUM_WAITING
    assert refused, "the queue was never full"
    assert all(tokens == NUM_TOKENS for _, _, tokens in served)
    assert all(retry is not None and float(retry) >= 1 for _, retry, _ in refused)
