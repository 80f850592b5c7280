"""Steps that are recorded and replayed say what steps that are run as they are say: sizes, padding, state, who drafts.

Here a recording does the work again on the same buffers; what a GPU's graph needs beside that, that no value is looked
at and nothing is copied from the host, is proved on tensors without values.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from gorgon_engine.acceptance import AcceptanceRule
from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.backbone.torch_backbone import TorchBackbone
from gorgon_engine.batch import RunningBatch
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.engine import Engine
from gorgon_engine.graphs import GraphedStep, num_slots_with_graphs
from gorgon_engine.heads.eagle import EagleShape
from gorgon_engine.heads.native import pack_eagle_for_cpu
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.loading import Quantization, load_weights
from gorgon_engine.models.rope import RotaryEmbedding
from gorgon_engine.prepared import PreparedHeads
from gorgon_engine.recording import CudaRecorder, Recording, RepeatingRecorder, _without_collections
from gorgon_engine.sampling import SamplingBatch, SamplingParams
from gorgon_engine.sequence import SpeculationParams
from gorgon_engine.step import SpeculativeStep, Wanted
from support.drafters import OracleDrafter, RandomDrafter
from support.eagle import make_head
from support.engines import TINY_VOCAB, Answer, run_all, take_all, tiny_backbone, tiny_engine, tiny_folder
from support.steps import prefill
from support.triton_checks import run_check

T = TypeVar("T")
PLAIN = SpeculationParams(enabled=False)
PROMPTS = [[5], [70, 71, 72, 70, 71, 72, 70], [number % 40 + 30 for number in range(60)], [300, 8, 8, 8]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("graphs") / "tiny")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return tiny_backbone(folder)


def recorded_engine(folder: Path, backbone: Backbone, drafters: list[Any], **options: Any) -> Engine:
    defaults: dict[str, Any] = {"max_nodes": 12, "recorder": RepeatingRecorder()}
    return tiny_engine(folder, backbone, drafters, **(defaults | options))


def eagle(backbone: Backbone, seed: int = 1) -> EagleDrafter:
    config = backbone.config
    sizes = (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size)
    head = pack_eagle_for_cpu(make_head(EagleShape(*sizes, num_heads=3), seed=seed), backbone)
    return EagleDrafter(head, embed=backbone.embed, project=backbone.project)


def stats_of(engine: Engine) -> Any:
    assert engine.graph_stats is not None
    return engine.graph_stats


def answers_of(engine: Engine, kinds: list[tuple[list[int], SamplingParams, SpeculationParams]]) -> list[list[int]]:
    answers = run_all(engine, [engine.request(*kind) for kind in kinds])
    return [answer.token_ids for answer in answers]


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("num_slots", [1, 5])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nearly_every_step_is_replayed_and_says_the_same(
    folder: Path, backbone: Backbone, temperature: float, num_slots: int, run_ahead: bool
) -> None:
    """Five slots: batches of five are run as they are, of fewer with padding, and all but one of the rows leave."""
    sampling = SamplingParams(max_tokens=40, temperature=temperature, seed=3, ignore_eos=True)
    kinds = [(p, replace(sampling, max_tokens=40 - 6 * n), SpeculationParams()) for n, p in enumerate(PROMPTS)]
    kinds.append(([9, 9, 9], sampling, SpeculationParams(max_nodes=3)))
    expected = answers_of(tiny_engine(folder, backbone, (), num_slots=1), kinds)
    engine = recorded_engine(folder, backbone, [NgramDrafter()], num_slots=num_slots, run_ahead=run_ahead)
    assert answers_of(engine, kinds) == expected
    stats = stats_of(engine)
    assert stats.num_eager == {}
    assert 0 < stats.num_graphs <= stats.num_replayed
    first = stats.num_first_runs
    assert answers_of(engine, kinds) == expected
    assert stats.num_first_runs == first, "the second time all sizes are known"
    assert stats.replayed_share > 0.5
    assert engine._step.cache.num_free_slots == num_slots


def test_one_launch_ahead_wastes_no_more_than_a_step(folder: Path, backbone: Backbone) -> None:
    """Of a sequence whose last token can be counted not even that."""
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    for run_ahead in (False, True):
        engine = recorded_engine(folder, backbone, [], num_slots=1, run_ahead=run_ahead)
        assert len(answers_of(engine, [([5, 6], sampling, PLAIN)])[0]) == 20
        stats = stats_of(engine)
        assert stats.num_replayed + stats.num_first_runs == 1 + 19  # the prompt, and the steps
    steps = []
    for run_ahead in (False, True):
        engine = recorded_engine(folder, backbone, [], num_slots=1, run_ahead=run_ahead)
        plain = answers_of(engine, [([5, 6], sampling, PLAIN)])[0]
        before = stats_of(engine).num_replayed
        stop = replace(sampling, stop_token_ids=(plain[7],))
        assert answers_of(engine, [([5, 6], stop, PLAIN)])[0] == plain[: plain.index(plain[7]) + 1]
        steps.append(stats_of(engine).num_replayed - before)
    assert steps[1] == steps[0] + 1


@pytest.mark.parametrize("context", [24, 60, 128])
def test_answers_end_where_the_context_does(folder: Path, backbone: Backbone, context: int) -> None:
    """A step that is launched ahead must not write behind its slot: near the end none is."""
    prompt = [70, 71, 72, 70, 71, 72, 70]
    sampling = SamplingParams(ignore_eos=True)
    future = answers_of(tiny_engine(folder, backbone), [(prompt, sampling, PLAIN)])[0]
    oracle = OracleDrafter({tuple(prompt): future})
    kinds = [(prompt, sampling, SpeculationParams())] * 2
    for max_nodes in (4, 128):
        expected = answers_of(tiny_engine(folder, backbone, context=context), kinds)
        engine = recorded_engine(
            folder, backbone, [oracle], context=context, num_slots=2, max_nodes=max_nodes, max_depth=100
        )
        assert answers_of(engine, kinds) == expected
        assert len(expected[0]) == context - len(prompt)


def test_what_cannot_be_recorded_runs_as_it_is_and_is_counted(folder: Path, backbone: Backbone) -> None:
    engine = recorded_engine(folder, backbone, [NgramDrafter()], num_slots=4)
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    for kind, reason in (
        (([5], replace(sampling, presence_penalty=0.5), SpeculationParams()), "penalties"),
        (([5], replace(sampling, logit_bias={4: 1.0}), SpeculationParams()), "logit bias"),
        (([5], sampling, SpeculationParams(acceptance=AcceptanceRule.TYPICAL)), "acceptance rule"),
    ):
        assert len(answers_of(engine, [kind])[0]) == 8
        assert stats_of(engine).num_eager.pop(reason) > 0
        assert stats_of(engine).num_eager == {}


@dataclass
class Refusing(RepeatingRecorder):
    """A device on which nothing can be recorded."""

    asked: int = 0

    def record(self, work: Callable[[], T]) -> Recording[T]:
        self.asked += 1
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand much more")


def test_a_size_that_cannot_be_recorded_is_tried_once(
    folder: Path, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Refusing()
    engine = recorded_engine(folder, backbone, [], num_slots=1, recorder=recorder)
    kinds = [([5, 6], SamplingParams(max_tokens=20, ignore_eos=True), PLAIN)]
    assert answers_of(engine, kinds) == answers_of(tiny_engine(folder, backbone), kinds)
    assert recorder.asked == 1
    assert stats_of(engine).num_eager == {"not recorded": 18}
    assert "runs without a graph: CUDA error: operation not permitted when stream is capturing" in caplog.text
    assert "and much more" not in caplog.text


@dataclass
class Noting(RepeatingRecorder):
    """Counts how often it is told to forget."""

    forgotten: int = 0
    recorded: list[object] = field(default_factory=list)

    def record(self, work: Callable[[], T]) -> Recording[T]:
        self.recorded.append(work)
        return super().record(work)

    def forget(self) -> None:
        self.forgotten += 1


def test_other_drafters_are_recorded_anew_and_known_by_their_names(folder: Path, backbone: Backbone) -> None:
    """Sequences that run go on without the memory that the new drafter does not have of them, beside some that have."""
    recorder = Noting()
    engine = recorded_engine(
        folder, backbone, [eagle(backbone), NgramDrafter()], recorder=recorder, num_slots=4, run_ahead=False
    )
    sampling = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.5, seed=1)
    kinds = [(prompt, sampling, SpeculationParams()) for prompt in PROMPTS]
    expected = answers_of(tiny_engine(folder, backbone), kinds)
    requests = [engine.request(*kind, trace=True) for kind in kinds]
    answers = {request.id: Answer() for request in requests}
    for number, request in enumerate(requests):
        engine.submit(request)
        for _ in range(3):
            take_all(answers, engine.step())
        if number == 1:
            engine.use_heads(PreparedHeads((RandomDrafter(TINY_VOCAB), eagle(backbone, seed=2)), None))
    while engine.has_work:
        take_all(answers, engine.step())
    assert [answer.token_ids for answer in answers.values()] == expected
    assert recorder.forgotten == 1
    sources = [
        {source for event in answer.events if event.trace is not None for source in event.trace.sources}
        for answer in answers.values()
    ]
    assert sources[0] == {"head", "random"}, "of before the change, and of after it"
    assert sources[3] == {"random", "head"}


def test_a_memory_that_does_not_know_a_sequence_proposes_nothing_for_it(folder: Path, backbone: Backbone) -> None:
    engine = recorded_engine(folder, backbone, [], num_slots=3, run_ahead=False)
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    old = engine.request(PROMPTS[1], sampling, trace=True)
    answers = {old.id: Answer()}
    engine.submit(old)
    take_all(answers, engine.step())
    engine.use_heads(PreparedHeads((eagle(backbone),), None))
    young = engine.request(PROMPTS[2], sampling, trace=True)
    answers[young.id] = Answer()
    engine.submit(young)
    while engine.has_work:
        take_all(answers, engine.step())
    assert {event.num_nodes for event in answers[old.id].events} == {1}
    assert max(event.num_nodes for event in answers[young.id].events) == 12


def test_log_probabilities_and_traces_come_out_of_recordings(folder: Path, backbone: Backbone) -> None:
    sampling = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=3)
    results = []
    for recorder in (None, RepeatingRecorder()):
        engine = tiny_engine(folder, backbone, [NgramDrafter()], recorder=recorder, run_ahead=False, max_nodes=8)
        requests = [
            engine.request(PROMPTS[1], sampling, trace=True),
            engine.request(PROMPTS[0], replace(sampling, logprobs=None)),
        ]
        answers = run_all(engine, requests)
        results.append([[(e.token_ids, e.logprobs, e.trace) for e in answer.events] for answer in answers])
    assert stats_of(engine).num_replayed > 0
    assert [[e[0] for e in answer] for answer in results[0]] == [[e[0] for e in answer] for answer in results[1]]
    assert results[0] == results[1]


def test_steps_of_a_kind_are_measured_as_they_will_run(folder: Path, backbone: Backbone) -> None:
    """Start-up measures recordings, and leaves the slots and the state as if nothing had been."""
    recorder = Noting()
    engine = recorded_engine(
        folder, backbone, [eagle(backbone), NgramDrafter()], recorder=recorder, num_slots=3, adaptive=True
    )
    assert engine.calibration is not None
    assert engine.calibration.costly_draft is not None
    assert engine.calibration.cost_model.rows == (1, 2, 4, 8, 12)
    assert engine.calibration.cost_model.plain is not None
    assert engine.calibration.cost_model.plain.counts == (1, 2, 3)
    assert stats_of(engine).num_replayed > 10
    assert engine._step.cache.num_free_slots == 3
    kinds = [(p, SamplingParams(max_tokens=16, ignore_eos=True), SpeculationParams()) for p in PROMPTS]
    assert answers_of(engine, kinds) == answers_of(tiny_engine(folder, backbone), kinds)


# On a GPU graphs, elsewhere repetitions once more: the same work at the same sizes has the same bits.


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_graph_says_what_its_work_says(folder: Path, temperature: float) -> None:
    on_gpu = torch.cuda.is_available()
    options = BackboneOptions(
        quantization=Quantization.NONE, dtype=torch.float32, device="cuda" if on_gpu else "cpu", kernels=Kernels.TORCH
    )
    backbone = load_backbone(folder, options)[0]
    sampling = SamplingParams(max_tokens=40, temperature=temperature, seed=3, ignore_eos=True)
    kinds = [(p, replace(sampling, max_tokens=40 - 6 * n), SpeculationParams()) for n, p in enumerate(PROMPTS)]
    said = []
    for recorder in (RepeatingRecorder(), CudaRecorder(backbone.device) if on_gpu else RepeatingRecorder()):
        engine = recorded_engine(
            folder, backbone, [NgramDrafter(device=backbone.device)], recorder=recorder, num_slots=3
        )
        said.append([answers_of(engine, kinds) for _ in range(2)])
        assert stats_of(engine).num_eager == {}
        assert stats_of(engine).num_replayed > stats_of(engine).num_first_runs
    assert said[0] == said[1]


def test_nothing_is_collected_during_a_capture() -> None:
    """Graphs of an engine that is garbage would be destroyed in it."""
    with _without_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with _without_collections():
            pass
        assert not gc.isenabled(), "it was off before"
    finally:
        gc.enable()


# Tensors without values: where a GPU would have to wait for a value, they raise.

META = torch.device("meta")


def on_meta(value: Any) -> Any:
    """The same of tensors without values."""
    if isinstance(value, torch.Tensor):
        return value.to(META)
    if isinstance(value, tuple | list):
        return type(value)(on_meta(part) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: on_meta(getattr(value, f.name)) for f in fields(value) if f.init})
    return value


def graphed(backbone: Backbone, drafters: list[Any], *, num_slots: int, device: torch.device) -> GraphedStep:
    config = backbone.config
    cache = KVCache(
        num_layers=config.num_layers,
        num_slots=num_slots_with_graphs(num_slots),
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        capacity=256,
        max_scratch=128,
        dtype=backbone.cache_dtype,
        device=device,
    )
    return GraphedStep(backbone, cache, drafters, max_nodes=12, max_depth=6, recorder=RepeatingRecorder())


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(temperature=0.7), SamplingParams(temperature=0.7, top_p=0.9)],
    ids=["greedy", "drawn", "filtered"],
)
@pytest.mark.parametrize("wanted", [Wanted(draft=False), Wanted(), Wanted(trace=True, num_logprobs=2)])
def test_nothing_in_a_recording_looks_at_a_value(folder: Path, sampling: SamplingParams, wanted: Wanted) -> None:
    loaded = load_weights(folder, dtype=torch.float32)
    weights = on_meta(replace(loaded, rope=RotaryEmbedding(loaded.rope.config, META)))
    meta = TorchBackbone(weights, device=META, dtype=torch.float32, quantization=Quantization.NONE)
    drafter = NgramDrafter(device=META)
    step = graphed(meta, [drafter], num_slots=3, device=META)
    with torch.inference_mode():
        state_rows = torch.zeros(2, dtype=torch.int64, device=META)
        batch = RunningBatch(
            slots=state_rows,
            prompt_lengths=state_rows,
            root_tokens=state_rows,
            hidden=torch.zeros(2, meta.config.hidden_size, device=META),
            sampling=SamplingBatch.of([sampling] * 2, vocab_size=meta.config.vocab_size, device=META),
            counts=None,
            candidates=None,
        )
        for num_nodes in (1, 12):
            size = replace(step._size(batch, [num_nodes, 1], 40, wanted), width=num_nodes)
            outcome = step._advance_state(size, step._state(size.batch, batch))
            assert outcome.packed.device == META
            assert outcome.has_candidates == wanted.draft


def test_the_state_stays_where_recordings_look_for_it(backbone: Backbone) -> None:
    """Between two steps of the same sequences nothing is loaded; whatever else has made a state is."""
    step = graphed(backbone, [RandomDrafter(TINY_VOCAB)], num_slots=3, device=torch.device("cpu"))
    plain = graphed(backbone, [], num_slots=1, device=torch.device("cpu"))
    prompt = [5, 6, 7]
    result = prefill(step, prompt, SamplingParams(), chunk=8)
    expected = prefill(plain, prompt, SamplingParams(), chunk=8)
    tokens, wanted = [*result.tokens[0]], [*expected.tokens[0]]
    addresses = set()
    while len(tokens) < 30:
        result = run(step, result.batch, 12, len(prompt) + len(tokens) - 1)
        tokens += result.tokens[0]
        addresses.add(result.batch.hidden.data_ptr())
        if len(tokens) % 3 == 0:
            result = replace(result, batch=result.batch.select([0], [SamplingParams()]))
    while len(wanted) < 30:
        expected = run(plain, expected.batch, 1, len(prompt) + len(wanted) - 1)
        wanted += expected.tokens[0]
    assert tokens[:30] == wanted[:30]
    assert len(addresses) == 1


def run(step: SpeculativeStep, batch: RunningBatch, nodes: int, max_length: int) -> Any:
    return step.run(
        batch, [nodes] * len(batch.slots), max_length=max_length, rule=AcceptanceRule.LOSSLESS, wanted=Wanted()
    )


IN_KERNELS = f"""
import sys, tempfile
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.kernels import dispatch
from gorgon_engine.recording import RepeatingRecorder
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import SpeculationParams
from support.drafters import RandomDrafter
from support.engines import TINY_VOCAB, run_all, tiny_backbone, tiny_engine, tiny_folder

PROMPTS = [[5, 6, 7] * 3, [70, 71], [9], [300, 8, 8], [11, 12] * 2]
with tempfile.TemporaryDirectory() as place:
    folder = tiny_folder(Path(place))
    backbone = tiny_backbone(folder)
    kinds = [SamplingParams(max_tokens=6, temperature=0.8 * (n % 2), seed=n, ignore_eos=True) for n in range(5)]
    said = []
    for in_kernels in (False, True):
        dispatch.uses_triton = lambda tensor: in_kernels
        drafters = [NgramDrafter(num_chains=2, depth=3), RandomDrafter(TINY_VOCAB)] if in_kernels else []
        engine = tiny_engine(folder, backbone, drafters, recorder=RepeatingRecorder() if in_kernels else None,
                             num_slots=6, max_nodes=6, max_depth=3, context=64)
        requests = [engine.request(*kind) for kind in zip(PROMPTS, kinds)]
        said.append([answer.token_ids for answer in run_all(engine, requests)])
    assert said[0] == said[1], said
    assert engine.graph_stats.num_eager == {{}}
    assert engine.graph_stats.num_replayed > 0
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="native code and the kernels share no tensors on a GPU")
def test_padded_batches_go_through_the_kernels_of_a_gpu() -> None:
    """Five sequences as six rows, in Triton's interpreter: the same tokens as from native code."""
    run_check(IN_KERNELS)
