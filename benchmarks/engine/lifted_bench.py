"""What the parts of the lifted benchmark share: the model, how much is measured, streams and their steps."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from contest import Answer, read_questions
from lifted_model import lift_heads, load_nf4, serve, with_random_layers
from lifting import Lift, Shape

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.engine import Engine, EngineConfig, LoadedParts
from gorgon_engine.events import TokenEvent
from gorgon_engine.models.loading import BackboneWeights
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import Request, SpeculationParams

STEP_NODES = (1, 8, 16, 32, 64)
CONTROL_NODES = (1, 16, 32, 64)
BATCHES = (8, 32)
_WARM_UP = 3  # answers, in which the sizes that occur are compiled and captured


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured."""

    limit: int = 80  # questions
    tokens: int = 128  # of an answer
    seconds: float = 75.0  # of a table of one stream: no further question begins after so long
    context: int = 2048
    long_context: int = 4096  # of the memory part
    step_nodes: tuple[int, ...] = STEP_NODES
    control_nodes: tuple[int, ...] = CONTROL_NODES
    batches: tuple[int, ...] = BATCHES
    rounds: int = 2  # of a batch
    check_prompts: int = 8
    check_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure that has to be reached."""

    name: str
    value: float
    limit: float
    at_least: bool = True

    @property
    def is_met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.name:58} {self.value:10.3f}  {sign} {self.limit:<8g} {'met' if self.is_met else 'MISSED'}"


@dataclass(frozen=True, slots=True)
class Section:
    """What one part measured."""

    name: str
    title: str
    lines: list[str]
    data: dict[str, Any]
    bars: list[Bar] = field(default_factory=list)

    def text(self) -> str:
        return "\n".join([f"\n{self.title}", *self.lines])


class Bench:
    """What the parts share, made when the first of them needs it. Nothing is held twice: the lifted weights are made
    anew for whoever needs them, in seconds and always the same."""

    def __init__(
        self,
        folder: Path,
        target: Shape,
        *,
        device: torch.device,
        heads: Path | None = None,
        graphs: bool = True,
        run_ahead: bool = True,
    ) -> None:
        """heads: a checkpoint of EAGLE heads for the model in `folder`; None = those that come with the program.
        graphs, run_ahead: as of `EngineConfig`."""
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._folder = folder
        self._target = target
        self._heads = heads
        self._steps = {"graphs": graphs, "run_ahead": run_ahead}

    @cached_property
    def small(self) -> BackboneWeights:
        """The model inside, in NF4."""
        return load_nf4(self._folder, device=self.device, dtype=self.dtype)

    @cached_property
    def parts(self) -> LoadedParts:
        """The lifted model as it is served."""
        began = time.perf_counter()
        parts = self._serve(self.lifted())
        say(f"{parts.backbone.kernels}, {parts.heads}: ready in {time.perf_counter() - began:.1f} s")
        for notice in parts.notices:
            say(f"note: {notice}")
        if parts.heads is None:
            say("note: no heads come with the program for this model: drafts are looked up alone, or give --heads")
        return parts

    def lifted(self) -> BackboneWeights:
        return self._lift().backbone(self.small)

    def control(self) -> LoadedParts:
        """The same with random layers."""
        return self._serve(with_random_layers(self.lifted(), torch.Generator(self.device).manual_seed(1)))

    def _lift(self) -> Lift:
        return Lift(self.small.config, self._target, torch.Generator(self.device).manual_seed(0))

    def _serve(self, weights: BackboneWeights) -> LoadedParts:
        heads = lift_heads(self._lift(), self._folder, self._heads, device=self.device, dtype=self.dtype)
        return serve(weights, self.dtype, heads, self._folder)

    def engine(self, options: Options, parts: LoadedParts | None = None, **changes: Any) -> Engine:
        """changes: of the configuration."""
        defaults: dict[str, Any] = {"model": str(self._folder), "context": options.context, **self._steps}
        return Engine.of_parts(parts or self.parts, EngineConfig(**(defaults | changes)))

    def plain_engine(self, backbone: Backbone, options: Options, **changes: Any) -> Engine:
        """Of another backbone with the same tokens, and no drafters."""
        parts = LoadedParts(backbone=backbone, tokenizer=self.parts.tokenizer, drafters=(), notices=())
        return self.engine(options, parts, adaptive=False, **changes)

    def prompts(self, engine: Engine, count: int) -> list[list[int]]:
        return [list(chat(engine, question).prompt) for question in read_questions(count)]


def say(line: str) -> None:
    print(line, flush=True)


def graphs_line(engine: Engine) -> str:
    """How the steps ran."""
    stats = engine.graph_stats
    if stats is None:
        return "no graphs: every step was launched kernel by kernel"
    eager = ", ".join(f"{count} {reason}" for reason, count in stats.num_eager.items()) or "none"
    return (
        f"{stats.num_graphs} graphs, recorded in {stats.capture_seconds:.1f} s, {stats.replayed_share:.1%} of the "
        f"steps replayed, without one: {eager}"
    )


def chat(engine: Engine, question: str) -> Request:
    return engine.request([{"role": "user", "content": question}])


@dataclass(frozen=True, slots=True)
class Spoken(Answer):
    """An answer, and the steps that it took."""

    num_steps: int
    num_accepted: int


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream of an engine, speculating or not."""

    name: str
    engine: Engine
    speculate: bool
    temperature: float = 0.0

    def request(self, prompt_ids: list[int], num_tokens: int) -> Request:
        sampling = SamplingParams(
            max_tokens=num_tokens, temperature=self.temperature, seed=len(prompt_ids), ignore_eos=True
        )
        return self.engine.request(prompt_ids, sampling, SpeculationParams(enabled=self.speculate))

    def answer(self, prompt_ids: list[int], num_tokens: int) -> Spoken:
        request = self.request(prompt_ids, num_tokens)
        token_ids: list[int] = []
        began = first = last = time.perf_counter()
        for event in self.engine.generate(request):
            if isinstance(event, TokenEvent):
                last = time.perf_counter()
                first = first if token_ids else last
                token_ids += event.token_ids
            else:
                metrics = event.metrics
        return Spoken(token_ids, first - began, last - first, metrics.num_spec_steps, metrics.num_accepted_draft_tokens)


def take_turns(
    streams: Sequence[Stream], prompts: Sequence[list[int]], num_tokens: int, seconds: float
) -> dict[str, list[Spoken]]:
    """Every prompt to every stream, another one first each time; some answers before to warm up. At least one prompt,
    and no further one after so many seconds."""
    for prompt in prompts[:_WARM_UP]:
        for stream in streams:
            stream.answer(prompt, num_tokens)
    answers: dict[str, list[Spoken]] = {stream.name: [] for stream in streams}
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        if number and time.perf_counter() - began > seconds:
            break
        start = number % len(streams)
        for stream in [*streams[start:], *streams[:start]]:
            answers[stream.name].append(stream.answer(prompt, num_tokens))
    return answers


@dataclass(frozen=True, slots=True)
class Step:
    seconds: float
    num_nodes: int
    num_tokens: int


def timed_steps(engine: Engine, request: Request) -> list[Step]:
    """The decoding steps of one answer."""
    engine.submit(request)
    steps = []
    while engine.has_work:
        began = time.perf_counter()
        events = engine.step()
        seconds = time.perf_counter() - began
        tokens = [event for event in events if isinstance(event, TokenEvent) and event.step > 0]
        steps += [Step(seconds / len(tokens), event.num_nodes, len(event.token_ids)) for event in tokens]
    return steps
