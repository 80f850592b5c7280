"""Bulk decoding gives the tokens that the engine gives, whoever shares the batch and whenever a prompt joins."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.bulk import BulkGenerator, BulkPrompt
from gorgon_engine.drafters.select import DrafterKind
from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.events import TokenEvent
from gorgon_engine.sampling import SamplingBatch, SamplingParams, process_logits, sample
from gorgon_engine.sequence import SpeculationParams
from gorgon_engine.tokenizer import Tokenizer
from gorgon_protocol.errors import BadRequestError, ContextLengthError
from support.models import tiny_llama
from support.vocabularies import byte_level_bpe, save

VOCAB = 352


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ends one answer in two by itself: it has many end-of-sequence tokens."""
    folder = tiny_llama(tmp_path_factory.mktemp("bulk") / "tiny", vocab_size=VOCAB)
    save(byte_level_bpe(), folder, bos="<|endoftext|>", eos="<|im_end|>")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": list(range(2, VOCAB, 25))}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def random_prompts(count: int) -> list[BulkPrompt[int]]:
    generator = torch.Generator().manual_seed(5)
    prompts = []
    for key in range(count):
        size = int(torch.randint(1, 30, (1,), generator=generator))
        tokens = torch.randint(3, VOCAB, (size,), generator=generator).tolist()
        prompts.append(BulkPrompt(key, tuple(tokens), temperature=[0.0, 0.7, 1.5][key % 3], seed=key, max_tokens=20))
    return prompts


def run(generator: BulkGenerator[int], prompts: list[BulkPrompt[int]]) -> dict[int, list[int]]:
    generator.submit(prompts)
    answers = {}
    while generator.num_unfinished:
        for answer in generator.run_round():
            assert answer.key not in answers
            answers[answer.key] = answer.tokens
    return answers


@pytest.mark.parametrize("kernels", [Kernels.NATIVE, Kernels.TORCH])
@pytest.mark.parametrize("num_slots", [1, 3, 16])
def test_the_tokens_are_the_engines(folder: Path, kernels: Kernels, num_slots: int) -> None:
    backbone, _ = load_backbone(folder, BackboneOptions(dtype=torch.float32, kernels=kernels, device="cpu"))
    prompts = random_prompts(11)
    # Prefills of one prompt and of several, rounds that end in the middle of an answer.
    generator: BulkGenerator[int] = BulkGenerator(
        backbone, num_slots=num_slots, context=64, max_new_tokens=20, prefill_rows=40, steps_per_round=7
    )
    answers = run(generator, prompts)
    config = EngineConfig(drafter=DrafterKind.NONE, adaptive=False, context=64)
    engine = Engine(backbone=backbone, tokenizer=Tokenizer.from_folder(folder), drafters=(), config=config)
    assert sorted(answers) == list(range(11))
    ended_early = 0
    for prompt in prompts:
        sampling = SamplingParams(max_tokens=20, temperature=prompt.temperature, seed=prompt.seed)
        request = engine.request(prompt.tokens, sampling, SpeculationParams(enabled=False))
        events = engine.generate(request)
        expected = [token for event in events if isinstance(event, TokenEvent) for token in event.token_ids]
        assert answers[prompt.key] == expected
        ended_early += len(expected) < 20
    assert 0 < ended_early < 11, "some answers end by themselves, some at the limit"
    assert run(generator, prompts) == answers, "slots can be used again"


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    backbone, _ = load_backbone(folder, BackboneOptions(dtype=torch.float32, device="cpu"))
    generator: BulkGenerator[str] = BulkGenerator(backbone, num_slots=2, context=32, max_new_tokens=16)
    with pytest.raises(
        ContextLengthError, match="prompt 'long': 20 tokens and an answer of 13 do not fit a context of 32"
    ):
        generator.submit([BulkPrompt("long", (5,) * 20, 0.0, 0, 13)])
    with pytest.raises(ContextLengthError, match="answers of at most 16"):
        generator.submit([BulkPrompt("much", (5,), 0.0, 0, 17)])
    with pytest.raises(BadRequestError, match="prompt 'none' is empty"):
        generator.submit([BulkPrompt("none", (), 0.0, 0, 3)])
    with pytest.raises(BadRequestError, match="prompt 'mute' is empty, or asks for no tokens"):
        generator.submit([BulkPrompt("good", (5,), 0.0, 0, 3), BulkPrompt("mute", (5,), 0.0, 0, 0)])
    assert generator.num_unfinished == generator.num_waiting == 0, "nor those that came with them"
    assert generator.run_round() == []


@pytest.fixture(scope="module")
def int8(folder: Path) -> Backbone:
    return load_backbone(folder, BackboneOptions(device="cpu"))[0]


def test_how_the_work_is_cut_changes_no_token(int8: Backbone) -> None:
    """Native rows are the same bits in any company: also in int8, which is what a CPU serves."""
    assert int8.kernels == "native-int8"
    prompts = random_prompts(14)
    answers = []
    for num_slots, prefill_rows, steps in ((1, 1, 1), (4, 1000, 3), (5, 60, 64), (16, 25, 5)):
        generator: BulkGenerator[int] = BulkGenerator(
            int8, num_slots=num_slots, context=64, max_new_tokens=20, prefill_rows=prefill_rows, steps_per_round=steps
        )
        answers.append(run(generator, prompts))
    assert all(other == answers[0] for other in answers)


def test_prompts_may_join_between_rounds(int8: Backbone) -> None:
    prompts = random_prompts(9)
    options: dict[str, Any] = {"num_slots": 3, "context": 64, "max_new_tokens": 20, "steps_per_round": 6}
    expected = run(BulkGenerator(int8, **options), prompts)
    generator: BulkGenerator[int] = BulkGenerator(int8, **options)
    answers: dict[int, list[int]] = {}
    for start in range(0, 9, 2):
        generator.submit(prompts[start : start + 2])
        answers |= {answer.key: answer.tokens for answer in generator.run_round()}
        assert generator.num_unfinished == min(start + 2, 9) - len(answers)
        assert generator.num_waiting == max(generator.num_unfinished - 3, 0)
    assert 0 < len(answers) < 9
    assert answers | run(generator, []) == expected


def test_every_prompt_has_its_own_limit(int8: Backbone) -> None:
    """From one token to all that the slot holds; an answer cut short is the beginning of the longer one."""
    prompt = random_prompts(4)[3]
    whole: BulkGenerator[int] = BulkGenerator(int8, num_slots=4, context=len(prompt.tokens) + 20, max_new_tokens=20)
    limits = [20, 1, 7, 19]
    asked = [replace(prompt, key=limit, seed=2, temperature=0.7, max_tokens=limit) for limit in limits]
    answers = run(whole, asked)
    assert len(answers[20]) > 7, "a seed under which this model goes on for long enough"
    assert all(answers[limit] == answers[20][:limit] for limit in limits)


def test_rows_of_temperatures_are_sampled_as_requests_are() -> None:
    temperatures, seeds = [0.0, 0.7, 1.0, 0.0, 3.0], [4, 4, 0, 2**62, 9]
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * 4
    positions = torch.tensor([3, 3, 900, 0, 12])
    rows = SamplingBatch.of_temperatures(torch.tensor(temperatures), torch.tensor(seeds), vocab_size=300)
    params = [SamplingParams(temperature=t, seed=seed) for t, seed in zip(temperatures, seeds, strict=True)]
    requests = SamplingBatch.of(params, vocab_size=300, device=torch.device("cpu"))
    drawn = [sample(process_logits(logits, batch, None), batch, positions) for batch in (rows, requests)]
    assert torch.equal(drawn[0], drawn[1])
    assert drawn[0][[0, 3]].tolist() == logits[[0, 3]].argmax(dim=1).tolist()
