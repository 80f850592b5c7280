"""Long prompts beside streams: in portions, none of them for long; short ones together."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.engine import Engine
from gorgon_engine.events import FinishedEvent, StatusEvent
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import FinishReason
from support.engines import Answer, run_all, take_all, tiny_backbone, tiny_engine, tiny_folder

LONG = [number % 40 + 30 for number in range(70)]
SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("prompts") / "tiny")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return tiny_backbone(folder)


def make_engine(folder: Path, backbone: Backbone, **options: object) -> Engine:
    return tiny_engine(folder, backbone, [NgramDrafter()], **({"chunk_size": 24, "max_nodes": 12} | options))


def test_they_run_in_portions_beside_the_streams(folder: Path, backbone: Backbone) -> None:
    engine = make_engine(folder, backbone)
    stream = engine.request([5], SamplingParams(max_tokens=60, ignore_eos=True))
    prompt = engine.request(LONG, SAMPLING)
    answers = {request.id: Answer() for request in (stream, prompt)}
    engine.submit(stream)
    take_all(answers, engine.step())
    engine.submit(prompt)
    num_steps = 0
    while not answers[prompt.id].events:
        before = len(answers[stream.id].events)
        take_all(answers, engine.step())
        num_steps += 1
        assert len(answers[stream.id].events) == before + 1, "no step without the stream"
    assert num_steps == 3  # of 70 positions, 24 at a time
    statuses = answers[prompt.id].statuses
    assert [status.state for status in statuses] == ["prefill", "prefill"]
    assert [status.progress for status in statuses] == pytest.approx([24 / 70, 48 / 70])
    while engine.has_work:
        take_all(answers, engine.step())
    assert answers[prompt.id].token_ids == run_all(engine, [prompt])[0].token_ids
    end = answers[prompt.id].end()
    assert end.queue_seconds is not None
    assert end.prefill_seconds is not None
    assert end.ttft_seconds == pytest.approx(end.queue_seconds + end.prefill_seconds)


def test_a_short_one_does_not_wait_for_their_end(folder: Path, backbone: Backbone) -> None:
    engine = make_engine(folder, backbone, chunk_size=8)
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    long, short = engine.request(LONG, sampling), engine.request([5, 6, 7], sampling)
    answers = {request.id: Answer() for request in (long, short)}
    engine.submit(long)
    engine.submit(short)
    take_all(answers, engine.step())
    assert answers[short.id].events
    assert answers[long.id].statuses == [StatusEvent(long.id, "prefill", progress=5 / 70)]
    engine.abort()


def test_cancelled_between_two_portions_the_slot_is_free(folder: Path, backbone: Backbone) -> None:
    engine = make_engine(folder, backbone, num_slots=1)
    request = engine.request(LONG, SAMPLING)
    engine.submit(request)
    engine.step()
    assert engine.num_running == 1
    engine.cancel(request.id)
    (end,) = engine.step()
    assert isinstance(end, FinishedEvent)
    assert (end.finish_reason, end.usage.completion_tokens) == (FinishReason.CANCELLED, 0)
    assert (end.ttft_seconds, end.prefill_seconds) == (None, None)
    assert (engine.has_work, engine.num_running, engine.kv_cache_usage) == (False, 0, 0.0)


def test_short_ones_that_come_together_share_a_pass(
    folder: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(folder, backbone, chunk_size=512)
    shapes: list[tuple[int, ...]] = []
    forward = backbone.forward

    def counted(inputs, *arguments, **options):  # type: ignore[no-untyped-def]
        shapes.append(tuple(inputs.num_rows.tolist()))
        return forward(inputs, *arguments, **options)

    monkeypatch.setattr(backbone, "forward", counted)
    for length in (3, 9, 5):
        engine.submit(engine.request(LONG[:length], SamplingParams(max_tokens=2)))
    engine.step()
    assert shapes == [(3, 9, 5)]
    engine.abort()


def test_padding_never_leaves_a_slot(folder: Path, backbone: Backbone) -> None:
    """Two prompts at different places whose common width would run over the end of the cache."""
    engine = tiny_engine(folder, backbone, (), context=512, chunk_size=512, num_slots=3)
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    prompt = [number % 300 for number in range(505)]
    expected = run_all(engine, [engine.request(prompt, sampling)])[0].token_ids
    many = tiny_engine(folder, backbone, (), context=512, chunk_size=700, num_slots=3)
    requests = [many.request(prompt, sampling) for _ in range(3)]
    assert [answer.token_ids for answer in run_all(many, requests)] == [expected] * 3
