"""Other heads between two steps, with streams running: nothing is said differently, and nothing is left behind."""

import gc
import random
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafters.base import Committed, DraftContext
from gorgon_engine.drafters.select import DrafterKind
from gorgon_engine.engine import Engine
from gorgon_engine.heads.checkpoint import save_heads
from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.heads.families import DraftHeads, family_fields
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.models.identity import backbone_identity
from gorgon_engine.prepared import HeadsDescription, PreparedHeads
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import SpeculationParams
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_protocol.errors import HeadsError
from gorgon_protocol.manifest import BackboneReference, HeadsManifest
from support.engines import Answer, run_all, take_all, tiny_backbone, tiny_engine, tiny_folder

PROMPTS = [[5], [70, 71, 72, 70, 71, 72, 70], [number % 40 + 30 for number in range(60)], [300, 8, 8, 8]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("swap") / "tiny")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return tiny_backbone(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, folder: Path, backbone: Backbone) -> Path:
    """Random heads of two families, and some that do not fit."""
    config, store = backbone.config, tmp_path_factory.mktemp("store")
    hydra = HydraHeads(HydraShape(hidden_size=config.hidden_size, num_heads=2, num_blocks=1))
    eagle = EagleHead(
        EagleShape(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.intermediate_size,
            num_heads=3,
        )
    )
    publish(store, "hydra", "1", hydra, folder, backbone)
    publish(store, "eagle", "2", eagle, folder, backbone)
    (store / "latest").write_text("eagle@2\n")
    return store


def publish(store: Path, name: str, version: str, heads: DraftHeads, folder: Path, backbone: Backbone) -> None:
    torch.manual_seed(3)
    for key, parameter in heads.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(key.endswith("norm")), std=0.2)
    num_heads = heads.num_heads
    fields: dict[str, Any] = {
        "name": name,
        "version": version,
        "backbone": BackboneReference(identity=backbone_identity(folder), name="Tiny"),
        "vocab_size": backbone.config.vocab_size,
        "offsets": tuple(range(2, num_heads + 2)),
        "dtype": "float32",
        "quantization": "none",
    }
    save_heads(store / f"{name}@{version}", heads, HeadsManifest(**(fields | family_fields(heads))))


def test_heads_are_described_and_taken_up(folder: Path, backbone: Backbone, store: Path) -> None:
    engine = tiny_engine(folder, backbone)
    assert engine.heads is None
    prepared = engine.prepare_heads(store)
    assert engine.heads is None, "preparing changes nothing"
    engine.use_heads(prepared)
    assert engine.heads == HeadsDescription("eagle", "2", "eagle", 3)
    engine.use_heads(engine.prepare_heads(store / "hydra@1"))
    assert engine.heads == HeadsDescription("hydra", "1", "hydra", 2)
    assert [drafter.name for drafter in engine._step.drafters] == ["head", "lookup"]
    engine.use_heads(engine.prepare_heads(None))
    assert engine.heads is None
    assert [drafter.name for drafter in engine._step.drafters] == ["lookup"]


def test_an_engine_tells_the_heads_that_it_was_loaded_with(folder: Path, store: Path) -> None:
    config = tiny_engine(folder, tiny_backbone(folder), heads=store, num_slots=2).config
    engine = Engine.load(config)
    assert engine.heads == HeadsDescription("eagle", "2", "eagle", 3)


@pytest.mark.parametrize("kind", [DrafterKind.HEADS, DrafterKind.NONE])
def test_the_drafters_that_were_chosen_are_kept(
    folder: Path, backbone: Backbone, store: Path, kind: DrafterKind
) -> None:
    engine = tiny_engine(folder, backbone, drafter=kind)
    if kind is DrafterKind.NONE:
        with pytest.raises(HeadsError, match="the engine's drafter is none: start it with another to use heads"):
            engine.prepare_heads(store)
        return
    assert [drafter.name for drafter in engine.prepare_heads(store).drafters] == ["head"]
    assert engine.prepare_heads(None).drafters == ()


def test_bad_heads_are_refused_and_the_old_ones_stay(
    tmp_path: Path, folder: Path, backbone: Backbone, store: Path
) -> None:
    engine = tiny_engine(folder, backbone)
    engine.use_heads(engine.prepare_heads(store / "hydra@1"))
    before = engine._step.drafters
    with pytest.raises(HeadsError, match="no such folder"):
        engine.prepare_heads(tmp_path / "nowhere")
    damaged = tmp_path / "eagle@2"
    damaged.mkdir()
    for path in (store / "eagle@2").iterdir():
        (damaged / path.name).write_bytes(path.read_bytes().replace(b"\x3f", b"\x40", 1))
    with pytest.raises(HeadsError):
        engine.prepare_heads(damaged)
    assert engine._step.drafters is before
    assert engine.heads is not None


def test_heads_that_cannot_draft_are_not_taken_up(folder: Path, backbone: Backbone) -> None:
    @dataclass
    class Broken:
        name: str = "head"
        is_costly: bool = True

        def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
            raise RuntimeError("wrong shapes")

    engine = tiny_engine(folder, backbone, adaptive=True)
    before = engine._step.drafters
    with pytest.raises(RuntimeError, match="wrong shapes"):
        engine.use_heads(PreparedHeads((Broken(),), HeadsDescription("broken", "1", "eagle", 1)))
    assert engine._step.drafters is before
    assert engine.heads is None


@dataclass
class Strict:
    """Remembers how many positions of every slot it was told, and insists on all of them, once and in order."""

    told: dict[int, int] = field(default_factory=dict)
    num_trees: int = 0
    name: str = "strict"
    is_costly: bool = True

    def for_slots(self, num_slots: int, num_positions: int) -> "Strict":
        return Strict()

    def observe(self, committed: Committed) -> None:
        rows = zip(committed.slots.tolist(), committed.starts.tolist(), committed.counts.tolist(), strict=True)
        for slot, start, count in rows:
            assert start in (0, self.told.get(slot, 0)), "a gap"
            self.told[slot] = start + count

    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        assert context.slots is not None
        for slot, length in zip(context.slots.tolist(), context.history_lengths.tolist(), strict=True):
            assert self.told[slot] == length - 1, "a sequence that it does not know"
        self.num_trees += len(context.slots)
        ranks = torch.zeros((len(context.slots), 1), dtype=torch.int64)
        return CandidateTree(context.root_tokens[:, None], ranks - 1, ranks - 0.5, ranks, source=self.name)


@pytest.mark.parametrize("seed", range(6))
def test_a_drafter_that_remembers_drafts_for_those_alone_that_it_knows(
    folder: Path, backbone: Backbone, seed: int
) -> None:
    """Prompts in portions, sequences that join, end and never speculate, and a new drafter now and then."""
    chance = random.Random(seed)
    engine = tiny_engine(folder, backbone, [Strict()], chunk_size=13, max_waiting=99)
    num_trees = []
    for _ in range(150):
        if chance.random() < 0.2:
            speculation = SpeculationParams(enabled=chance.random() < 0.7)
            sampling = SamplingParams(max_tokens=chance.randrange(1, 25), ignore_eos=True)
            engine.submit(engine.request(chance.choice(PROMPTS), sampling, speculation))
        if chance.random() < 0.08:
            num_trees.append(engine._step.drafters[0].num_trees)  # type: ignore[attr-defined]
            engine.use_heads(PreparedHeads((Strict(),), None))
        engine.step()
    engine.abort()
    assert sum(num_trees) > 50, "those that came later were drafted for"


def test_fifty_swaps_under_load_leave_nothing_behind(folder: Path, backbone: Backbone, store: Path) -> None:
    sampling = SamplingParams(max_tokens=25, temperature=0.8, seed=4, ignore_eos=True)
    plain = tiny_engine(folder, backbone)
    expected = [
        run_all(plain, [plain.request(prompt, sampling, SpeculationParams(enabled=False))])[0].token_ids
        for prompt in PROMPTS
    ]
    engine = tiny_engine(folder, backbone, chunk_size=20, max_waiting=99, max_nodes=16)
    answers: dict[str, Answer] = {}
    gone = []
    for turn in range(50):
        engine.use_heads(engine.prepare_heads([store / "hydra@1", store / "eagle@2", None][turn % 3]))
        gone.append(weakref.ref(engine._step.drafters[0]))
        for _ in range(4):
            if engine.num_running + engine.num_waiting < 5:
                number = len(answers) % len(PROMPTS)
                request = engine.request(PROMPTS[number], sampling)
                answers[request.id] = Answer()
                engine.submit(request)
            take_all(answers, engine.step())
    while engine.has_work:
        take_all(answers, engine.step())
    assert len(answers) > 12
    for number, answer in enumerate(answers.values()):
        assert answer.token_ids == expected[number % len(PROMPTS)]
    assert sum(answer.end().metrics.num_draft_tokens for answer in answers.values()) > 0
    gc.collect()
    assert [reference() for reference in gone if reference() is not None] == [engine._step.drafters[0]]
