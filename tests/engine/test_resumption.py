"""A generation cut anywhere and gone on with elsewhere is the undisturbed one: token for token, text for text."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.engine import Engine
from gorgon_engine.events import FinishedEvent
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import FinishReason, SpeculationParams
from gorgon_protocol.errors import BadRequestError, ContextLengthError
from support.drafters import RandomDrafter
from support.engines import TINY_VOCAB, Answer, run_all, tiny_backbone, tiny_engine, tiny_folder

PROMPT = [9, 40, 41, 42, 9, 40, 41]
SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=40),
    "drawn": SamplingParams(max_tokens=40, temperature=1.2, seed=5),
    "filtered": SamplingParams(max_tokens=40, temperature=1.0, top_p=0.8, top_k=50, seed=6, ignore_eos=True),
    "penalised": SamplingParams(
        max_tokens=40, temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.6, presence_penalty=0.4, seed=7
    ),
    "context": SamplingParams(temperature=0.9, seed=8, ignore_eos=True),
    "reported": SamplingParams(max_tokens=24, temperature=1.0, seed=9, logprobs=2),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("resumption") / "tiny")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return tiny_backbone(folder)


@pytest.fixture(scope="module")
def engine(folder: Path, backbone: Backbone) -> Engine:
    drafters = [NgramDrafter(), RandomDrafter(TINY_VOCAB)]
    return tiny_engine(folder, backbone, drafters, context=64, chunk_size=11, max_waiting=1000, max_nodes=9)


def whole(engine: Engine, sampling: SamplingParams) -> Answer:
    return run_all(engine, [engine.request(PROMPT, sampling)])[0]


def check_every_cut(engine: Engine, undisturbed: Answer, sampling: SamplingParams) -> None:
    """Every other one without speculation; several at a time."""
    tokens, end = undisturbed.token_ids, undisturbed.end()
    pieces = [piece for event in undisturbed.events for piece in event.pieces]
    requests = [
        engine.request(PROMPT, sampling, SpeculationParams(enabled=cut % 2 == 0), generated=tokens[:cut])
        for cut in range(len(tokens) + 1)
    ]
    for cut, resumed in enumerate(run_all(engine, requests)):
        assert resumed.token_ids == tokens[cut:]
        assert "".join(pieces[:cut]) + resumed.text == undisturbed.text
        finished = resumed.end()
        assert (finished.finish_reason, finished.stop, finished.usage) == (end.finish_reason, end.stop, end.usage)
        assert finished.metrics.num_spec_steps + finished.metrics.num_accepted_draft_tokens == max(
            len(tokens) - cut - 1, 0
        )
        if sampling.logprobs is not None:
            assert logprobs_of(resumed) == pytest.approx(logprobs_of(undisturbed)[cut:])


def logprobs_of(answer: Answer) -> list[float]:
    return [entry.logprob for event in answer.events for entry in event.logprobs or []]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_every_cut_of_an_answer(engine: Engine, name: str) -> None:
    undisturbed = whole(engine, SAMPLINGS[name])
    assert len(undisturbed.token_ids) >= 8
    check_every_cut(engine, undisturbed, SAMPLINGS[name])


def test_cuts_within_characters_and_within_a_stop_string(engine: Engine) -> None:
    """The tiny model says bytes at random; the prompt tokens make it say characters of several."""
    sampling = SamplingParams(max_tokens=30, temperature=1.5, seed=11, ignore_eos=True)
    pieces = [piece for event in whole(engine, sampling).events for piece in event.pieces]
    assert "" in pieces, "a character that takes several tokens"
    text = whole(engine, sampling).text
    for start in (3, len(text) // 2, len(text) - 6):
        stop = text[start : start + 4]
        stopped = replace(sampling, stop=(stop, "never said"))
        undisturbed = whole(engine, stopped)
        assert undisturbed.end().stop == stop
        assert undisturbed.text == text[: text.index(stop)]
        check_every_cut(engine, undisturbed, stopped)


def test_stop_tokens(engine: Engine) -> None:
    tokens = whole(engine, SAMPLINGS["drawn"]).token_ids
    sampling = replace(SAMPLINGS["drawn"], stop_token_ids=(tokens[5],))
    undisturbed = whole(engine, sampling)
    assert undisturbed.end().stop == tokens[5]
    check_every_cut(engine, undisturbed, sampling)


def test_one_that_is_over_ends_at_once_without_a_slot(engine: Engine) -> None:
    sampling = SAMPLINGS["greedy"]
    tokens = whole(engine, sampling).token_ids
    request = engine.request(PROMPT, sampling, generated=tokens)
    engine.submit(request)
    assert (engine.has_work, engine.num_running, engine.num_waiting) == (True, 0, 0)
    (end,) = engine.step()
    assert isinstance(end, FinishedEvent)
    assert end.finish_reason is FinishReason.LENGTH
    assert end.tokens_per_second is None
    assert end.ttft_seconds is None
    assert not engine.has_work


def test_one_that_is_over_keeps_its_end_when_it_is_cancelled(engine: Engine) -> None:
    tokens = whole(engine, SAMPLINGS["greedy"]).token_ids
    request = engine.request(PROMPT, SAMPLINGS["greedy"], generated=tokens)
    engine.submit(request)
    engine.cancel(request.id)
    (end,) = engine.abort()
    assert isinstance(end, FinishedEvent)
    assert end.finish_reason is FinishReason.LENGTH


def test_what_cannot_have_been_generated_is_refused(engine: Engine) -> None:
    with pytest.raises(BadRequestError, match="generated_token_ids holds token 352: the vocabulary has 352 tokens"):
        engine.request(PROMPT, generated=[1, 352])
    with pytest.raises(ContextLengthError, match="7 tokens long and 58 were generated, but the context holds 64"):
        engine.request(PROMPT, generated=[5] * 58)
