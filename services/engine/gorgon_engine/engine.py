"""The engine as a library: load a model, generate.

engine = Engine.load(EngineConfig(model="smollm2"))
for event in engine.generate(engine.request("The capital of France is", SamplingParams(max_tokens=32))):
    ...
"""

import itertools
from collections import deque
from collections.abc import Generator, Iterable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import BackboneOptions, load_backbone
from gorgon_engine.budget import CostlyDrafting, TreeBudget
from gorgon_engine.calibration import Calibration, DraftSeconds, calibrate, calibrate_drafters
from gorgon_engine.detokenizer import IncrementalDetokenizer
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.drafters.select import DrafterKind, HeadsTree
from gorgon_engine.events import Event, FailedEvent, FinishedEvent, TokenEvent
from gorgon_engine.graphs import GraphedStep, GraphStats, num_slots_with_graphs
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.memory_plan import EngineShape, check_engine_fits, free_bytes
from gorgon_engine.models.catalog import resolve_model
from gorgon_engine.prepared import DrafterMaker, HeadsDescription, PreparedHeads
from gorgon_engine.recording import CudaRecorder, Recorder
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.scheduler import Scheduler, SchedulerLimits
from gorgon_engine.sequence import Request, Sequence, SpeculationParams
from gorgon_engine.step import SpeculativeStep
from gorgon_engine.tokenizer import ChatMessage, Tokenizer
from gorgon_engine.tree.tree import MAX_NODES
from gorgon_protocol.errors import BadRequestError, ContextLengthError

# A text to continue, chat messages, or token ids.
Prompt = str | SequenceABC[ChatMessage] | SequenceABC[int]

_DEFAULT_CONTEXT = 8192  # positions a sequence may fill unless asked otherwise: 128k contexts are gigabytes a slot


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to build an engine. `model` is a folder, a catalogue name or a hub name."""

    model: str = "smollm2"
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    heads: Path | None = None  # None: those that come with the program for this backbone, if any
    drafter: DrafterKind | None = None  # None: heads and lookup where there are heads, else lookup
    heads_tree: HeadsTree = HeadsTree.DYNAMIC
    draw_drafts: bool = False  # draw the heads' guesses, as the rejection rule needs them, instead of the likeliest
    max_nodes: int = 32
    max_depth: int = 16
    adaptive: bool = True  # size trees by the cost model; False: always the largest
    num_slots: int = 1
    context: int | None = None  # positions a sequence, prompt and answer; None: the model's own, at most 8192
    chunk_size: int = 512  # positions of prompts that one pass runs while nothing is decoding
    max_waiting: int = 64  # requests beside those for which a slot is free
    max_stall_steps: float = 2.0  # plain steps that a part of a prompt may take while others are decoding
    graphs: bool = True  # on a GPU: steps are recorded, and launched as one
    run_ahead: bool = True  # with graphs: launch a step before the last one is read

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_nodes", 1, MAX_NODES),
            ("max_depth", 1, MAX_NODES - 1),
            ("num_slots", 1, 4096),
            ("chunk_size", 1, 65536),
            ("max_waiting", 0, 1_000_000),
            ("max_stall_steps", 0.0, 1_000_000.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise BadRequestError(f"{name} must be between {low} and {high}: got {value}")


@dataclass(frozen=True, slots=True)
class LoadedParts:
    """What an engine is made of, and what costs time and memory to load: several engines may share it."""

    backbone: Backbone
    tokenizer: Tokenizer
    drafters: tuple[Drafter, ...]
    notices: tuple[str, ...]
    heads: HeadsDescription | None = None  # among the drafters


def load_parts(config: EngineConfig) -> LoadedParts:
    """Read the model, choose kernels, make drafters. Raises `GorgonError` subclasses."""
    folder = resolve_model(config.model)
    backbone, notices = load_backbone(folder, config.backbone, max_depth=config.max_depth)
    prepared = _maker(config, backbone, folder).first(config.heads)
    return LoadedParts(
        backbone=backbone,
        tokenizer=Tokenizer.from_folder(folder),
        drafters=prepared.drafters,
        notices=(*notices, *prepared.notices),
        heads=prepared.heads,
    )


class Engine:
    """One backbone, its cache and drafters, and the loop over them.

    Not thread-safe: one thread drives it (`submit`, `cancel`, `step`, `use_heads`, `abort`). `request` and
    `prepare_heads` are for any thread.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        tokenizer: Tokenizer,
        drafters: Iterable[Drafter],
        config: EngineConfig,
        notices: Iterable[str] = (),
        heads: HeadsDescription | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """heads: what the drafters draft with, for `heads` to tell. recorder: of steps; None: CUDA graphs on a GPU
        unless the configuration says otherwise, nothing elsewhere."""
        shape = backbone.config
        context = config.context or min(shape.max_positions, _DEFAULT_CONTEXT)
        if context > shape.max_positions:
            raise BadRequestError(f"context {context} is longer than the model's {shape.max_positions} positions")
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.config = config
        self.notices = tuple(notices)
        self.context = context
        self.heads = heads
        if recorder is None and config.graphs and backbone.device.type == "cuda":
            recorder = CudaRecorder(backbone.device)
        if backbone.device.type == "cuda":
            _check_memory(backbone, config, context, graphs=recorder is not None)
        cache = KVCache(
            num_layers=shape.num_layers,
            num_slots=config.num_slots if recorder is None else num_slots_with_graphs(config.num_slots),
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            capacity=context,
            max_scratch=MAX_NODES,
            dtype=backbone.cache_dtype,
            device=backbone.device,
        )
        self._step = _make_step(config, backbone, cache, tuple(drafters), recorder)
        self.calibration: Calibration | None = None
        if config.adaptive:
            self.calibration = calibrate(self._step, chunk_size=config.chunk_size)
        self._scheduler = Scheduler(
            self._step,
            _budget(config, self.calibration),
            SchedulerLimits(chunk_size=config.chunk_size, max_waiting=config.max_waiting),
        )
        self._eos_token_ids = frozenset(shape.eos_token_ids)
        self._numbers = itertools.count(1)

    @classmethod
    def load(cls, config: EngineConfig) -> Self:
        """Read the model, choose kernels, make drafters, measure the machine. Raises `GorgonError` subclasses."""
        return cls.of_parts(load_parts(config), config)

    @classmethod
    def of_parts(cls, parts: LoadedParts, config: EngineConfig) -> Self:
        """An engine of what `load_parts` gave for this configuration."""
        return cls(
            backbone=parts.backbone,
            tokenizer=parts.tokenizer,
            drafters=parts.drafters,
            config=config,
            notices=parts.notices,
            heads=parts.heads,
        )

    @property
    def num_slots(self) -> int:
        """Sequences that can run at once."""
        return self.config.num_slots

    @property
    def num_running(self) -> int:
        """Sequences in a slot."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return self._scheduler.num_waiting

    @property
    def has_work(self) -> bool:
        """Whether anything that was submitted has not ended: `step` has something to do."""
        return self._scheduler.has_work

    @property
    def kv_cache_usage(self) -> float:
        """Share of the cache's positions in use, 0 to 1."""
        return min(self._scheduler.num_committed / (self.num_slots * self.context), 1.0)

    @property
    def graph_stats(self) -> GraphStats | None:
        """How many steps ran as graphs, and why others did not; None where there are no graphs."""
        return self._step.stats if isinstance(self._step, GraphedStep) else None

    def plain_tokens_per_second(self, batch_size: int) -> float | None:
        """Plain decoding of each of so many streams, as calibrated; None for an engine that was not."""
        return None if self.calibration is None else 1.0 / self.calibration.cost_model.plain_seconds(batch_size)

    def request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        speculation: SpeculationParams | None = None,
        *,
        trace: bool = False,
        generated: SequenceABC[int] = (),
        client: str = "",
        timeout_seconds: float | None = None,
        request_id: str | None = None,
    ) -> Request:
        """A request of a text, of chat messages, or of token ids.

        generated: tokens of the answer that were said before: it goes on behind them as if never interrupted, given
        the same seed. client: whose request it is; those of one client wait behind each other. timeout_seconds: of
        waiting for a slot. request_id: None = a new one. Raises `BadRequestError` for what cannot run,
        `ContextLengthError` for what does not fit.
        """
        tokens, generated = self._tokens(prompt), tuple(generated)
        if not tokens:
            raise BadRequestError("the prompt is empty: give at least one token of text")
        self._check_vocabulary(tokens, "the prompt holds")
        self._check_vocabulary(generated, "generated_token_ids holds")
        self._check_length(len(tokens), len(generated))
        sampling, speculation = sampling or SamplingParams(), speculation or SpeculationParams()
        self._check_vocabulary(sampling.logit_bias, "logit_bias names")
        limit = speculation.max_nodes
        if limit is not None and not 1 <= limit <= self.config.max_nodes:
            raise BadRequestError(f"max_nodes must be between 1 and {self.config.max_nodes}: got {limit}")
        if timeout_seconds is not None and not timeout_seconds > 0.0:
            raise BadRequestError(f"timeout_seconds must be above 0: got {timeout_seconds}")
        return Request(
            id=f"request-{next(self._numbers)}" if request_id is None else request_id,
            prompt=tuple(tokens),
            sampling=sampling,
            speculation=speculation,
            trace=trace,
            generated=generated,
            client=client,
            timeout_seconds=timeout_seconds,
        )

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        messages = [part for part in prompt if not isinstance(part, int)]
        if messages:
            return self.tokenizer.encode_chat(messages)
        return [part for part in prompt if isinstance(part, int)]

    def _check_vocabulary(self, tokens: Iterable[int], what: str) -> None:
        vocab_size = self.backbone.config.vocab_size
        bad = next((t for t in tokens if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise BadRequestError(f"{what} token {bad}: the vocabulary has {vocab_size} tokens")

    def _check_length(self, prompt: int, generated: int) -> None:
        if prompt >= self.context:
            raise ContextLengthError(
                f"the prompt is {prompt} tokens long and the context holds {self.context}, the answer included: "
                "shorten the prompt or raise the context"
            )
        if prompt + generated > self.context:
            raise ContextLengthError(
                f"the prompt is {prompt} tokens long and {generated} were generated, but the context holds "
                f"{self.context}: go on where the context is as long as it was"
            )

    def submit(self, request: Request) -> None:
        """Queue a request; `step` runs it.

        Raises `QueueFullError` where `max_waiting` wait already, `BadRequestError` for an id that is in use.
        """
        sampling = request.sampling
        detokenizer = IncrementalDetokenizer(self.tokenizer, sampling.stop)
        stops = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops |= self._eos_token_ids
        self._scheduler.submit(Sequence(request, detokenizer, stop_token_ids=stops))

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; unknown or ended ids are ignored."""
        self._scheduler.cancel(request_id)

    def step(self) -> list[Event]:
        """Run one step of everything queued and running. Every request ends with one Finished- or FailedEvent."""
        return self._scheduler.step()

    def abort(self) -> list[Event]:
        """End everything now; each request gets its terminal event."""
        return self._scheduler.abort()

    def prepare_heads(self, heads: Path | None) -> PreparedHeads:
        """Read, check and pack heads for `use_heads`, on any thread.

        heads: a checkpoint folder, or a store's folder of the backbone; None = none, guesses are looked up alone.
        Raises `HeadsError` for heads that cannot be read or do not fit.
        """
        return _maker(self.config, self.backbone, resolve_model(self.config.model)).next(heads)

    def use_heads(self, prepared: PreparedHeads) -> None:
        """Draft with other heads from the next step on. What is running goes on; its tokens stay those that they were
        to be. Measures the new drafters, in milliseconds."""
        drafting = self._step.drafting
        before = drafting.drafters
        drafting.use(drafting.bind(prepared.drafters))
        try:
            costly = None if self.calibration is None else _costly(calibrate_drafters(self._step))
        except BaseException:
            drafting.use(before)
            raise
        self._scheduler.drafters_changed(costly)
        self.heads = prepared.heads

    def generate(self, *requests: Request) -> Generator[TokenEvent | FinishedEvent, None, None]:
        """Run requests together to their ends, each event as it happens. Closing the iterator cancels what is left.

        Raises the error of a request that fails.
        """
        left = deque(requests)
        unfinished = {request.id for request in requests}
        try:
            while unfinished:
                while left and self._scheduler.has_room:
                    self.submit(left.popleft())
                for event in self.step():
                    if isinstance(event, FinishedEvent | FailedEvent):
                        unfinished.discard(event.request_id)
                    if isinstance(event, FailedEvent):
                        raise event.error
                    if isinstance(event, FinishedEvent | TokenEvent):
                        yield event
        finally:
            if unfinished:
                for request_id in unfinished:
                    self.cancel(request_id)
                self._scheduler.drop_cancelled()


def _maker(config: EngineConfig, backbone: Backbone, folder: Path) -> DrafterMaker:
    return DrafterMaker(backbone, folder, kind=config.drafter, tree=config.heads_tree, draw=config.draw_drafts)


def _check_memory(backbone: Backbone, config: EngineConfig, context: int, *, graphs: bool) -> None:
    """Raises `BadRequestError` where an engine does not fit on the GPU beside the weights."""
    shape = EngineShape(
        config=backbone.config,
        num_slots=config.num_slots,
        context=context,
        max_scratch=MAX_NODES,
        max_nodes=config.max_nodes,
        chunk_size=config.chunk_size,
        element_size=backbone.cache_dtype.itemsize,
        graphs=graphs,
    )
    check_engine_fits(shape, free_bytes(backbone.device))


def _make_step(
    config: EngineConfig, backbone: Backbone, cache: KVCache, drafters: tuple[Drafter, ...], recorder: Recorder | None
) -> SpeculativeStep:
    limits = {"max_nodes": config.max_nodes, "max_depth": config.max_depth}
    if recorder is None:
        return SpeculativeStep(backbone, cache, drafters, **limits)
    return GraphedStep(backbone, cache, drafters, **limits, recorder=recorder, runs_ahead=config.run_ahead)


def _budget(config: EngineConfig, calibration: Calibration | None) -> TreeBudget:
    if calibration is None:
        return TreeBudget(config.max_nodes, None)
    return TreeBudget(
        config.max_nodes,
        calibration.cost_model,
        _costly(calibration.costly_draft),
        prefill=calibration.prefill,
        max_stall_steps=config.max_stall_steps,
    )


def _costly(draft: DraftSeconds | None) -> CostlyDrafting | None:
    return None if draft is None else CostlyDrafting(draft.first, draft.each)
