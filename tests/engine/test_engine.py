"""The engine on the real model: lossless against itself and against transformers; requests from arrival to end."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gorgon_engine.acceptance import AcceptanceRule
from gorgon_engine.backbone.select import BackboneOptions
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.events import FinishedEvent, TokenEvent
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import FinishReason, Request, SpeculationParams
from gorgon_protocol.errors import BadRequestError, ContextLengthError
from support.drafters import OracleDrafter, RandomDrafter, WrongDrafter

FP32 = BackboneOptions(dtype=torch.float32)
PLAIN = SpeculationParams(enabled=False)
SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=48),
    "sampled": SamplingParams(max_tokens=48, temperature=0.7, seed=11),
}
QUESTIONS = [
    json.loads(line)["turns"][0]
    for line in (Path(__file__).parents[2] / "benchmarks/data/mt_bench.jsonl").read_text().splitlines()
]


def run(engine: Engine, request: Request) -> tuple[list[int], FinishedEvent, str]:
    tokens: list[int] = []
    text = ""
    for event in engine.generate(request):
        text += event.text
        if isinstance(event, FinishedEvent):
            return tokens, event, text
        tokens += event.token_ids
    raise AssertionError("a generation without a terminal event")


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def with_drafters(engine: Engine, drafters: list[Drafter], max_nodes: int) -> Engine:
    """The same backbone under other drafters, every guess verified."""
    config = EngineConfig(max_nodes=max_nodes, adaptive=False, context=1024)
    return Engine(backbone=engine.backbone, tokenizer=engine.tokenizer, drafters=drafters, config=config)


@pytest.fixture(scope="module")
def fp32(smollm2: Path) -> Engine:
    return Engine.load(EngineConfig(model=str(smollm2), backbone=FP32, adaptive=False, context=1024))


@pytest.fixture(scope="module")
def default(smollm2: Path) -> Engine:
    return Engine.load(EngineConfig(model=str(smollm2), context=2048))


@pytest.mark.parametrize("name", SAMPLINGS)
def test_speculation_never_changes_the_tokens(fp32: Engine, name: str) -> None:
    """Eight prompts, five tree sizes, drafters that are random, always right, always wrong, and real."""
    vocab_size = fp32.backbone.config.vocab_size
    prompts = [chat(question) for question in QUESTIONS[::10]]
    plain = [run(fp32, fp32.request(p, SAMPLINGS[name], PLAIN))[0] for p in prompts]
    futures = {fp32.request(p).prompt: tokens for p, tokens in zip(prompts, plain, strict=True)}
    oracle = OracleDrafter(futures)
    for max_nodes, drafters in (
        (1, [NgramDrafter()]),
        (2, [NgramDrafter()]),
        (8, [NgramDrafter(), RandomDrafter(vocab_size)]),
        (32, [WrongDrafter(oracle, vocab_size), NgramDrafter()]),
        (32, [oracle]),
        (128, [RandomDrafter(vocab_size, seed=4), NgramDrafter(num_chains=6)]),
    ):
        engine = with_drafters(fp32, drafters, max_nodes)
        for prompt, expected in zip(prompts, plain, strict=True):
            tokens, end, _ = run(engine, engine.request(prompt, SAMPLINGS[name]))
            assert tokens == expected
            assert end.metrics.num_spec_steps + end.metrics.num_accepted_draft_tokens + 1 == len(tokens)


@pytest.mark.full
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("max_nodes", [16, 64])
def test_all_of_mt_bench_is_token_identical(fp32: Engine, temperature: float, max_nodes: int) -> None:
    engine = with_drafters(fp32, [NgramDrafter()], max_nodes)
    sampling = SamplingParams(max_tokens=128, temperature=temperature, seed=7)
    for question in QUESTIONS:
        plain, _, _ = run(engine, engine.request(chat(question), sampling, PLAIN))
        tokens, _, _ = run(engine, engine.request(chat(question), sampling))
        assert tokens == plain, question


def test_greedy_is_transformers_generate(fp32: Engine, smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for question in (QUESTIONS[0], QUESTIONS[40]):
        request = fp32.request(chat(question), SamplingParams(max_tokens=40), PLAIN)
        prompt = torch.tensor([request.prompt])
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=2
        )
        assert run(fp32, request)[0] == output[0, len(request.prompt) :].tolist()


def test_the_default_engine_is_lossless_too(default: Engine) -> None:
    assert default.backbone.kernels == "native-int8"
    assert default.backbone.row_invariant
    for sampling in (SamplingParams(max_tokens=64), SamplingParams(max_tokens=64, temperature=0.8, top_p=0.9, seed=3)):
        for question in QUESTIONS[5::25]:
            plain, _, text = run(default, default.request(chat(question), sampling, PLAIN))
            tokens, _, speculative_text = run(default, default.request(chat(question), sampling))
            assert tokens == plain
            assert text == speculative_text


def test_many_requests_at_once_equal_themselves_alone(smollm2: Path, default: Engine) -> None:
    """More requests than slots, ragged lengths, mixed parameters: each as if it were alone."""
    engine = Engine(
        backbone=default.backbone,
        tokenizer=default.tokenizer,
        drafters=[NgramDrafter()],
        config=EngineConfig(num_slots=3, context=1024, adaptive=False),
    )
    params = [
        SamplingParams(max_tokens=20),
        SamplingParams(max_tokens=31, temperature=0.9, seed=1),
        SamplingParams(max_tokens=25, temperature=0.5, repetition_penalty=1.1, seed=2),
        SamplingParams(max_tokens=12, top_k=5, temperature=1.0),
        SamplingParams(max_tokens=28, frequency_penalty=0.5),
    ]
    prompts = [chat(question) for question in QUESTIONS[3:8]]
    alone = [run(default, default.request(p, s, PLAIN))[0] for p, s in zip(prompts, params, strict=True)]
    requests = [engine.request(p, s) for p, s in zip(prompts, params, strict=True)]
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    ended: list[str] = []
    for event in engine.generate(*requests):
        if isinstance(event, TokenEvent):
            assert event.request_id not in ended
            tokens[event.request_id] += event.token_ids
        else:
            ended.append(event.request_id)
    assert sorted(ended) == sorted(tokens)
    assert [tokens[request.id] for request in requests] == alone


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_request_of_one_token_leaves_nothing_to_the_next(fp32: Engine, num_slots: int) -> None:
    """It ends while it is admitted, in the same step as the next one begins."""
    alone = run(fp32, fp32.request(chat(QUESTIONS[3]), SamplingParams(max_tokens=12)))[0]
    config = EngineConfig(adaptive=False, context=1024, num_slots=num_slots)
    engine = Engine(backbone=fp32.backbone, tokenizer=fp32.tokenizer, drafters=[NgramDrafter()], config=config)
    short = engine.request(chat(QUESTIONS[5]), SamplingParams(max_tokens=1))
    following = engine.request(chat(QUESTIONS[3]), SamplingParams(max_tokens=12))
    tokens: dict[str, list[int]] = {short.id: [], following.id: []}
    for event in engine.generate(short, following):
        if isinstance(event, TokenEvent):
            tokens[event.request_id] += event.token_ids
    assert len(tokens[short.id]) == 1
    assert tokens[following.id] == alone


def test_stop_strings_end_the_text_before_them(default: Engine) -> None:
    question = chat("Count from one to ten in words.")
    _, _, whole = run(default, default.request(question, SamplingParams(max_tokens=60)))
    middle = whole[len(whole) // 2 : len(whole) // 2 + 4]
    for speculation in (PLAIN, SpeculationParams()):
        tokens, end, text = run(
            default, default.request(question, SamplingParams(max_tokens=60, stop=(middle, "never said")), speculation)
        )
        assert text == whole[: whole.index(middle)]
        assert (end.finish_reason, end.stop) == (FinishReason.STOP, middle)
        assert end.usage.completion_tokens == len(tokens)


def test_stop_tokens_and_eos(default: Engine) -> None:
    question = chat("Say hi.")
    tokens, end, _ = run(default, default.request(question, SamplingParams(max_tokens=200)))
    assert end.finish_reason is FinishReason.STOP
    assert end.stop == tokens[-1] == 2
    third = tokens[2]
    cut, end, _ = run(default, default.request(question, SamplingParams(max_tokens=200, stop_token_ids=(third,))))
    assert cut == tokens[: tokens.index(third) + 1]
    more, end, _ = run(default, default.request(question, SamplingParams(max_tokens=len(tokens) + 9, ignore_eos=True)))
    assert more[: len(tokens)] == tokens
    assert len(more) == len(tokens) + 9
    assert end.finish_reason is FinishReason.LENGTH


def test_the_context_ends_a_generation(default: Engine) -> None:
    engine = with_drafters(default, [NgramDrafter()], 8)
    prompt = [5, 6, 7, 8] * 250
    tokens, end, _ = run(engine, engine.request(prompt, SamplingParams(ignore_eos=True)))
    assert len(tokens) == 1024 - 1000
    assert end.finish_reason is FinishReason.LENGTH
    with pytest.raises(ContextLengthError, match="the prompt is 1024 tokens long and the context holds 1024"):
        engine.request([5] * 1024)


def test_cancelling_and_closing_free_the_slot(default: Engine) -> None:
    for _ in range(3):  # one slot: a leak would block the second round
        request = default.request(chat("Tell me a long story."), SamplingParams(max_tokens=200))
        events = default.generate(request)
        for _ in range(4):
            next(events)
        events.close()
    request = default.request(chat("Tell me a long story."), SamplingParams(max_tokens=200))
    default.submit(request)
    default.step()
    default.cancel(request.id)
    (end,) = [event for event in default.step() if isinstance(event, FinishedEvent)]
    assert end.finish_reason is FinishReason.CANCELLED
    assert end.usage.completion_tokens >= 1


def test_typical_acceptance_is_opt_in_and_runs(default: Engine) -> None:
    speculation = SpeculationParams(acceptance=AcceptanceRule.TYPICAL)
    sampling = SamplingParams(max_tokens=40, temperature=0.7, presence_penalty=0.2, seed=2)
    tokens, end, _ = run(default, default.request(chat("List five colours."), sampling, speculation))
    assert 1 <= len(tokens) <= 40
    assert end.metrics.num_spec_steps >= 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([49152], "the prompt holds token 49152: the vocabulary has 49152 tokens"),
        ([-1], "the prompt holds token -1"),
    ],
)
def test_prompts_that_cannot_run_are_named(default: Engine, prompt: str | list[int], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        default.request(prompt)


def test_limits_are_checked(default: Engine, smollm2: Path) -> None:
    with pytest.raises(BadRequestError, match="max_nodes must be between 1 and 128: got 129"):
        EngineConfig(max_nodes=129)
    with pytest.raises(BadRequestError, match="max_nodes must be between 1 and 32: got 33"):
        default.request("a", speculation=SpeculationParams(max_nodes=33))
    with pytest.raises(BadRequestError, match="context 9000 is longer than the model's 8192 positions"):
        Engine.load(EngineConfig(model=str(smollm2), context=9000))


def test_calibration_measures_this_machine(default: Engine) -> None:
    assert default.calibration is not None
    model = default.calibration.cost_model
    assert model.rows[0] == 1
    assert 0 < model.seconds[0] < 5
    assert list(model.seconds) == sorted(model.seconds)
