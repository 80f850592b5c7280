"""The engine as a library: load a model, generate.

engine = Engine.load(EngineConfig(model="smollm2"))
for event in engine.generate(engine.request("The capital of France is", SamplingParams(max_tokens=32))):
    ...
"""

import itertools
from collections.abc import Generator, Iterable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from pathlib import Path

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import BackboneOptions, load_backbone
from gorgon_engine.budget import CostlyDrafting, TreeBudget
from gorgon_engine.calibration import Calibration, calibrate
from gorgon_engine.detokenizer import IncrementalDetokenizer
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.drafters.select import DrafterKind, HeadsTree, make_drafters
from gorgon_engine.events import Event, FinishedEvent
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.catalog import resolve_model
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.scheduler import Scheduler
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
    chunk_size: int = 512

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_nodes", 1, MAX_NODES),
            ("max_depth", 1, MAX_NODES - 1),
            ("num_slots", 1, 4096),
            ("chunk_size", 1, 65536),
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


def load_parts(config: EngineConfig) -> LoadedParts:
    """Read the model, choose kernels, make drafters. Raises `GorgonError` subclasses."""
    folder = resolve_model(config.model)
    backbone, notices = load_backbone(folder, config.backbone)
    drafters, more = make_drafters(
        config.drafter,
        config.heads,
        backbone=backbone,
        folder=folder,
        tree=config.heads_tree,
        draw=config.draw_drafts,
    )
    return LoadedParts(backbone, Tokenizer.from_folder(folder), tuple(drafters), (*notices, *more))


class Engine:
    """One backbone, its cache and drafters, and the loop over them. Not thread-safe: one thread drives it."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        tokenizer: Tokenizer,
        drafters: Iterable[Drafter],
        config: EngineConfig,
        notices: Iterable[str] = (),
    ) -> None:
        shape = backbone.config
        context = config.context or min(shape.max_positions, _DEFAULT_CONTEXT)
        if context > shape.max_positions:
            raise BadRequestError(f"context {context} is longer than the model's {shape.max_positions} positions")
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.config = config
        self.notices = tuple(notices)
        self.context = context
        cache = KVCache(
            num_layers=shape.num_layers,
            num_slots=config.num_slots,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            capacity=context,
            max_scratch=MAX_NODES,
            dtype=backbone.cache_dtype,
            device=backbone.device,
        )
        step = SpeculativeStep(backbone, cache, tuple(drafters), max_nodes=config.max_nodes, max_depth=config.max_depth)
        self.calibration: Calibration | None = calibrate(step) if config.adaptive else None
        budget = _budget(config, self.calibration)
        eos = frozenset(shape.eos_token_ids)
        self._scheduler = Scheduler(step, budget, chunk_size=config.chunk_size, eos_token_ids=eos)
        self._numbers = itertools.count(1)

    @classmethod
    def load(cls, config: EngineConfig) -> "Engine":
        """Read the model, choose kernels, make drafters, measure the machine. Raises `GorgonError` subclasses."""
        parts = load_parts(config)
        return cls(
            backbone=parts.backbone,
            tokenizer=parts.tokenizer,
            drafters=parts.drafters,
            config=config,
            notices=parts.notices,
        )

    def request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        speculation: SpeculationParams | None = None,
        *,
        trace: bool = False,
    ) -> Request:
        """A request of a text, of chat messages, or of token ids. Raises `BadRequestError` for what cannot run."""
        tokens = self._tokens(prompt)
        if not tokens:
            raise BadRequestError("the prompt is empty: give at least one token of text")
        vocab_size = self.backbone.config.vocab_size
        bad = next((t for t in tokens if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise BadRequestError(f"the prompt holds token {bad}: the vocabulary has {vocab_size} tokens")
        if len(tokens) >= self.context:
            raise ContextLengthError(
                f"the prompt is {len(tokens)} tokens long and the context holds {self.context}, the answer included: "
                "shorten the prompt or raise the context"
            )
        speculation = speculation or SpeculationParams()
        limit = speculation.max_nodes
        if limit is not None and not 1 <= limit <= self.config.max_nodes:
            raise BadRequestError(f"max_nodes must be between 1 and {self.config.max_nodes}: got {limit}")
        return Request(
            id=f"request-{next(self._numbers)}",
            prompt=tuple(tokens),
            sampling=sampling or SamplingParams(),
            speculation=speculation,
            trace=trace,
        )

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        messages = [part for part in prompt if not isinstance(part, int)]
        if messages:
            return self.tokenizer.encode_chat(messages)
        return [part for part in prompt if isinstance(part, int)]

    def submit(self, request: Request) -> None:
        """Queue a request; `step` runs it."""
        stops = request.sampling.stop
        self._scheduler.submit(Sequence(request, IncrementalDetokenizer(self.tokenizer, stops)))

    def cancel(self, request_id: str) -> None:
        self._scheduler.cancel(request_id)

    def step(self) -> list[Event]:
        """Run one step of everything queued and running."""
        return self._scheduler.step()

    def abort(self) -> list[Event]:
        """End everything now; each request gets its terminal event."""
        return self._scheduler.abort()

    def generate(self, *requests: Request) -> Generator[Event, None, None]:
        """Run requests together to their ends, each event as it happens. Closing the iterator cancels what is left."""
        unfinished = {request.id for request in requests}
        for request in requests:
            self.submit(request)
        try:
            while unfinished:
                for event in self.step():
                    if isinstance(event, FinishedEvent):
                        unfinished.discard(event.request_id)
                    yield event
        finally:
            if unfinished:
                for request_id in unfinished:
                    self.cancel(request_id)
                self._scheduler.drop_cancelled()


def _budget(config: EngineConfig, calibration: Calibration | None) -> TreeBudget:
    if calibration is None:
        return TreeBudget(config.max_nodes, None)
    draft_seconds = calibration.costly_draft_seconds
    return TreeBudget(
        config.max_nodes,
        calibration.cost_model,
        None if draft_seconds is None else CostlyDrafting(draft_seconds),
    )
