"""Engines of a tiny random model with a real tokenizer, and what they answer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gorgon_engine.backbone.base import Backbone, ForwardInputs, ForwardOutput, LogitsFor
from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.events import Event, FailedEvent, FinishedEvent, StatusEvent, TokenEvent
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.loading import Quantization
from gorgon_engine.recording import Recorder
from gorgon_engine.sequence import Request
from gorgon_engine.tokenizer import Tokenizer
from support.models import tiny_llama
from support.vocabularies import byte_level_bpe, save

TINY_VOCAB = 352


def tiny_folder(folder: Path) -> Path:
    """A model folder with a byte-level tokenizer: most of its answers are broken UTF-8."""
    return save(byte_level_bpe(), tiny_llama(folder, vocab_size=TINY_VOCAB), bos="<|endoftext|>", eos="<|im_end|>")


def tiny_backbone(folder: Path, *, quantization: Quantization = Quantization.NONE) -> Backbone:
    options = BackboneOptions(quantization=quantization, dtype=torch.float32, kernels=Kernels.NATIVE, device="cpu")
    return load_backbone(folder, options)[0]


def tiny_engine(
    folder: Path,
    backbone: Backbone,
    drafters: Iterable[Drafter] = (),
    *,
    recorder: Recorder | None = None,
    **options: Any,
) -> Engine:
    """Every guess is verified, so that nothing depends on this machine's speed. options: of the configuration."""
    defaults: dict[str, Any] = {"model": str(folder), "adaptive": False, "context": 128, "num_slots": 3}
    config = EngineConfig(**(defaults | options))
    tokenizer = Tokenizer.from_folder(folder)
    return Engine(backbone=backbone, tokenizer=tokenizer, drafters=drafters, config=config, recorder=recorder)


@dataclass
class FaultyBackbone:
    """A backbone whose next passes can be made to fail."""

    inner: Backbone
    faults: list[BaseException] = field(default_factory=list)  # raised one a pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def forward(self, inputs: ForwardInputs, cache: KVCache, *, logits_for: LogitsFor = LogitsFor.ALL) -> ForwardOutput:
        if self.faults:
            raise self.faults.pop(0)
        return self.inner.forward(inputs, cache, logits_for=logits_for)


@dataclass
class Answer:
    """What one request was told, checked as it comes: status*, token*, then one end and nothing more."""

    statuses: list[StatusEvent] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: FinishedEvent | None = None
    failed: FailedEvent | None = None

    @property
    def has_ended(self) -> bool:
        return self.finished is not None or self.failed is not None

    def take(self, event: Event) -> None:
        assert not self.has_ended, "an event behind the end"
        if isinstance(event, StatusEvent):
            assert not self.events, "a status behind the first token"
            self.statuses.append(event)
        elif isinstance(event, TokenEvent):
            assert len(event.token_ids) == len(event.pieces) >= max(event.num_accepted, 1)
            self.events.append(event)
            self.token_ids += event.token_ids
            self.text += event.text
        elif isinstance(event, FinishedEvent):
            self.finished = event
            self.text += event.text
        else:
            self.failed = event

    def end(self) -> FinishedEvent:
        """Of a generation that finished."""
        assert self.finished is not None, self.failed
        return self.finished


def run_all(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Submit all, and step to the end."""
    answers = {request.id: Answer() for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        take_all(answers, engine.step())
    return list(answers.values())


def take_all(answers: dict[str, Answer], events: Iterable[Event]) -> None:
    for event in events:
        answers[event.request_id].take(event)
