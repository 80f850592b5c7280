"""Engines of several tree sizes and drafters over one loaded backbone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.engine import Engine, EngineConfig, load_parts
from gorgon_engine.tokenizer import Tokenizer
from gorgon_protocol.errors import BadRequestError
from gorgon_trainer.evaluation.measured import MeasureSettings
from gorgon_trainer.evaluation.prompts import EvaluationPrompt, encode_prompts

# Of one verification pass, in float32: sampling holds a few tensors of that size at once.
_MAX_LOGITS_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What costs time and memory to load. `config` gives everything but the tree's size, and the most slots."""

    backbone: Backbone
    tokenizer: Tokenizer
    drafters: tuple[Drafter, ...]
    config: EngineConfig
    notices: tuple[str, ...] = ()

    @classmethod
    def load(cls, config: EngineConfig) -> Self:
        """As `Engine.load`, without the engine. Raises `GorgonError` subclasses."""
        parts = load_parts(config)
        return cls(parts.backbone, parts.tokenizer, parts.drafters, config, parts.notices)

    def only(self, *names: str) -> Self:
        """The same parts with the drafters of these names alone (`head`, `lookup`).

        Raises `BadRequestError` for a name that no drafter has.
        """
        there = [drafter.name for drafter in self.drafters]
        for name in names:
            if name not in there:
                raise BadRequestError(f"no drafter {name!r} among {there}")
        return replace(self, drafters=tuple(drafter for drafter in self.drafters if drafter.name in names))

    def maker(self, prompts: Sequence[EvaluationPrompt], settings: MeasureSettings) -> Callable[[int], Engine]:
        """From a number of nodes to an engine that always verifies the largest tree of so many rows, root included,
        with no more cache than these prompts and their answers fill.

        The slots are the config's, fewer where there are fewer answers to give or where the logits of one pass would
        not fit in 4 GiB. Raises `BadRequestError` where no prompt is left.
        """
        encoded = encode_prompts(self.tokenizer, prompts, max_tokens=settings.max_prompt_tokens)
        needed = max(len(tokens) for _, tokens in encoded) + settings.max_tokens
        context = self.config.context or min(needed, self.backbone.config.max_positions)
        num_answers = len(encoded) * sum(len(seeds) for _, seeds in settings.samplings())

        def make(max_nodes: int) -> Engine:
            row_bytes = self.backbone.config.vocab_size * 4
            fitting = max(_MAX_LOGITS_BYTES // (max_nodes * row_bytes), 1)
            num_slots = min(self.config.num_slots, num_answers, fitting)
            config = replace(self.config, max_nodes=max_nodes, adaptive=False, num_slots=num_slots, context=context)
            return Engine(backbone=self.backbone, tokenizer=self.tokenizer, drafters=self.drafters, config=config)

        return make
