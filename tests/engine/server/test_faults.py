"""Whatever happens, each request ends with exactly one terminal message, and the engine is empty in the end."""

import asyncio
import random
import threading
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import BackboneOptions
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.engine import Engine, EngineConfig, LoadedParts, load_parts
from gorgon_engine.server.conversion import to_engine_request
from gorgon_engine.server.generation import Generation
from gorgon_engine.server.generations import Generations
from gorgon_engine.server.loader import engine_config
from gorgon_engine.server.metrics import EngineMetrics
from gorgon_engine.server.settings import EngineSettings
from gorgon_engine.server.worker import EngineWorker, LoadProgress, StepReport
from gorgon_protocol.errors import GorgonError, SlowReaderError, UnavailableError
from gorgon_protocol.messages import MESSAGE, ErrorMessage, FinishedMessage, Message, TokenMessage
from gorgon_protocol.requests import EngineRequest

SLOTS, WAITING = 3, 4


class FaultyBackbone:
    """The real one, which fails at chosen passes."""

    def __init__(self, backbone: Backbone, faults: frozenset[int] = frozenset()) -> None:
        self._backbone = backbone
        self.faults = faults
        self.num_passes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.num_passes += 1
        if self.num_passes in self.faults:
            raise RuntimeError(f"pass {self.num_passes} failed")
        return self._backbone.forward(*arguments, **options)


@pytest.fixture(scope="module")
def parts(tiny_model: Path) -> LoadedParts:
    import torch

    config = EngineConfig(model=str(tiny_model), backbone=BackboneOptions(dtype=torch.float32))
    return load_parts(config)


def make_engine(parts: LoadedParts, faults: frozenset[int], **options: Any) -> Engine:
    config = EngineConfig(adaptive=False, num_slots=SLOTS, max_waiting=WAITING, context=96, **options)
    backbone: Any = FaultyBackbone(parts.backbone, faults)
    return Engine(backbone=backbone, tokenizer=parts.tokenizer, drafters=[NgramDrafter()], config=config)


@dataclass
class Listener:
    """What the service is to a worker, as far as generations go."""

    generations: Generations | None = None
    is_loaded: asyncio.Event = field(default_factory=asyncio.Event)
    last: StepReport | None = None
    broke: BaseException | None = None

    def loading(self, stage: str, progress: float) -> None: ...

    def loaded(self, engine: Engine) -> None:
        self.is_loaded.set()

    def load_failed(self, error: Exception) -> None:
        raise AssertionError("nothing is loaded here") from error

    def stepped(self, report: StepReport) -> None:
        self.last = report
        assert self.generations is not None
        self.generations.stepped(report)

    def broken(self, error: BaseException) -> None:
        self.broke = error
        assert self.generations is not None
        self.generations.cut_all(UnavailableError("the engine broke"))


@dataclass(frozen=True)
class Plan:
    """What happens to one request."""

    after_messages: int  # what the client waits for before it acts
    action: str  # "read", "leave", "cut"
    max_tokens: int
    pause: int  # turns of the loop between two reads: slow ones find merged messages
    timeout_seconds: float | None


PLANS = st.builds(
    Plan,
    after_messages=st.integers(0, 6),
    action=st.sampled_from(["read", "read", "leave", "cut"]),
    max_tokens=st.integers(1, 40),
    pause=st.integers(0, 20),
    timeout_seconds=st.sampled_from([None, None, 1e-6, 60.0]),
)


def metrics() -> EngineMetrics:
    def zero() -> float:
        return 0.0

    return EngineMetrics(num_running=zero, num_waiting=zero, kv_cache_usage=zero, is_ready=zero)


async def client(generations: Generations, engine: Engine, number: int, plan: Plan) -> list[Message] | GorgonError:
    """The messages of a request up to its end, however it came about."""
    wire = EngineRequest(
        prompt="the cat sat on the mat" * (1 + number % 3),
        request_id=f"r{number}",
        seed=number,
        max_tokens=plan.max_tokens,
        temperature=0.7 * (number % 2),
        ignore_eos=True,
        tree_debug=number % 3 == 0,
        timeout_seconds=plan.timeout_seconds,
    )
    try:
        generation = await generations.submit(wire, to_engine_request(engine, wire))
    except GorgonError as error:
        return error
    messages: list[Message] = []
    while lines := await generation.take_lines():
        messages += [MESSAGE.validate_json(line) for line in lines.splitlines()]
        if len(messages) >= plan.after_messages:
            act(generations, generation, plan)
        for _ in range(plan.pause):
            await asyncio.sleep(0)
    generations.reader_left(generation)
    return messages


def act(generations: Generations, generation: Generation, plan: Plan) -> None:
    if plan.action == "leave":
        generations.reader_left(generation)
    elif plan.action == "cut":
        generations.cut(generation, SlowReaderError("too slow"))


def check(outcomes: list[list[Message] | GorgonError], plans: list[Plan]) -> None:
    for plan, messages in zip(plans, outcomes, strict=True):
        if isinstance(messages, GorgonError):
            assert messages.code in ("queue_full", "unavailable")
            continue
        ends = [m for m in messages if isinstance(m, FinishedMessage | ErrorMessage)]
        assert len(ends) == 1
        assert messages[-1] is ends[0]
        said = sum(len(m.token_ids) for m in messages if isinstance(m, TokenMessage))
        assert said <= plan.max_tokens
        if isinstance(ends[0], FinishedMessage):
            assert ends[0].usage.completion_tokens == said
            assert plan.action != "read" or said == plan.max_tokens


@settings(max_examples=60, deadline=None)
@given(
    plans=st.lists(PLANS, min_size=1, max_size=10),
    faults=st.frozensets(st.integers(1, 40), max_size=4),
    drained_after=st.one_of(st.none(), st.integers(0, 30)),
    swaps=st.booleans(),
)
def test_each_request_has_one_end(
    parts: LoadedParts, plans: list[Plan], faults: frozenset[int], drained_after: int | None, swaps: bool
) -> None:
    async def scenario() -> None:
        engine = make_engine(parts, faults)
        listener = Listener()
        worker = EngineWorker(lambda progress: engine, listener)
        listener.generations = generations = Generations(
            engine, worker, metrics=metrics(), max_messages=2, heads=lambda: None
        )
        worker.start()
        async with asyncio.timeout(60.0):
            await listener.is_loaded.wait()
            clients = [
                asyncio.create_task(client(generations, engine, number, plan)) for number, plan in enumerate(plans)
            ]
            if swaps:
                await worker.call(lambda e: e.use_heads(e.prepare_heads(None)))
            if drained_after is not None:
                for _ in range(drained_after):
                    await asyncio.sleep(0)
                generations.cut_all(UnavailableError("stopping"))
            outcomes = await asyncio.gather(*clients)
            await generations.is_idle.wait()
            # What the service ended by itself leaves its slot by the next step.
            while await worker.call(lambda e: e.has_work):
                await asyncio.sleep(0.001)
        worker.stop()
        assert await asyncio.to_thread(worker.join, 60.0)
        assert listener.broke is None
        assert (engine.num_running, engine.num_waiting) == (0, 0)
        check(outcomes, plans)

    asyncio.run(scenario())


def test_an_engine_that_breaks_ends_everybody(parts: LoadedParts) -> None:
    """A step that raises instead of failing its requests is a bug: nobody may wait for ever all the same."""

    async def scenario() -> None:
        engine = make_engine(parts, frozenset())
        step, steps = engine.step, iter(range(100))

        def breaking() -> Any:
            if next(steps) == 3:
                raise RuntimeError("lost")
            return step()

        engine.step = breaking  # type: ignore[method-assign]
        listener = Listener()
        worker = EngineWorker(lambda progress: engine, listener)
        listener.generations = generations = Generations(
            engine, worker, metrics=metrics(), max_messages=2, heads=lambda: None
        )
        worker.start()
        plans = [Plan(0, "read", 40, 0, None) for _ in range(SLOTS + 2)]
        async with asyncio.timeout(60.0):
            outcomes = await asyncio.gather(*(client(generations, engine, n, p) for n, p in enumerate(plans)))
            with pytest.raises(UnavailableError):  # also later ones
                await worker.call(lambda e: e.num_running)
        assert isinstance(listener.broke, RuntimeError)
        for messages in outcomes:
            assert not isinstance(messages, GorgonError)
            assert isinstance(messages[-1], ErrorMessage)
            assert messages[-1].code == "unavailable"

    asyncio.run(scenario())


def failures(counts: EngineMetrics) -> list[str]:
    """The lines of the metric that counts them."""
    return [line for line in counts.render().decode().splitlines() if line.startswith("gorgon:request_failure_total{")]


async def submit(generations: Generations, engine: Engine) -> Generation:
    wire = EngineRequest(prompt="the cat", request_id="r", seed=1, max_tokens=5, ignore_eos=True)
    return await generations.submit(wire, to_engine_request(engine, wire))


def test_a_submission_that_is_given_up_keeps_nobody_waiting(parts: LoadedParts) -> None:
    """Its task is cancelled while the engine may have it already."""

    async def scenario() -> None:
        engine, counts, listener, goes_on = make_engine(parts, frozenset()), metrics(), Listener(), threading.Event()
        worker = EngineWorker(lambda progress: engine, listener)
        listener.generations = generations = Generations(
            engine, worker, metrics=counts, max_messages=2, heads=lambda: None
        )

        def hold(_: Engine) -> None:
            goes_on.wait(60.0)

        worker.send(hold)
        worker.start()
        async with asyncio.timeout(60.0):
            submission = asyncio.create_task(submit(generations, engine))
            await asyncio.sleep(0)
            assert generations.num_open == 1
            submission.cancel()
            with pytest.raises(asyncio.CancelledError):
                await submission
            assert (generations.num_open, generations.is_idle.is_set()) == (0, True)
            goes_on.set()
            while await worker.call(lambda e: e.has_work):  # it was submitted, and is cancelled
                await asyncio.sleep(0.001)
        worker.stop()
        assert await asyncio.to_thread(worker.join, 60.0)
        assert failures(counts) == ['gorgon:request_failure_total{code="internal"} 1.0']

    asyncio.run(scenario())


def test_what_an_engine_that_breaks_has_not_heard_of_is_told_and_counted_once(parts: LoadedParts) -> None:
    """Both its end and the lost submission would say so."""

    async def scenario() -> None:
        engine, counts, listener = make_engine(parts, frozenset()), metrics(), Listener()
        is_in_step, goes_on = threading.Event(), threading.Event()

        def breaking() -> Any:
            is_in_step.set()
            goes_on.wait(60.0)
            raise RuntimeError("lost")

        engine.step = breaking  # type: ignore[method-assign]
        worker = EngineWorker(lambda progress: engine, listener)
        listener.generations = generations = Generations(
            engine, worker, metrics=counts, max_messages=2, heads=lambda: None
        )
        worker.start()
        async with asyncio.timeout(60.0):
            first = await submit(generations, engine)
            assert await asyncio.to_thread(is_in_step.wait, 60.0)
            late = asyncio.create_task(submit(generations, engine))
            await asyncio.sleep(0)
            assert generations.num_open == 2
            goes_on.set()
            for generation in (first, await late):
                end = MESSAGE.validate_json(await generation.take_lines())
                assert isinstance(end, ErrorMessage)
                assert end.code == "unavailable"
                assert await generation.take_lines() == b""
                generations.reader_left(generation)
            assert generations.is_idle.is_set()
        assert failures(counts) == ['gorgon:request_failure_total{code="unavailable"} 2.0']

    asyncio.run(scenario())


def test_a_second_reader_goes_on_where_the_first_stopped(parts: LoadedParts) -> None:
    """As the one that gets the rest when the first was too slow: each line once."""

    async def scenario() -> None:
        engine, listener = make_engine(parts, frozenset()), Listener()
        worker = EngineWorker(lambda progress: engine, listener)
        listener.generations = generations = Generations(
            engine, worker, metrics=metrics(), max_messages=2, heads=lambda: None
        )
        worker.start()
        async with asyncio.timeout(60.0):
            generation = await submit(generations, engine)
            reader = asyncio.create_task(generation.take_lines())
            await asyncio.sleep(0)
            reader.cancel()
            lines = b"".join(
                [part for part in await asyncio.gather(reader, return_exceptions=True) if type(part) is bytes]
            )
            while more := await generation.take_lines():
                lines += more
        worker.stop()
        assert await asyncio.to_thread(worker.join, 60.0)
        messages = [MESSAGE.validate_json(line) for line in lines.splitlines()]
        assert sum(len(m.token_ids) for m in messages if isinstance(m, TokenMessage)) == 5
        assert [m.type for m in messages].count("finished") == 1

    asyncio.run(scenario())


def test_a_message_that_cannot_be_made_ends_its_own_request_alone(parts: LoadedParts) -> None:
    async def scenario() -> None:
        engine = make_engine(parts, frozenset())
        listener = Listener()
        worker = EngineWorker(lambda progress: engine, listener)
        listener.generations = generations = Generations(
            engine, worker, metrics=metrics(), max_messages=8, heads=lambda: None
        )
        broken = generations._take_tokens

        def refuse(event: Any, generation: Generation, at: float) -> None:
            if generation.request_id == "r1":
                raise ValueError("cannot be said")
            broken(event, generation, at)

        generations._take_tokens = refuse  # type: ignore[method-assign]
        worker.start()
        plans = [Plan(0, "read", 10, 0, None) for _ in range(3)]
        async with asyncio.timeout(60.0):
            outcomes = await asyncio.gather(*(client(generations, engine, n, p) for n, p in enumerate(plans)))
        worker.stop()
        assert await asyncio.to_thread(worker.join, 60.0)
        ends = [messages[-1] for messages in outcomes if not isinstance(messages, GorgonError)]
        assert [end.type for end in ends] == ["finished", "error", "finished"]
        assert isinstance(ends[1], ErrorMessage)
        assert ends[1].code == "internal"

    asyncio.run(scenario())


def test_real_clients_in_disorder(serve: Any) -> None:
    """Over sockets: readers, leavers and half-readers at once, while passes of the model fail."""
    chance = random.Random(5)

    def load(options: EngineSettings, progress: LoadProgress) -> Engine:
        config = engine_config(options)
        parts = load_parts(config)
        faults = frozenset(chance.sample(range(20, 400), 8))
        backbone: Any = FaultyBackbone(parts.backbone, faults)
        return Engine.of_parts(replace(parts, backbone=backbone), config)

    with serve(load, num_slots=4, max_waiting=100) as running:
        running.wait_until_ready()
        behaviours = [chance.choice(["read", "read", "leave"]) for _ in range(40)]
        outcomes: dict[int, list[str]] = {}

        def one(number: int) -> None:
            body = {"prompt": "the cat", "request_id": f"r{number}", "seed": number, "ignore_eos": True}
            body |= {"max_tokens": 60, "temperature": 0.8}
            url = f"{running.url}/generate"
            with httpx.stream("POST", url, json=body, trust_env=False, timeout=60.0) as response:
                lines = []
                for line in response.iter_lines():
                    lines.append(line)
                    if behaviours[number] == "leave" and len(lines) == 3:
                        return
                outcomes[number] = lines

        threads = [threading.Thread(target=partial(one, number)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        assert sorted(outcomes) == [n for n, b in enumerate(behaviours) if b == "read"]
        codes = set()
        for lines in outcomes.values():
            messages = [MESSAGE.validate_json(line) for line in lines]
            ends = [m for m in messages if isinstance(m, FinishedMessage | ErrorMessage)]
            assert len(ends) == 1
            assert messages[-1] is ends[0]
            if isinstance(ends[0], ErrorMessage):
                codes.add(ends[0].code)
        assert codes == {"internal"}, "some passes failed, and nothing else went wrong"
        running.wait_for(lambda: running.info()["num_running"] == running.info()["num_waiting"] == 0)
        assert running.service._generations.num_open == 0
        assert running.client.get("/ready").status_code == 200
