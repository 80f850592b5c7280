"""Start-up measurement: whatever the machine's speed, a cost model that can be used, and slots as they were."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.calibration import Calibration, DraftSeconds, _Stopwatch, calibrate, calibrate_drafters
from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.tree.candidates import CandidateTree
from support.drafters import RandomDrafter
from support.engines import TINY_VOCAB, run_all, tiny_backbone, tiny_engine, tiny_folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("calibration") / "tiny")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return tiny_backbone(folder)


@dataclass
class Costly(RandomDrafter):
    """Says that it runs a network, and notes the lengths of the texts that it drafts for."""

    is_costly: bool = True
    lengths: list[list[int]] = field(default_factory=list)

    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        self.lengths.append(context.history_lengths.tolist())
        return super().propose(context, max_nodes)


def check(calibration: Calibration, *, batches: tuple[int, ...], rows: tuple[int, ...]) -> None:
    model = calibration.cost_model
    assert model.plain is not None
    assert (model.plain.counts, model.rows) == (batches, rows)
    for curve in (model.plain.seconds, model.seconds, calibration.prefill.seconds):
        assert list(curve) == sorted(curve)
        assert 0.0 < curve[0] < 5.0
    assert calibration.plain_tokens_per_second == pytest.approx(1.0 / model.plain_seconds(1))
    assert model.step_seconds(1) == pytest.approx(model.plain_seconds(1))
    assert model.tree_seconds(3) >= model.tree_seconds(1) > 0.0


@pytest.mark.parametrize(
    ("num_slots", "max_nodes", "batches", "rows"),
    [
        (1, 32, (1,), (1, 2, 4, 8, 16, 32)),
        (1, 1, (1,), (1, 2, 4)),
        (3, 20, (1, 2, 3), (1, 2, 4, 8, 16, 20)),
        (16, 8, (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32, 64)),
    ],
)
def test_every_size_is_measured(
    folder: Path, backbone: Backbone, num_slots: int, max_nodes: int, batches: tuple[int, ...], rows: tuple[int, ...]
) -> None:
    engine = tiny_engine(folder, backbone, [NgramDrafter()], num_slots=num_slots, max_nodes=max_nodes, adaptive=True)
    assert engine.calibration is not None
    check(engine.calibration, batches=batches, rows=rows)
    assert engine.calibration.costly_draft is None
    assert engine.calibration.prefill.counts == (32, 128)
    speeds = [engine.plain_tokens_per_second(size) for size in (1, num_slots)]
    assert speeds[0] is not None
    assert speeds[1] is not None
    assert speeds[0] >= speeds[1] > 0.0


def test_a_short_context_is_room_enough(folder: Path, backbone: Backbone) -> None:
    drafter = Costly(TINY_VOCAB)
    engine = tiny_engine(folder, backbone, [drafter], context=4, num_slots=2, adaptive=True, chunk_size=3)
    assert engine.calibration is not None
    assert engine.calibration.prefill.counts == (3,)
    assert {length for lengths in drafter.lengths for length in lengths} == {4}
    answer = run_all(engine, [engine.request([5, 6], SamplingParams(ignore_eos=True))])[0]
    assert len(answer.token_ids) == 2


def test_the_slots_are_given_back_empty(folder: Path, backbone: Backbone) -> None:
    drafter = Costly(TINY_VOCAB)
    engine = tiny_engine(folder, backbone, [drafter], num_slots=4)
    step = engine._step
    calibration = calibrate(step)
    assert step.cache.num_free_slots == 4
    assert isinstance(calibration.costly_draft, DraftSeconds)
    assert {len(lengths) for lengths in drafter.lengths} == {1, 4}
    assert int(step.cache.lengths[step.cache.acquire()]) == 0
    plain = tiny_engine(folder, backbone, (), num_slots=4)
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    answers = [run_all(one, [one.request([5, 6, 7], sampling)])[0].token_ids for one in (engine, plain)]
    assert answers[0] == answers[1]


def test_new_drafters_are_measured_beside_what_runs(folder: Path, backbone: Backbone) -> None:
    engine = tiny_engine(folder, backbone, [Costly(TINY_VOCAB)], num_slots=2)
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    expected = run_all(engine, [engine.request([5, 6, 7], sampling)])[0].token_ids
    request = engine.request([5, 6, 7], sampling)
    engine.submit(request)
    events = [*engine.step(), *engine.step()]
    step = engine._step
    before = (step.cache.lengths.clone(), step.cache.keys.clone(), step.drafting.history.clone())
    assert calibrate_drafters(step) is not None
    assert all(torch.equal(one, other) for one, other in zip(
        before, (step.cache.lengths, step.cache.keys, step.drafting.history), strict=True))  # fmt: skip
    while engine.has_work:
        events += engine.step()
    assert [token for event in events if hasattr(event, "token_ids") for token in event.token_ids] == expected
    step.drafting.use(step.drafting.bind([NgramDrafter()]))
    assert calibrate_drafters(step) is None


def test_an_engine_that_does_not_adapt_knows_no_speed(folder: Path, backbone: Backbone) -> None:
    engine = tiny_engine(folder, backbone)
    assert (engine.calibration, engine.plain_tokens_per_second(1)) == (None, None)
    answer = run_all(engine, [engine.request([5], SamplingParams(max_tokens=4, ignore_eos=True))])[0]
    assert answer.end().plain_tokens_per_second is None


def test_speeds_are_told_with_every_end(folder: Path, backbone: Backbone) -> None:
    engine = tiny_engine(folder, backbone, num_slots=1, adaptive=True)
    assert engine.calibration is not None
    answer = run_all(engine, [engine.request([5], SamplingParams(max_tokens=9, ignore_eos=True))])[0]
    end = answer.end()
    # One stream all the time: the plain speed of one.
    assert end.plain_tokens_per_second == pytest.approx(engine.calibration.plain_tokens_per_second)
    assert end.decode_seconds is not None
    assert end.tokens_per_second == pytest.approx(8 / end.decode_seconds)


def test_a_slow_round_counts_as_a_quick_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy for a whole round: the ratios stay."""
    watch = _Stopwatch(torch.device("cpu"))
    for slowdown in (50.0, 1.0, 3.0, 1.0):  # the first warms up
        watch.begin_round()
        for name, seconds in (("plain", 0.01), ("pass", 0.03)):
            watch.keep(name, 1, slowdown * seconds)
    assert watch.seconds("plain", 1, beside=("plain", 1)) == pytest.approx(0.01)
    assert watch.seconds("pass", 1, beside=("plain", 1)) == pytest.approx(0.03)


def test_a_slow_machine_is_measured_once(folder: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second round begins when the first has taken long enough."""
    passes = []
    forward = backbone.forward

    def counted(*arguments, **options):  # type: ignore[no-untyped-def]
        passes.append(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(backbone, "forward", counted)
    step = tiny_engine(folder, backbone)._step
    calibrate(step)
    usual = len(passes)
    passes.clear()
    ticks = iter(range(10**6))
    monkeypatch.setattr("gorgon_engine.calibration.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    calibrate(step)
    assert len(passes) == usual // 2, "two rounds of four, the first to warm up"
