"""The scheduler under every order of events: each request ends exactly once, and says what it would have said alone."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.acceptance import AcceptanceRule
from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.engine import Engine
from gorgon_engine.events import FailedEvent, TokenEvent
from gorgon_engine.heads.eagle import EagleShape
from gorgon_engine.heads.native import pack_eagle_for_cpu
from gorgon_engine.prepared import PreparedHeads
from gorgon_engine.recording import RepeatingRecorder
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import FinishReason, Request, SpeculationParams
from gorgon_protocol.errors import BadRequestError, DeadlineError, QueueFullError
from support.drafters import RandomDrafter
from support.eagle import make_head
from support.engines import (
    TINY_VOCAB,
    Answer,
    FaultyBackbone,
    run_all,
    take_all,
    tiny_backbone,
    tiny_engine,
    tiny_folder,
)

NUM_SLOTS, MAX_WAITING = 3, 4
PLAIN = SpeculationParams(enabled=False)
TYPICAL = SpeculationParams(acceptance=AcceptanceRule.TYPICAL)
LONG = [number % 40 + 30 for number in range(70)]
KINDS: list[tuple[list[int], SamplingParams, SpeculationParams]] = [
    ([5], SamplingParams(max_tokens=9), SpeculationParams()),
    ([70, 71, 72, 70, 71, 72, 70], SamplingParams(max_tokens=20, temperature=0.9, seed=1), SpeculationParams()),
    (LONG, SamplingParams(max_tokens=12, ignore_eos=True), SpeculationParams(max_nodes=3)),
    ([300, 8, 8, 8], SamplingParams(max_tokens=1), SpeculationParams()),
    (list(range(60)), SamplingParams(max_tokens=15, temperature=1.0, top_p=0.7, seed=2), PLAIN),
    ([9, 10], SamplingParams(max_tokens=18, temperature=0.7, repetition_penalty=1.4, seed=3), SpeculationParams()),
    ([9, 10, 11], SamplingParams(max_tokens=14, frequency_penalty=0.9, logit_bias={40: 3.0}), PLAIN),
    ([44, 45], SamplingParams(max_tokens=16, temperature=1.0, seed=4, logprobs=2), SpeculationParams(max_nodes=1)),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("scheduler") / "tiny")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return tiny_backbone(folder)


@pytest.fixture(scope="module")
def drafter_sets(backbone: Backbone) -> list[PreparedHeads]:
    """Nothing, lookups, wrong guesses, and two that remember."""
    config = backbone.config
    sizes = (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size)

    def eagle(seed: int) -> EagleDrafter:
        head = pack_eagle_for_cpu(make_head(EagleShape(*sizes, num_heads=3), seed=seed), backbone)
        return EagleDrafter(head, embed=backbone.embed, project=backbone.project)

    return [
        PreparedHeads((), None),
        PreparedHeads((NgramDrafter(),), None),
        PreparedHeads((NgramDrafter(), RandomDrafter(TINY_VOCAB)), None),
        PreparedHeads((eagle(1), NgramDrafter()), None),
        PreparedHeads((eagle(2),), None),
    ]


@pytest.fixture(scope="module")
def alone(folder: Path, backbone: Backbone) -> list[list[int]]:
    """What each kind of request says when nobody else is there, decoded plainly."""
    engine = tiny_engine(folder, backbone, (), num_slots=1)
    return [run_all(engine, [engine.request(p, sampling, PLAIN)])[0].token_ids for p, sampling, _ in KINDS]


# Steps as they are, and as recordings: each read before the next is launched, or behind it.
STEPS: dict[str, dict[str, object]] = {
    "eager": {},
    "recorded": {"recorder": RepeatingRecorder(), "run_ahead": False},
    "ahead": {"recorder": RepeatingRecorder(), "run_ahead": True},
}


@pytest.fixture(scope="module", params=STEPS)
def steps(request: pytest.FixtureRequest) -> dict[str, object]:
    return STEPS[request.param]


def make_engine(folder: Path, backbone: Backbone, prepared: PreparedHeads, **options: Any) -> Engine:
    defaults: dict[str, Any] = {
        "num_slots": NUM_SLOTS,
        "max_waiting": MAX_WAITING,
        "max_nodes": 12,
        "chunk_size": 24,
    }
    return tiny_engine(folder, backbone, prepared.drafters, **(defaults | options))


@dataclass
class Schedule:
    """Does what hypothesis tells it, and keeps count."""

    engine: Engine
    backbone: FaultyBackbone
    drafter_sets: list[PreparedHeads]
    answers: dict[str, Answer] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    num_refused: int = 0

    def submit(self, kind: int, cut: int, expected: list[int], client: str, *, hasty: bool) -> None:
        prompt, sampling, speculation = KINDS[kind]
        request = self.engine.request(
            prompt,
            sampling,
            speculation,
            generated=expected[: min(cut, len(expected))],
            client=client,
            timeout_seconds=1e-9 if hasty else None,
        )
        try:
            self.engine.submit(request)
        except QueueFullError:
            self.num_refused += 1
            return
        self.answers[request.id], self.kinds[request.id] = Answer(), kind

    def step(self) -> None:
        take_all(self.answers, self.engine.step())


ACTIONS = ["submit"] * 5 + ["step"] * 6 + ["cancel", "swap", "fault", "abort"]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_request_ends_once_and_says_what_it_would_alone(
    folder: Path,
    backbone: Backbone,
    drafter_sets: list[PreparedHeads],
    alone: list[list[int]],
    steps: dict[str, object],
    data: st.DataObject,
) -> None:
    faulty = FaultyBackbone(backbone)
    engine = make_engine(folder, faulty, data.draw(st.sampled_from(drafter_sets)), **steps)
    schedule = Schedule(engine, faulty, drafter_sets)
    for action in data.draw(st.lists(st.sampled_from(ACTIONS), min_size=5, max_size=50)):
        if action == "submit":
            kind = data.draw(st.integers(0, len(KINDS) - 1))
            cut = data.draw(st.sampled_from([0, 0, 1, 7, 99]))
            client = data.draw(st.sampled_from("ab"))
            schedule.submit(kind, cut, alone[kind], client, hasty=data.draw(st.integers(0, 5)) == 0)
        elif action == "cancel" and schedule.answers:
            engine.cancel(data.draw(st.sampled_from(sorted(schedule.answers))))
        elif action == "swap":
            engine.use_heads(data.draw(st.sampled_from(drafter_sets)))
        elif action == "fault":
            faulty.faults.append(RuntimeError("out of memory"))
        elif action == "abort":
            take_all(schedule.answers, engine.abort())
            assert not engine.has_work
        else:
            schedule.step()
    while engine.has_work:
        schedule.step()
    assert (engine.num_running, engine.num_waiting, engine.kv_cache_usage) == (0, 0, 0.0)
    for request_id, answer in schedule.answers.items():
        check_answer(answer, alone[schedule.kinds[request_id]])
    faulty.faults.clear()
    request = engine.request(*KINDS[0])
    assert run_all(engine, [request])[0].token_ids == alone[0], "the engine is usable, its slots are free"


def check_answer(answer: Answer, expected: list[int]) -> None:
    assert answer.has_ended
    if answer.failed is not None:
        assert answer.failed.error.code in ("internal", "timeout")
        if answer.failed.error.code == "timeout":
            assert not answer.events
        return
    end = answer.end()
    said = expected[: end.usage.completion_tokens]
    assert said[len(said) - len(answer.token_ids) :] == answer.token_ids
    if end.finish_reason is not FinishReason.CANCELLED:
        assert said == expected


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_all_kinds_at_once_in_any_order(
    folder: Path,
    backbone: Backbone,
    drafter_sets: list[PreparedHeads],
    alone: list[list[int]],
    steps: dict[str, object],
    seed: int,
) -> None:
    """One batch of speculating and plain, penalised and drawn sequences, while the drafters change."""
    chance = random.Random(seed)
    engine = make_engine(folder, backbone, chance.choice(drafter_sets), num_slots=8, max_waiting=99, **steps)
    order = chance.sample(range(len(KINDS)), len(KINDS))
    requests = [engine.request(*KINDS[kind]) for kind in order]
    answers = {request.id: Answer() for request in requests}
    waiting = list(requests)
    while waiting or engine.has_work:
        for _ in range(min(chance.randrange(5), len(waiting))):
            engine.submit(waiting.pop(0))
        if chance.random() < 0.15:
            engine.use_heads(chance.choice(drafter_sets))
        take_all(answers, engine.step())
    for kind, answer in zip(order, answers.values(), strict=True):
        assert answer.token_ids == alone[kind]


def test_everything_but_another_rule_shares_a_pass(
    folder: Path, backbone: Backbone, drafter_sets: list[PreparedHeads], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(folder, backbone, drafter_sets[1], num_slots=8, chunk_size=512)
    sizes: list[int] = []
    launch = engine._step.launch

    def counted(batch, *arguments, **options):  # type: ignore[no-untyped-def]
        sizes.append(len(batch.slots))
        return launch(batch, *arguments, **options)

    monkeypatch.setattr(engine._step, "launch", counted)
    prompt = [70, 71, 72, 70, 71, 72, 70]
    for sampling in (
        SamplingParams(ignore_eos=True),
        SamplingParams(temperature=1.0, top_p=0.9, ignore_eos=True),
        SamplingParams(repetition_penalty=1.2, ignore_eos=True),
        SamplingParams(logprobs=1, ignore_eos=True),
    ):
        for speculation in (SpeculationParams(), PLAIN):
            engine.submit(engine.request(prompt, sampling, speculation))
    engine.step()
    (*_,) = engine.step()
    assert sizes == [8]
    events = [event for event in engine.step() if isinstance(event, TokenEvent)]
    assert {event.batch_size for event in events} == {8}
    engine.abort()
    for speculation in (SpeculationParams(), PLAIN, TYPICAL, SpeculationParams(False, acceptance=TYPICAL.acceptance)):
        engine.submit(engine.request(prompt, SamplingParams(ignore_eos=True), speculation))
    engine.step()
    sizes.clear()
    engine.step()
    assert sorted(sizes) == [1, 3], "who never drafts has no rule of its own"
    engine.abort()


def test_only_who_asks_pays_for_reports(
    folder: Path, backbone: Backbone, drafter_sets: list[PreparedHeads], steps: dict[str, object]
) -> None:
    engine = make_engine(folder, backbone, drafter_sets[1], **steps)
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    two = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=2)
    five = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=5)
    prompt = [70, 71, 72, 70]
    requests = [
        engine.request(prompt, sampling),
        engine.request(prompt, two),
        engine.request(prompt, five, trace=True),
    ]
    plain, with_two, with_five = run_all(engine, requests)
    assert plain.token_ids == with_two.token_ids == with_five.token_ids
    for event in plain.events:
        assert (event.logprobs, event.trace) == (None, None)
    for answer, count in ((with_two, 2), (with_five, 5)):
        for event in answer.events:
            assert event.logprobs is not None
            assert [entry.token for entry in event.logprobs] == event.token_ids
            assert {len(entry.top) for entry in event.logprobs} == {count}
    assert all(event.trace is None for event in with_two.events)
    assert all(event.trace is not None for event in with_five.events)


def test_the_queue_is_bounded_and_a_free_slot_is_no_place_in_it(
    folder: Path, backbone: Backbone, drafter_sets: list[PreparedHeads]
) -> None:
    engine = make_engine(folder, backbone, drafter_sets[0])
    requests = [engine.request([5], SamplingParams(max_tokens=4, ignore_eos=True)) for _ in range(8)]
    for request in requests[: NUM_SLOTS + MAX_WAITING]:
        engine.submit(request)
    with pytest.raises(QueueFullError, match="7 requests wait already") as caught:
        engine.submit(requests[-1])
    assert caught.value.retry_after_seconds
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (NUM_SLOTS, MAX_WAITING)
    assert engine.kv_cache_usage > 0.0
    with pytest.raises(QueueFullError, match="4 requests wait already"):
        engine.submit(requests[-1])
    while engine.has_work:
        engine.step()
    assert len(run_all(engine, requests[-1:])[0].token_ids) == 4


def test_an_id_in_use_is_refused(folder: Path, backbone: Backbone, drafter_sets: list[PreparedHeads]) -> None:
    engine = make_engine(folder, backbone, drafter_sets[0])
    request = engine.request([5], SamplingParams(max_tokens=3), request_id="mine")
    engine.submit(request)
    with pytest.raises(BadRequestError, match="request id mine is in use"):
        engine.submit(request)
    engine.abort()
    assert run_all(engine, [request])[0].finished


def test_places_in_the_queue_are_told_when_they_change(
    folder: Path, backbone: Backbone, drafter_sets: list[PreparedHeads]
) -> None:
    engine = make_engine(folder, backbone, drafter_sets[0], num_slots=1)
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    requests = [
        engine.request([5], sampling, client=client, request_id=f"{client}{number}")
        for number, client in enumerate("aaab")
    ]
    answers = {request.id: Answer() for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        take_all(answers, engine.step())
    told = {name: [status.position for status in answer.statuses] for name, answer in answers.items()}
    # b came last, and waits for the one that had begun.
    assert told == {"a0": [], "a1": [1, 0], "a2": [2, 1, 0], "b3": [0]}
    assert all(status.state == "queued" for answer in answers.values() for status in answer.statuses)


def test_deadlines_end_waiting_and_nothing_else(
    folder: Path, backbone: Backbone, drafter_sets: list[PreparedHeads]
) -> None:
    engine = make_engine(folder, backbone, drafter_sets[0], num_slots=1)
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    requests = [engine.request([5], sampling, timeout_seconds=1e-6) for _ in range(2)]
    served, expired = run_all(engine, requests)
    assert served.end().finish_reason is FinishReason.LENGTH, "a slot was free for it"
    assert expired.failed is not None
    assert isinstance(expired.failed.error, DeadlineError)
    assert str(expired.failed.error).startswith("no slot was free within 1e-06 seconds")
    with pytest.raises(BadRequestError, match="timeout_seconds must be above 0: got 0"):
        engine.request([5], timeout_seconds=0)


def test_a_pass_that_breaks_ends_its_sequences_alone(
    folder: Path, backbone: Backbone, drafter_sets: list[PreparedHeads], caplog: pytest.LogCaptureFixture
) -> None:
    faulty = FaultyBackbone(backbone)
    engine = make_engine(folder, faulty, drafter_sets[1])
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    first = engine.request([5, 6], sampling)
    typical = engine.request([5, 6], sampling, TYPICAL)
    answers = {request.id: Answer() for request in (first, typical)}
    engine.submit(first)
    engine.submit(typical)
    take_all(answers, engine.step())
    faulty.faults.append(RuntimeError("the memory is full"))
    take_all(answers, engine.step())  # the pass of the first rule breaks, the other's runs
    failed = answers[first.id].failed
    assert isinstance(failed, FailedEvent)
    assert failed.error.code == "internal"
    assert str(failed.error) == "the engine failed in a step (RuntimeError): try again"
    assert str(failed.error.__cause__) == "the memory is full"
    assert "the memory is full" in caplog.text
    assert not answers[typical.id].has_ended

    waiting = engine.request([5, 6], sampling)
    answers[waiting.id] = Answer()
    engine.submit(waiting)
    while engine.has_work:
        take_all(answers, engine.step())
    assert len(answers[typical.id].token_ids) == len(answers[waiting.id].token_ids) == 8


def test_an_interrupt_passes_through_and_prompts_begin_again(
    folder: Path, backbone: Backbone, drafter_sets: list[PreparedHeads], alone: list[list[int]]
) -> None:
    faulty = FaultyBackbone(backbone)
    engine = make_engine(folder, faulty, drafter_sets[3])
    running, arriving = engine.request(*KINDS[1]), engine.request(*KINDS[2])
    answers = {request.id: Answer() for request in (running, arriving)}
    engine.submit(arriving)
    take_all(answers, engine.step())
    faulty.faults.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.step()  # in the second part of its prompt
    assert (engine.num_running, engine.num_waiting) == (0, 1)
    engine.submit(running)
    while not answers[running.id].events:
        take_all(answers, engine.step())
    faulty.faults.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    while engine.has_work:
        take_all(answers, engine.step())
    ends = {request_id: answer.end().finish_reason for request_id, answer in answers.items()}
    assert ends[running.id] is FinishReason.CANCELLED
    if ends[arriving.id] is not FinishReason.CANCELLED:
        assert answers[arriving.id].token_ids == alone[2]


def test_generate_takes_more_requests_than_may_wait(
    folder: Path,
    backbone: Backbone,
    drafter_sets: list[PreparedHeads],
    alone: list[list[int]],
    steps: dict[str, object],
) -> None:
    engine = make_engine(folder, backbone, drafter_sets[2], max_waiting=0, **steps)
    requests: list[Request] = [engine.request(*kind) for kind in KINDS * 2]
    answers = {request.id: Answer() for request in requests}
    for event in engine.generate(*requests):
        answers[event.request_id].take(event)
    assert [answer.token_ids for answer in answers.values()] == alone * 2


def test_generate_raises_what_broke(folder: Path, backbone: Backbone, drafter_sets: list[PreparedHeads]) -> None:
    faulty = FaultyBackbone(backbone)
    engine = make_engine(folder, faulty, drafter_sets[1])
    faulty.faults.append(RuntimeError("the memory is full"))
    with pytest.raises(Exception, match="the engine failed in a step") as caught:
        list(engine.generate(engine.request(*KINDS[0]), engine.request(*KINDS[1])))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert not engine.has_work
