"""Tokens per verification step, measured by the engine itself.

    prompts, settings = read_prompts(Path("mt_bench.jsonl")), MeasureSettings()
    parts = EngineParts.load(EngineConfig(model="smollm2", heads=folder, num_slots=320))
    for measurement in measure_nodes(parts.maker(prompts, settings), prompts, settings):
        print(measurement.max_nodes, measurement.results[0].answers.mean_acceptance_length)

Every answer is one request. All of them are queued at once, and the engine runs as many together as it has slots.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from time import perf_counter

from tqdm import tqdm

from gorgon_engine.engine import Engine
from gorgon_engine.events import FinishedEvent, TokenEvent
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import Request, SpeculationParams
from gorgon_protocol.errors import BadRequestError
from gorgon_protocol.metrics import SpeculativeDecodingMetrics
from gorgon_trainer.evaluation.figures import Measurement, SamplingResult, SourceFigures, StepFigures
from gorgon_trainer.evaluation.looping import is_looping
from gorgon_trainer.evaluation.predicted import REPORTED_NODES
from gorgon_trainer.evaluation.prompts import EvaluationPrompt, encode_prompts

_PLAIN = SpeculationParams(enabled=False)


@dataclass(frozen=True, slots=True)
class MeasureSettings:
    """What to run: by default the project's own figure, greedy and three seeds at T=0.7."""

    max_tokens: int = 256  # of an answer, unless it ends by itself
    greedy: bool = True
    temperature: float = 0.7
    seeds: tuple[int, ...] = (0, 1, 2)  # an answer to every prompt with each; none: greedy only
    trace: bool = False  # count drafts by source: every tree is read back, which takes time
    compare_plain: bool = False  # run everything without speculation too, and compare the tokens
    max_prompt_tokens: int | None = None  # longer prompts are left out, and counted

    def __post_init__(self) -> None:
        if not self.greedy and not self.seeds:
            raise BadRequestError("nothing to measure: neither greedy answers nor a seed are asked for")
        if self.seeds and self.temperature <= 0.0:
            raise BadRequestError(f"sampled answers need a temperature above 0: got {self.temperature}")
        if len(set(self.seeds)) != len(self.seeds):
            raise BadRequestError(f"seeds must differ: got {list(self.seeds)}")

    def samplings(self) -> list[tuple[float, tuple[int, ...]]]:
        """(temperature, seeds): every prompt is answered once with each seed of each."""
        greedy = [(0.0, (0,))] if self.greedy else []
        return [*greedy, (self.temperature, self.seeds)] if self.seeds else [*greedy]


@dataclass(slots=True)
class _Answer:
    """One request's events, as far as they are counted."""

    token_ids: list[int] = field(default_factory=list)
    metrics: SpeculativeDecodingMetrics | None = None
    drafted: Counter[str] = field(default_factory=Counter)  # by source
    accepted: Counter[str] = field(default_factory=Counter)

    def take(self, event: TokenEvent) -> None:
        self.token_ids += event.token_ids
        if event.trace is None or event.step == 0:
            return
        self.drafted.update(event.trace.sources)
        taken = [source for source, hit in zip(event.trace.sources, event.trace.accepted, strict=True) if hit]
        # A step that reaches the end of its answer keeps fewer than it accepted; counted as the metrics do.
        self.accepted.update(taken[: len(event.token_ids) - 1])


def measure(
    engine: Engine, prompts: Sequence[EvaluationPrompt], settings: MeasureSettings | None = None
) -> Measurement:
    """Answer all prompts with all samplings, and count what every step accepted.

    Raises `BadRequestError` before anything runs: for a prompt that does not fit the engine, and where none is left.
    """
    settings = settings or MeasureSettings()
    encoded = encode_prompts(engine.tokenizer, prompts, max_tokens=settings.max_prompt_tokens)
    requests = _requests(engine, encoded, settings, SpeculationParams())
    started = perf_counter()
    answers = _run(engine, requests)
    seconds = perf_counter() - started
    plain: list[list[_Answer]] | None = None
    if settings.compare_plain:
        plain = _run(engine, _requests(engine, encoded, settings, _PLAIN))
    results = []
    for number, (temperature, seeds) in enumerate(settings.samplings()):
        group = answers[number]
        results.append(
            SamplingResult(
                temperature=temperature,
                seeds=seeds,
                answers=_steps(group),
                non_looping=_steps([answer for answer in group if not is_looping(answer.token_ids)]),
                sources=_sources(group) if settings.trace else None,
                num_identical=None if plain is None else _num_identical(group, plain[number]),
            )
        )
    return Measurement(
        max_nodes=engine.config.max_nodes,
        adaptive=engine.config.adaptive,
        kernels=engine.backbone.kernels,
        num_prompts=len(encoded),
        num_skipped=len(prompts) - len(encoded),
        max_tokens=settings.max_tokens,
        num_tokens=sum(len(answer.token_ids) for group in answers for answer in group),
        seconds=seconds,
        results=tuple(results),
    )


def measure_nodes(
    make_engine: Callable[[int], Engine],
    prompts: Sequence[EvaluationPrompt],
    settings: MeasureSettings | None = None,
    nodes: Sequence[int] = REPORTED_NODES,
) -> Iterator[Measurement]:
    """The same for trees of each number of nodes, one engine after the other: each result as it comes.

    make_engine: from the most rows of a pass to an engine, as `EngineParts.maker` gives.
    """
    for max_nodes in nodes:
        yield measure(make_engine(max_nodes), prompts, settings)


def _requests(
    engine: Engine,
    encoded: Sequence[tuple[str, list[int]]],
    settings: MeasureSettings,
    speculation: SpeculationParams,
) -> list[list[Request]]:
    """The requests of each sampling. Raises `BadRequestError` naming the prompt that cannot run."""

    def request(where: str, tokens: list[int], temperature: float, seed: int) -> Request:
        sampling = SamplingParams(max_tokens=settings.max_tokens, temperature=temperature, seed=seed)
        try:
            return engine.request(tokens, sampling, speculation, trace=settings.trace and speculation.enabled)
        except BadRequestError as error:
            raise BadRequestError(f"{where}: {error}") from None

    return [
        [request(where, tokens, temperature, seed) for seed in seeds for where, tokens in encoded]
        for temperature, seeds in settings.samplings()
    ]


def _run(engine: Engine, groups: list[list[Request]]) -> list[list[_Answer]]:
    requests = [request for group in groups for request in group]
    answers = {request.id: _Answer() for request in requests}
    name = f"{engine.config.max_nodes} nodes" if requests[0].speculation.enabled else "plain"
    with (
        tqdm(total=len(requests), desc=name, unit="answer", disable=None, leave=False) as progress,
        closing(engine.generate(*requests)) as events,
    ):
        for event in events:
            answer = answers[event.request_id]
            if isinstance(event, FinishedEvent):
                answer.metrics = event.metrics
                progress.update()
            else:
                answer.take(event)
    return [[answers[request.id] for request in group] for group in groups]


def _steps(answers: Sequence[_Answer]) -> StepFigures:
    metrics = [answer.metrics for answer in answers if answer.metrics is not None]
    assert len(metrics) == len(answers), "every request ends with a terminal event"
    histogram: Counter[int] = Counter()
    for one in metrics:
        histogram.update(dict(enumerate(one.acceptance_histogram)))
    return StepFigures(
        num_answers=len(answers),
        num_steps=sum(one.num_spec_steps for one in metrics),
        num_draft_tokens=sum(one.num_draft_tokens for one in metrics),
        acceptance_histogram=tuple(histogram[i] for i in range(1 + max(histogram, default=-1))),
    )


def _sources(answers: Sequence[_Answer]) -> dict[str, SourceFigures]:
    drafted, accepted = Counter[str](), Counter[str]()
    for answer in answers:
        drafted.update(answer.drafted)
        accepted.update(answer.accepted)
    return {name: SourceFigures(num_drafted=drafted[name], num_accepted=accepted[name]) for name in sorted(drafted)}


def _num_identical(answers: Sequence[_Answer], plain: Sequence[_Answer]) -> int:
    return sum(one.token_ids == other.token_ids for one, other in zip(answers, plain, strict=True))
