"""Prompts that are run in recordings say what they say when they are run as they are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.buckets import Buckets
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.engine import Engine
from gorgon_engine.graph_prompts import PromptBuffers, PromptSize
from gorgon_engine.graphs import GraphedStep
from gorgon_engine.recording import RepeatingRecorder
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import SpeculationParams
from gorgon_engine.step import PrefillChunk
from support.engines import TINY_VOCAB, run_all, tiny_backbone, tiny_engine, tiny_folder

LENGTHS = (1, 15, 16, 17, 40, 100, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return tiny_backbone(folder)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, TINY_VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def answers(engine: Engine) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    kinds = [replace(sampling, temperature=0.7 * (n % 2), seed=n) for n in range(len(LENGTHS))]
    requests = [
        engine.request(prompt, kind, SpeculationParams()) for prompt, kind in zip(prompts(), kinds, strict=True)
    ]
    return [answer.token_ids for answer in run_all(engine, requests)]


def graphed(engine: Engine) -> GraphedStep:
    assert isinstance(engine._step, GraphedStep)
    return engine._step


@pytest.mark.parametrize("num_slots", [1, 3])
@pytest.mark.parametrize("chunk_size", [7, 64])
def test_answers_are_the_same(folder: Path, backbone: Backbone, num_slots: int, chunk_size: int) -> None:
    """Cut or whole, alone or several in a pass, which is then filled up with rows of nobody."""
    limits = {"num_slots": num_slots, "context": 256, "chunk_size": chunk_size}
    expected = answers(tiny_engine(folder, backbone, **limits))
    engine = tiny_engine(folder, backbone, [NgramDrafter()], recorder=RepeatingRecorder(), **limits)
    for _ in range(3):
        assert answers(engine) == expected
    stats = graphed(engine).stats
    assert stats.num_eager == {}
    assert any(isinstance(size, PromptSize) for size in graphed(engine)._recordings)
    assert engine._step.cache.num_free_slots == num_slots
    nobodys = graphed(engine)._spare_slot
    assert nobodys is None or engine._step.cache.lengths[nobodys] == 0


def test_a_pass_leaves_what_an_earlier_one_gave(folder: Path, backbone: Backbone) -> None:
    engine = tiny_engine(folder, backbone, recorder=RepeatingRecorder(), num_slots=3, context=256)
    plain = tiny_engine(folder, backbone, num_slots=3, context=256)
    chunks = [PrefillChunk(slot, (5 + slot, 9, 8), start=0, stop=3, prompt_length=3) for slot in range(3)]
    for places in ([0], [1], [2], [0, 1], [2]):
        for step in (engine._step, plain._step):
            step.cache.lengths.zero_()
        given = [engine._step.run_prompts([chunks[place]]) for place in places]
        wanted = [plain._step.run_prompts([chunks[place]]) for place in places]
        for one, other in zip(given, wanted, strict=True):
            assert torch.equal(one.hidden, other.hidden)
            assert torch.equal(one.logits, other.logits)


def test_the_end_of_a_slot_is_not_run_over(folder: Path, backbone: Backbone) -> None:
    engine = tiny_engine(folder, backbone, recorder=RepeatingRecorder(), num_slots=1, context=40, max_nodes=1)
    step, positions = graphed(engine), engine._step.cache.num_positions
    length = positions - 1
    chunk = PrefillChunk(0, (5,) * length, start=0, stop=length, prompt_length=length)
    before = step.cache.keys.clone()
    step.run_prompts([chunk])
    assert step.stats.num_eager == {"long prompts": 1}
    assert torch.equal(step.cache.keys[:, 0, :, length:], before[:, 0, :, length:])


BUCKETS = Buckets.of(num_slots=8, max_nodes=16, num_positions=2048)


def chunk(start: int, stop: int, size: int) -> PrefillChunk:
    return PrefillChunk(0, (7,) * size, start=start, stop=stop, prompt_length=size)


@pytest.mark.parametrize(
    ("chunks", "size"),
    [
        ([chunk(0, 1, 1)], PromptSize(1, 16, 512, ends=True)),
        ([chunk(0, 65, 65)], PromptSize(1, 128, 512, ends=True)),
        ([chunk(500, 512, 900)], PromptSize(1, 16, 2048, ends=False)),
        ([chunk(0, 512, 512)], PromptSize(1, 512, 512, ends=True)),
        ([chunk(0, 20, 20), chunk(0, 9, 20), chunk(3, 4, 9), chunk(0, 1, 2), chunk(0, 3, 3)],
         PromptSize(6, 32, 512, ends=True)),
        ([chunk(0, 513, 600)], None),
        ([chunk(0, 256, 256)] * 3, None),
        ([chunk(2040, 2048, 2048)], None),
        ([chunk(0, 1, 1)] * 9, None),
    ],
)  # fmt: skip
def test_sizes(chunks: list[PrefillChunk], size: PromptSize | None) -> None:
    assert PromptSize.of(chunks, BUCKETS, 2048) == size


def test_inputs() -> None:
    size = PromptSize(3, 16, 512, ends=True)
    buffers = PromptBuffers(size, 4, torch.device("cpu"))
    buffers.load([chunk(0, 16, 16)])
    tokens = (1, 2, 3, 4)
    buffers.load([PrefillChunk(2, tokens, start=1, stop=3, prompt_length=3), PrefillChunk(0, tokens, 0, 4, 4)])
    inputs = buffers.inputs()
    assert inputs.tokens.tolist() == [[2, 3, *[0] * 14], [1, 2, 3, 4, *[0] * 12], [0] * 16]
    assert inputs.slots.tolist() == [2, 0, 4]
    assert inputs.lengths.tolist() == [1, 0, 0]
    assert inputs.num_rows.tolist() == [2, 4, 1]
    assert inputs.prompt_lengths.tolist() == [3, 4, 1]
    assert inputs.depths.tolist() == [list(range(16))] * 3
    assert inputs.max_positions == 512
    assert inputs.ancestors is None


def test_start_up_records_short_prompts(folder: Path, backbone: Backbone) -> None:
    engine = tiny_engine(folder, backbone, recorder=RepeatingRecorder(), num_slots=1, context=512, adaptive=True)
    first, before = graphed(engine).stats.num_first_runs, engine._step.cache.lengths[0].item()
    for length in (1, 16, 70, 300):
        engine._step.run_prompts([chunk(0, length, length)])
    assert graphed(engine).stats.num_first_runs == first
    assert engine._step.cache.lengths[0] - before == 387
