"""Self-distillation done slowly: one prompt after another, by the engine that serves."""

from collections.abc import Sequence

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafters.select import DrafterKind
from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.events import TokenEvent
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import SpeculationParams
from gorgon_engine.tokenizer import Tokenizer
from gorgon_trainer.data.filters import is_probe_topic
from gorgon_trainer.data.records import ChatRecord, Record, TextRecord
from gorgon_trainer.distill import DistillConfig, _jobs_of, _seed

Spoken = tuple[tuple[int, ...], tuple[int, ...]]  # tokens, loss mask


class Answerer:
    """Says what `distill` should have written, and why each conversation ended."""

    def __init__(self, backbone: Backbone, tokenizer: Tokenizer, config: DistillConfig) -> None:
        engine_config = EngineConfig(drafter=DrafterKind.NONE, adaptive=False, context=config.context)
        self._engine = Engine(backbone=backbone, tokenizer=tokenizer, drafters=(), config=engine_config)
        self._eos = backbone.config.eos_token_ids
        self._tokenizer = tokenizer
        self._config = config
        self.num_answers = 0  # kept ones
        self.ends: list[tuple[str, int]] = []  # why each conversation ended, and how many turns were left

    def answer(self, prompt: Sequence[int], temperature: float, seed: int) -> list[int]:
        sampling = SamplingParams(max_tokens=self._config.max_new_tokens, temperature=temperature, seed=seed)
        request = self._engine.request(prompt, sampling, SpeculationParams(enabled=False))
        events = self._engine.generate(request)
        return [token for event in events if isinstance(event, TokenEvent) for token in event.token_ids]

    def conversation(self, record: Record, temperature: float, seed: int) -> list[Spoken]:
        turns: list[list[dict[str, str]]] = (
            [[]] if isinstance(record, TextRecord) else _human_turns(record)[: self._config.max_turns]
        )
        said: list[Spoken] = []
        history: list[dict[str, str]] = []
        for number, turn in enumerate(turns):
            num_left = len(turns) - number - 1
            history += turn
            if isinstance(record, TextRecord):
                prompt = self._tokenizer.encode(record.text)
            else:
                prompt = self._tokenizer.encode_chat(history)
            if len(prompt) + self._config.max_new_tokens > self._config.context:
                self.ends.append(("does not fit the context", num_left))
                return said
            answer = self.answer(prompt, temperature, _seed(seed, number))
            text = self._tokenizer.decode(answer)
            if is_probe_topic(text):
                self.ends.append(("speaks of the probe's topic", num_left))
                return said
            self.num_answers += 1
            tokens, mask = (*prompt, *answer), (0,) * len(prompt) + (1,) * len(answer)
            if said and tokens[: len(said[-1][0])] == said[-1][0]:  # one sequence, with the targets of both
                earlier = said.pop()[1]
                mask = (*earlier, *mask[len(earlier) :])
            said.append((tokens, mask))
            history.append({"role": "assistant", "content": text or " "})
            if answer[-1] not in self._eos:
                self.ends.append(("cut", num_left))
                return said
        self.ends.append(("done", 0))
        return said

    def all(self, records: Sequence[Record]) -> list[Spoken]:
        said = []
        for number in range(-(-len(records) * self._config.num_passes // self._config.jobs_per_shard)):
            for job in _jobs_of(records, number, self._config):
                said += self.conversation(job.record, job.temperature, job.seed)
        return said


def _human_turns(record: ChatRecord) -> list[list[dict[str, str]]]:
    """What is said to the backbone before each of its answers."""
    turns: list[list[dict[str, str]]] = []
    waiting: list[dict[str, str]] = []
    for message in record.messages:
        if message.role == "assistant":
            continue
        waiting.append({"role": message.role, "content": message.content})
        if message.role == "user":
            turns.append(waiting)
            waiting = []
    return turns
