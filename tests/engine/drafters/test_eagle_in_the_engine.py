"""An EAGLE head in the engine: drafts never change the tokens, and what it remembers is right at every step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gorgon_engine.acceptance import AcceptanceRule
from gorgon_engine.backbone.base import Backbone, ForwardInputs
from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.drafters.base import Committed, DraftContext, Drafter
from gorgon_engine.drafters.beam import BeamLimits
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.events import FinishedEvent, TokenEvent
from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.heads.native import native_eagle, pack_eagle_for_cpu
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.loading import Quantization
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import SpeculationParams
from gorgon_engine.step import SpeculativeStep, Wanted
from gorgon_engine.tokenizer import Tokenizer
from gorgon_engine.tree.builders import cartesian_paths
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_engine.tree.cost_model import Effort
from support.drafters import OracleDrafter
from support.eagle import make_head
from support.models import tiny_llama
from support.searches import assert_same_nodes, nodes_of
from support.steps import prefill
from support.vocabularies import byte_level_bpe, save

VOCAB, CONTEXT, SAID = 352, 128, torch.arange(3, 352, 2)
# int8 rounds what the head computes in between, which may fall either way for the same row in another batch.
TOLERANCE = {"fp32": 1e-3, "int8": 0.15}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the program sets it beside the native kernels' own threads: torch's would wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("eagle") / "tiny", vocab_size=VOCAB)
    return save(byte_level_bpe(), folder, bos="<|endoftext|>", eos="<|im_end|>")


def load(folder: Path, kind: str) -> Backbone:
    quantization = Quantization.INT8 if kind == "int8" else Quantization.NONE
    options = BackboneOptions(quantization=quantization, dtype=torch.float32, kernels=Kernels.NATIVE, device="cpu")
    return load_backbone(folder, options)[0]


@pytest.fixture(scope="module", params=["fp32", "int8"])
def backbone(request: pytest.FixtureRequest, folder: Path) -> Backbone:
    return load(folder, request.param)


def shape_of(backbone: Backbone, num_heads: int) -> EagleShape:
    config = backbone.config
    return EagleShape(
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.intermediate_size,
        num_heads=num_heads,
    )


def random_head(backbone: Backbone) -> EagleHead:
    return pack_eagle_for_cpu(make_head(shape_of(backbone, 4)), backbone)


def make_engine(
    folder: Path, backbone: Backbone, drafters: Sequence[Drafter], *, max_nodes: int = 16, chunk_size: int = 512
) -> Engine:
    config = EngineConfig(max_nodes=max_nodes, adaptive=False, num_slots=3, context=CONTEXT, chunk_size=chunk_size)
    tokenizer = Tokenizer.from_folder(folder)
    return Engine(backbone=backbone, tokenizer=tokenizer, drafters=drafters, config=config)


PROMPTS = ([5], [70, 71, 72, 70, 71, 72, 70], list(range(100, 140)), [300, 8, 8, 8], list(range(60)), [9, 10])
LIMITS = (24, 9, 17, 24, 24, 3)  # of the answers, so that some leave, and others join, in the middle


def answers(engine: Engine, sampling: SamplingParams, *, speculate: bool) -> tuple[list[list[int]], int, int]:
    """The tokens of six prompts that share three slots, the steps it took, and the accepted drafts."""
    speculation = SpeculationParams(enabled=speculate)
    requests = [
        engine.request(prompt, replace(sampling, seed=number, max_tokens=limit), speculation)
        for number, (prompt, limit) in enumerate(zip(PROMPTS, LIMITS, strict=True))
    ]
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    steps = accepted = 0
    for event in engine.generate(*requests):
        if isinstance(event, TokenEvent):
            tokens[event.request_id] += event.token_ids
        elif isinstance(event, FinishedEvent):
            steps += event.metrics.num_spec_steps
            accepted += event.metrics.num_accepted_draft_tokens
    return list(tokens.values()), steps, accepted


def drafters_of(backbone: Backbone) -> Iterator[list[Drafter]]:
    """A random head in several trees, alone and beside a lookup."""
    head, project = random_head(backbone), backbone.project_to(SAID)

    def drafter(**options: Any) -> EagleDrafter:
        return EagleDrafter(head, embed=backbone.embed, project=project, draft_vocabulary=SAID, **options)

    native = native_eagle(head, backbone, SAID)
    assert native is not None
    for search in (None, native):
        yield [drafter(native=search)]
        yield [drafter(native=search, limits=BeamLimits(num_choices=6, width=4, min_path_prob=0.1))]
        yield [drafter(native=search), NgramDrafter()]
    yield [drafter(paths=cartesian_paths([4, 2, 1, 1], 100))]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_random_heads_change_nothing(folder: Path, backbone: Backbone, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, ignore_eos=True)
    expected, _, _ = answers(make_engine(folder, backbone, ()), sampling, speculate=False)
    sizes, chunks = (16, 30, 2, 16, 30, 2, 16), (512, 7, 1, 19, 1, 512, 7)
    for drafters, max_nodes, chunk in zip(drafters_of(backbone), sizes, chunks, strict=True):
        engine = make_engine(folder, backbone, drafters, max_nodes=max_nodes, chunk_size=chunk)
        assert answers(engine, sampling, speculate=True)[0] == expected


@dataclass
class Checked:
    """A drafter whose every tree is compared with that of one which knows nothing but the text so far."""

    inner: EagleDrafter
    backbone: Backbone
    tolerance: float
    num_checked: list[int] = field(default_factory=list)  # trees in each step
    num_observed: list[int] = field(default_factory=list)  # positions in each call
    name: str = "head"
    is_costly: bool = True

    def for_slots(self, num_slots: int, num_positions: int) -> "Checked":
        return replace(self, inner=self.inner.for_slots(num_slots, num_positions))

    def observe(self, committed: Committed) -> None:
        self.num_observed.append(int(committed.counts.sum()))
        self.inner.observe(committed)

    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        tree = self.inner.propose(context, max_nodes)
        for row, length in enumerate(context.history_lengths.tolist()):
            expected = self._afresh(context.history[row, :length], max_nodes)
            found, absolute = nodes_of(tree, row), min(self.tolerance, 1e-4)
            assert_same_nodes(found, nodes_of(expected, 0), tolerance=self.tolerance, absolute=absolute)
        self.num_checked.append(len(context.history))
        return tree

    def _afresh(self, tokens: torch.Tensor, max_nodes: int) -> CandidateTree:
        """The text in one pass of the backbone, remembered in one go."""
        count = len(tokens) - 1
        cache = make_cache(self.backbone, num_slots=1)
        inputs = ForwardInputs.chain(tokens[:-1], slot=cache.acquire(), length=0, prompt_length=count)
        hidden = self.backbone.forward(inputs, cache).hidden
        fresh, slot, start = self.inner.for_slots(1, count), torch.tensor([0]), torch.tensor([0])
        fresh.observe(Committed(slot, start, hidden, tokens[None, 1:], torch.tensor([count])))
        context = DraftContext(
            root_tokens=tokens[-1:],
            hidden=hidden[:, -1],
            history=tokens[None],
            history_lengths=torch.tensor([count + 1]),
            seeds=torch.tensor([0]),
            slots=slot,
        )
        return fresh.propose(context, max_nodes)


@dataclass
class Fallible:
    """An oracle that is wrong at every fifth position of a text: branches of all lengths are accepted."""

    oracle: OracleDrafter
    name: str = "fallible"
    is_costly: bool = False

    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        right = self.oracle.propose(context, max_nodes)
        positions = context.history_lengths[:, None] + torch.arange(max_nodes)
        return replace(right, tokens=torch.where(positions % 5 == 0, (right.tokens + 1) % VOCAB, right.tokens))


def make_cache(backbone: Backbone, *, num_slots: int) -> KVCache:
    config = backbone.config
    return KVCache(
        num_layers=config.num_layers,
        num_slots=num_slots,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        capacity=CONTEXT,
        max_scratch=128,
        dtype=backbone.cache_dtype,
        device=backbone.device,
    )


def checked(backbone: Backbone, *, in_one_call: bool = True) -> Checked:
    """In one call to the bit, however the text was cut."""
    project, head = backbone.project_to(SAID), random_head(backbone)
    native = native_eagle(head, backbone, SAID) if in_one_call else None
    drafter = EagleDrafter(head, embed=backbone.embed, project=project, draft_vocabulary=SAID, native=native)
    tolerance = TOLERANCE[backbone.kernels.rpartition("-")[2]]
    return Checked(drafter, backbone, tolerance if native is None else 0.0)


@pytest.mark.parametrize("in_one_call", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_is_remembered_is_right_at_every_step(
    folder: Path, backbone: Backbone, temperature: float, in_one_call: bool
) -> None:
    """Prompts in chunks, branches of all lengths, sequences that join and leave, slots that others had before."""
    sampling = SamplingParams(temperature=temperature, ignore_eos=True)
    expected, _, _ = answers(make_engine(folder, backbone, ()), sampling, speculate=False)
    futures = {tuple(prompt): answer for prompt, answer in zip(PROMPTS, expected, strict=True)}
    drafter = checked(backbone, in_one_call=in_one_call)
    engine = make_engine(folder, backbone, [Fallible(OracleDrafter(futures)), drafter], chunk_size=7)
    tokens, steps, accepted = answers(engine, sampling, speculate=True)
    assert tokens == expected
    assert sum(drafter.num_checked) >= steps
    assert max(drafter.num_checked) >= 2, "there were batches, beside prompts in chunks"
    assert accepted / steps > 1.5, "there were branches"
    # Everything but each sequence's last token.
    assert sum(drafter.num_observed) >= sum(map(len, PROMPTS)) + sum(map(len, tokens)) - len(tokens)


@pytest.mark.parametrize("in_one_call", [True, False])
def test_a_drafter_that_pauses_remembers_all_the_same(folder: Path, backbone: Backbone, in_one_call: bool) -> None:
    drafter = checked(backbone, in_one_call=in_one_call)
    step = SpeculativeStep(
        backbone, make_cache(backbone, num_slots=2), [drafter, NgramDrafter()], max_nodes=8, max_depth=6
    )
    prompt = [70, 71, 72, 70, 71, 72, 70, 71]
    paused = Wanted(effort=Effort(costly=False))
    result = prefill(step, prompt, SamplingParams(), chunk=3, wanted=paused)
    length = len(prompt)
    for turn in range(12):
        nodes = 1 + sum(probability > 0 for probability in result.path_probs[0])
        wanted = paused if turn % 4 else Wanted()
        result = step.run(result.batch, [nodes], max_length=length, rule=AcceptanceRule.LOSSLESS, wanted=wanted)
        length += len(result.tokens[0])
    assert len(drafter.num_checked) == 3
    assert sum(drafter.num_observed) == length


@pytest.mark.parametrize(("speculate", "max_nodes"), [(False, 16), (True, 1)])
def test_who_does_not_speculate_pays_nothing(folder: Path, backbone: Backbone, speculate: bool, max_nodes: int) -> None:
    drafter = checked(backbone)
    engine = make_engine(folder, backbone, [drafter], max_nodes=max_nodes, chunk_size=7)
    answers(engine, SamplingParams(ignore_eos=True), speculate=speculate)
    assert (drafter.num_observed, drafter.num_checked) == ([], [])


@pytest.fixture(scope="module")
def successor(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The same model without attention and MLP: a token alone says which one follows."""
    copy = tmp_path_factory.mktemp("successor") / "tiny"
    copy.mkdir()
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_head_that_is_right_is_accepted(successor: Path, kind: str, temperature: float) -> None:
    """Weights that copy the embedding of the last drafted token: what the backbone itself will compute there."""
    backbone = load(successor, kind)
    head = make_head(shape_of(backbone, 3))
    size = head.hidden_size
    for name, parameter in head.named_parameters():
        parameter.fill_(1.0 if name.endswith("norm") else 0.0)
        if name == "fc.weight":
            parameter[:, size:].fill_diagonal_(1.0)
    packed = pack_eagle_for_cpu(head, backbone)
    sampling = SamplingParams(temperature=temperature, ignore_eos=True)
    expected, _, _ = answers(make_engine(successor, backbone, ()), sampling, speculate=False)
    assert len({token for row in expected for token in row}) > 10
    # The likeliest chain, and a tree with room for what the temperature draws instead.
    native = native_eagle(packed, backbone, None)
    chain = BeamLimits(num_choices=1, width=1)
    searches: list[tuple[dict[str, Any], int]] = [
        ({"paths": [(0,), (0, 0), (0, 0, 0)]}, 4),
        ({}, 60),
        ({"native": native, "limits": chain}, 4),
        ({"native": native}, 60),
    ]
    for options, max_nodes in searches:
        drafter = EagleDrafter(packed, embed=backbone.embed, project=backbone.project, **options)
        engine = make_engine(successor, backbone, [drafter], max_nodes=max_nodes)
        tokens, steps, accepted = answers(engine, sampling, speculate=True)
        assert tokens == expected
        if temperature > 0.0:
            assert accepted / steps > 0.5
        elif kind == "fp32":
            # Behind the first token four a step, to the end: 23, 8, 16, 23, 23 and 2 tokens.
            assert (steps, accepted) == (6 + 2 + 4 + 6 + 6 + 1, 95 - 25), "every guess of every step"
        else:  # int8 rounds the head's inputs, as it does not round the backbone's embeddings
            assert accepted / steps > 2.0
