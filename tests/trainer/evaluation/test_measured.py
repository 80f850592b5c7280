"""Measured figures against drafters whose every guess is known, and against plain decoding."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer.evaluation.conftest import FP32

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import load_backbone
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.drafters.select import DrafterKind
from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.events import TokenEvent
from gorgon_engine.heads.checkpoint import save_heads
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_engine.models.identity import backbone_identity
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import SpeculationParams
from gorgon_engine.tokenizer import Tokenizer
from gorgon_protocol.errors import BadRequestError, DataError
from gorgon_protocol.manifest import BackboneReference, HeadsManifest
from gorgon_trainer.evaluation.engines import EngineParts
from gorgon_trainer.evaluation.figures import Measurement, StepFigures
from gorgon_trainer.evaluation.looping import is_looping
from gorgon_trainer.evaluation.measured import MeasureSettings, measure, measure_nodes
from gorgon_trainer.evaluation.prompts import EvaluationPrompt
from support.drafters import OracleDrafter, RandomDrafter, WrongDrafter

PROMPTS = [
    EvaluationPrompt("file, line 1", "the cat sat on the mat"),
    EvaluationPrompt("file, line 2", "12 cats and 3 dogs"),
    EvaluationPrompt("file, line 3", ({"role": "user", "content": "the cat sat on the cat"},)),
]
GREEDY = MeasureSettings(max_tokens=42, seeds=())


@pytest.fixture(scope="module")
def parts(backbone: Backbone, tokenizer: Tokenizer) -> EngineParts:
    config = EngineConfig(num_slots=2, adaptive=False, context=400)
    return EngineParts(backbone, tokenizer, (), config)


def engine_of(parts: EngineParts, drafters: Sequence[Drafter], max_nodes: int = 5) -> Engine:
    config = replace(parts.config, max_nodes=max_nodes)
    return Engine(backbone=parts.backbone, tokenizer=parts.tokenizer, drafters=drafters, config=config)


def plain_answers(parts: EngineParts, max_tokens: int) -> dict[tuple[int, ...], list[int]]:
    """Prompt tokens -> the tokens of plain greedy decoding."""
    engine = engine_of(parts, [])
    requests = [
        engine.request(prompt.encode(parts.tokenizer), SamplingParams(max_tokens), SpeculationParams(enabled=False))
        for prompt in PROMPTS
    ]
    answers: dict[str, list[int]] = {request.id: [] for request in requests}
    for event in engine.generate(*requests):
        if isinstance(event, TokenEvent):
            answers[event.request_id] += event.token_ids
    return {request.prompt: answers[request.id] for request in requests}


def steps(measurement: Measurement, *, greedy: bool = True) -> StepFigures:
    result = measurement.result(greedy=greedy)
    assert result is not None
    return result.answers


def test_guesses_that_are_always_right_fill_every_step(parts: EngineParts) -> None:
    futures = plain_answers(parts, 42)
    measurement = measure(engine_of(parts, [OracleDrafter(futures)]), PROMPTS, GREEDY)
    figures = steps(measurement)
    # Four drafts and the bonus token a step; the first token comes from prefill.
    num_tokens = [len(answer) - 1 for answer in futures.values()]
    assert figures.num_answers == 3
    assert figures.num_steps == sum(ceil(tokens / 5) for tokens in num_tokens)
    assert figures.mean_acceptance_length == pytest.approx(sum(num_tokens) / figures.num_steps)
    assert measurement.num_tokens == sum(num_tokens) + 3
    assert max(num_tokens) == 41
    assert len(figures.acceptance_by_depth) == 4


def test_guesses_that_are_always_wrong_leave_one_token_a_step(parts: EngineParts) -> None:
    oracle = OracleDrafter(plain_answers(parts, 42))
    figures = steps(measure(engine_of(parts, [WrongDrafter(oracle, 352)]), PROMPTS, GREEDY))
    assert figures.mean_acceptance_length == 1.0
    assert figures.acceptance_by_depth == ()
    assert figures.num_draft_tokens > 3 * figures.num_steps


def test_every_sampling_its_sources_and_its_tokens(parts: EngineParts) -> None:
    settings = MeasureSettings(max_tokens=24, seeds=(3, 5), temperature=0.9, trace=True, compare_plain=True)
    drafters = [RandomDrafter(352), RandomDrafter(352, seed=1, name="other")]
    measurement = measure(engine_of(parts, drafters, max_nodes=12), PROMPTS, settings)
    assert [(result.name, result.seeds) for result in measurement.results] == [("greedy", (0,)), ("T=0.9", (3, 5))]
    for result, num_answers in zip(measurement.results, (3, 6), strict=True):
        assert result.answers.num_answers == result.num_identical == num_answers
        assert sum(result.answers.acceptance_histogram) == result.answers.num_steps
        assert result.sources is not None
        assert set(result.sources) == {"other", "random"}
        assert sum(source.num_accepted for source in result.sources.values()) == result.answers.num_accepted
        assert sum(source.num_drafted for source in result.sources.values()) == result.answers.num_draft_tokens
        # A random guess is right now and then: the sum above is of something.
        assert result.answers.num_accepted > 0
    total = sum(r.answers.num_answers + r.answers.num_steps + r.answers.num_accepted for r in measurement.results)
    assert measurement.num_tokens == total


def test_seeds_are_answers_of_their_own(parts: EngineParts) -> None:
    engine = engine_of(parts, [RandomDrafter(352)])
    one, other, both = (
        steps(measure(engine, PROMPTS, MeasureSettings(max_tokens=20, greedy=False, seeds=seeds)), greedy=False)
        for seeds in ((1,), (2,), (1, 2))
    )
    assert one != other
    assert both.num_answers == one.num_answers + other.num_answers


@pytest.fixture(scope="module")
def forgetful(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineParts:
    """A model that sees its last token alone, so that greedy answers come to walk in circles."""
    folder = tmp_path_factory.mktemp("forgetful") / "tiny"
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    backbone = load_backbone(folder, FP32)[0]
    return EngineParts(
        backbone, Tokenizer.from_folder(folder), (), EngineConfig(context=400, num_slots=2, adaptive=False)
    )


def test_answers_that_loop_are_left_out_of_the_second_figure(forgetful: EngineParts) -> None:
    futures = plain_answers(forgetful, 200)
    settings = MeasureSettings(max_tokens=200, seeds=(1,), temperature=1.5)
    greedy, sampled = measure(engine_of(forgetful, [RandomDrafter(352)]), PROMPTS, settings).results
    looping = [is_looping(answer) for answer in futures.values()]
    assert any(looping)
    assert greedy.answers.num_answers == 3
    assert greedy.non_looping.num_answers == 3 - sum(looping)
    assert greedy.non_looping.num_steps < greedy.answers.num_steps
    assert sampled.non_looping == sampled.answers


def test_by_hand() -> None:
    figures = StepFigures(num_answers=1, num_steps=10, num_draft_tokens=40, acceptance_histogram=(5, 3, 0, 2))
    assert figures.num_accepted == 9
    assert figures.mean_acceptance_length == pytest.approx(1.9)
    assert figures.acceptance_by_depth == pytest.approx((0.5, 0.2, 0.2))
    none = StepFigures(num_answers=0, num_steps=0, num_draft_tokens=0, acceptance_histogram=())
    assert none.mean_acceptance_length is None
    assert none.acceptance_by_depth == ()


def test_json_comes_back(parts: EngineParts) -> None:
    settings = MeasureSettings(max_tokens=8, seeds=(1,), trace=True)
    measurement = measure(engine_of(parts, [RandomDrafter(352)]), PROMPTS, settings)
    values = json.loads(json.dumps(measurement.as_json(), allow_nan=False))
    assert values["results"][0]["answers"]["mean_acceptance_length"] == steps(measurement).mean_acceptance_length
    assert Measurement.from_json(values) == measurement
    with pytest.raises(DataError, match="not a measurement: max_nodes: "):
        Measurement.from_json({**values, "max_nodes": "many"})


def test_long_prompts_are_skipped_where_that_is_asked_for(parts: EngineParts) -> None:
    lengths = [len(prompt.encode(parts.tokenizer)) for prompt in PROMPTS]
    settings = replace(GREEDY, max_tokens=4, max_prompt_tokens=min(lengths))
    measurement = measure(engine_of(parts, []), PROMPTS, settings)
    assert (measurement.num_prompts, measurement.num_skipped) == (1, 2)


def test_a_prompt_that_does_not_fit_is_named_before_anything_runs(parts: EngineParts) -> None:
    long = EvaluationPrompt("file, line 9", "cat " * 400)
    with pytest.raises(BadRequestError, match=r"file, line 9: the prompt is .* tokens long"):
        measure(engine_of(parts, []), [*PROMPTS, long], GREEDY)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"greedy": False, "seeds": ()}, "nothing to measure"),
        ({"temperature": 0.0}, "above 0"),
        ({"seeds": (1, 1)}, "differ"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        MeasureSettings(**values)


@pytest.fixture(scope="module")
def heads(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random heads of the tiny backbone, offsets 2 to 4."""
    torch.manual_seed(3)
    random = MedusaHeads(64, num_heads=3)
    for parameter in random.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("store") / "tiny@1"
    manifest = HeadsManifest(
        name="tiny",
        version="1",
        backbone=BackboneReference(identity=backbone_identity(tiny), name="Tiny"),
        hidden_size=64,
        vocab_size=352,
        num_heads=3,
        offsets=(2, 3, 4),
        num_blocks=1,
        projection="shared",
        dtype="float32",
        quantization="none",
    )
    save_heads(folder, random, manifest)
    return folder


def test_tree_sizes_share_one_backbone_and_no_more_cache_than_they_need(tiny: Path, heads: Path) -> None:
    parts = EngineParts.load(EngineConfig(model=str(tiny), backbone=FP32, heads=heads, num_slots=64))
    assert [drafter.name for drafter in parts.drafters] == ["head", "lookup"]
    alone = parts.only("head")
    settings = MeasureSettings(max_tokens=16, seeds=(1,))
    make = alone.maker(PROMPTS, settings)
    engine = make(8)
    assert engine.backbone is parts.backbone
    assert engine.config.num_slots == 6  # as many as there are answers
    longest = max(len(prompt.encode(parts.tokenizer)) for prompt in PROMPTS)
    assert engine.context == longest + 16
    measured = list(measure_nodes(make, PROMPTS, settings, (2, 4, 8)))
    assert [measurement.max_nodes for measurement in measured] == [2, 4, 8]
    for measurement in measured:
        for result in measurement.results:
            # Heads always guess: every tree is the largest.
            assert result.answers.num_draft_tokens == (measurement.max_nodes - 1) * result.answers.num_steps
    for smaller, larger in pairwise(measured):
        assert steps(smaller).num_draft_tokens < steps(larger).num_draft_tokens
    with pytest.raises(BadRequestError, match="no drafter 'eagle' among"):
        parts.only("eagle")


def test_slots_are_fewer_where_the_logits_of_a_pass_would_not_fit(
    parts: EngineParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = replace(parts, config=replace(parts.config, num_slots=3))
    monkeypatch.setattr("gorgon_trainer.evaluation.engines._MAX_LOGITS_BYTES", 16 * 352 * 4 * 2)
    make = many.maker(PROMPTS, GREEDY)
    assert [make(nodes).config.num_slots for nodes in (4, 16, 64)] == [3, 2, 1]


def test_the_drafter_may_be_lookup_alone(tiny: Path) -> None:
    parts = EngineParts.load(EngineConfig(model=str(tiny), backbone=FP32, drafter=DrafterKind.NGRAM))
    (measurement,) = measure_nodes(parts.maker(PROMPTS, GREEDY), PROMPTS, GREEDY, (16,))
    assert measurement.num_prompts == 3
    assert steps(measurement).num_steps > 0
