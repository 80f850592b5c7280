"""Self-distillation: the served backbone answers the training prompts itself.

Heads learn what this backbone says in this quantisation and chat template, which is worth more than any better written
text (Medusa, 2401.10774, section 2.3.2). Each record is answered once a *pass*, at one of the temperatures in turn;
conversations go on with their own answers. Work is cut into shards that are written whole: a killed run goes on with
the shards that are missing.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.bulk import BulkAnswer, BulkGenerator, BulkPrompt
from gorgon_engine.tokenizer import Tokenizer
from gorgon_protocol.errors import DataError
from gorgon_protocol.manifest import BackboneReference
from gorgon_trainer.data.filters import is_probe_topic
from gorgon_trainer.data.records import ChatRecord, Message, Record, read_records
from gorgon_trainer.shards import SPLITS, ShardIndex, ShardWriter, Split, TokenSequence

if TYPE_CHECKING:
    from gorgon_trainer.metrics import TrainerMetrics

_Key = tuple[Split, int, int]  # split, shard, job in the shard


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """How the records are answered. Token counts are upper limits."""

    temperatures: tuple[float, ...] = (0.0, 0.7, 0.7, 1.0)  # record i takes number (i + pass) modulo their count
    num_passes: int = 4
    max_new_tokens: int = 384
    max_text_tokens: int | None = None  # of what follows a raw text, which soon strays; None = max_new_tokens
    context: int = 1024  # prompt and answer; a conversation ends where it would not fit
    max_turns: int = 2
    jobs_per_shard: int = 512
    num_slots: int = 64  # sequences decoded at once
    seed: int = 0
    # Begin no shard after this time but the first of each split: the run is complete with fewer shards.
    max_seconds: float | None = None
    # Which of how many processes this one is, each with a share of the shards: one a GPU.
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        for name in ("num_passes", "max_new_tokens", "max_text_tokens", "max_turns", "jobs_per_shard", "num_slots"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1: got {getattr(self, name)}")
        if not self.temperatures or min(self.temperatures) < 0:
            raise DataError(f"temperatures must be a list of numbers from 0: got {list(self.temperatures)}")
        number, count = self.part
        if not 0 <= number < count:
            raise DataError(f"part {number} of {count} is not one of them: the first is 0 and the last {count - 1}")
        if count > 1 and self.max_seconds is not None:
            raise DataError("several parts need all of their shards: leave max_seconds out, or distil in one part")
        if self.context <= self.max_new_tokens:
            raise DataError(
                f"context {self.context} leaves no room for a prompt beside {self.max_new_tokens} new tokens"
            )

    def settings(self) -> dict[str, bool | int | float | str | None]:
        """What decides the content of the shards: a resumed run must have the same."""
        values = asdict(self)
        for name in ("num_slots", "max_seconds", "part"):
            del values[name]
        return values | {"temperatures": ",".join(map(str, self.temperatures))}


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What one call did; shards that were there before count in `num_shards_kept` alone."""

    num_shards_written: int
    num_shards_kept: int
    num_answers: int
    num_tokens: int  # generated
    seconds: float
    dropped: dict[str, int] = field(default_factory=dict)  # by reason

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(slots=True)
class _Job:
    """One record in one pass: a conversation as far as it has got."""

    record: Record
    temperature: float
    seed: int
    turn: int = 0
    history: list[Message] = field(default_factory=list)
    prompt: tuple[int, ...] = ()
    sequences: list[TokenSequence] = field(default_factory=list)


@dataclass(slots=True)
class _Shard:
    split: Split
    number: int
    jobs: list[_Job]
    num_open: int


def distill(
    data: Path,
    out: Path,
    *,
    backbone: Backbone,
    tokenizer: Tokenizer,
    reference: BackboneReference,
    quantization: Literal["none", "nf4", "int8"],
    config: DistillConfig,
    progress: bool = True,
    metrics: "TrainerMetrics | None" = None,
) -> DistillReport:
    """Answer the records of a folder that `gorgon train data` made; write token shards of both splits to `out`.

    Raises `DataError` for a folder without records, an `out` of another run, a disk that is full.
    """
    data_sha256 = _data_sha256(data)
    records = {split: list(read_records(data / f"{split}.jsonl")) for split in SPLITS}
    for split in SPLITS:
        if not records[split]:
            raise DataError(f"{data / f'{split}.jsonl'}: holds no records: give more data to `gorgon train data`")
    index = ShardIndex(
        backbone=reference,
        quantization=quantization,
        vocab_size=backbone.config.vocab_size,
        data_sha256=data_sha256,
        settings=config.settings(),
        num_shards={} if config.max_seconds is not None else {s: _num_shards(records[s], config) for s in SPLITS},
    )
    writer = ShardWriter(out, index)
    run = _Run(writer, backbone, tokenizer, config, metrics)
    wanted = [
        (split, number)
        for number in range(max(_num_shards(records[split], config) for split in SPLITS))
        for split in SPLITS
        if number < _num_shards(records[split], config)
    ]
    wanted = wanted[config.part[0] :: config.part[1]]
    missing = [(split, number) for split, number in wanted if number not in writer.finished(split)]
    total = sum(len(_jobs_of(records[split], number, config)) for split, number in missing)
    if metrics is not None:
        metrics.distilling(num_prompts=total, num_shards=len(missing), max_seconds=config.max_seconds)
    with tqdm(total=total, desc="distilling", unit="prompt", disable=None if progress else True) as bar:
        run.work(((split, number, records[split]) for split, number in missing), bar)
    return DistillReport(
        num_shards_written=run.num_written,
        num_shards_kept=len(wanted) - len(missing),
        num_answers=run.num_answers,
        num_tokens=run.num_tokens,
        seconds=run.seconds,
        dropped=run.dropped,
    )


class _Run:
    """Keeps the generator's slots full, and writes each shard when its last conversation has ended."""

    def __init__(
        self,
        writer: ShardWriter,
        backbone: Backbone,
        tokenizer: Tokenizer,
        config: DistillConfig,
        metrics: "TrainerMetrics | None",
    ) -> None:
        self._writer = writer
        self._metrics = metrics
        self._tokenizer = tokenizer
        self._config = config
        self._generator: BulkGenerator[_Key] = BulkGenerator(
            backbone,
            num_slots=config.num_slots,
            context=config.context,
            max_new_tokens=config.max_new_tokens,
        )
        self._eos = frozenset(backbone.config.eos_token_ids)
        self._shards: dict[tuple[Split, int], _Shard] = {}
        self.num_written = self.num_answers = self.num_tokens = 0
        self.seconds = 0.0
        self.dropped: dict[str, int] = {}

    def work(self, shards: Iterator[tuple[Split, int, Sequence[Record]]], bar: "tqdm[None]") -> None:
        began = time.perf_counter()
        few = max(1, self._config.num_slots // 4)
        following = next(shards, None)
        while True:
            in_time = self._config.max_seconds is None or time.perf_counter() - began < self._config.max_seconds
            while following is not None and self._generator.num_waiting < few:
                split, number, records = following
                # Training needs something of both splits, however short the time.
                if not in_time and number > 0:
                    break
                self._begin(split, number, records, bar)
                following = next(shards, None)
            if not self._generator.num_unfinished:
                break
            for answer in self._generator.run_round():
                self._take(answer, bar)
            self.seconds = time.perf_counter() - began
            bar.set_postfix_str(f"{self.num_tokens / max(self.seconds, 1e-9):,.0f} tokens/s", refresh=False)

    def _begin(self, split: Split, number: int, records: Sequence[Record], bar: "tqdm[None]") -> None:
        jobs = _jobs_of(records, number, self._config)
        shard = self._shards[split, number] = _Shard(split, number, jobs, num_open=len(jobs))
        for place in range(len(jobs)):
            self._ask(shard, place, bar)

    def _ask(self, shard: _Shard, place: int, bar: "tqdm[None]") -> None:
        """Submit a conversation's next turn, or end it."""
        job = shard.jobs[place]
        prompt = self._next_prompt(job)
        if prompt is None:
            self._end(shard, bar)
            return
        job.prompt = prompt
        seed = _seed(job.seed, job.turn)
        key = (shard.split, shard.number, place)
        limit = self._config.max_new_tokens
        if not isinstance(job.record, ChatRecord) and self._config.max_text_tokens is not None:
            limit = min(limit, self._config.max_text_tokens)
        self._generator.submit([BulkPrompt(key, prompt, job.temperature, seed, limit)])

    def _next_prompt(self, job: _Job) -> tuple[int, ...] | None:
        if isinstance(job.record, ChatRecord):
            messages = _until_next_answer(job.record, job.turn)
            if messages is None or job.turn >= self._config.max_turns:
                return None
            job.history += messages
            chat = [{"role": message.role, "content": message.content} for message in job.history]
            tokens = self._tokenizer.encode_chat(chat)
        elif job.turn == 0:
            tokens = self._tokenizer.encode(job.record.text)
        else:
            return None
        if not tokens or len(tokens) + self._config.max_new_tokens > self._config.context:
            self._drop("does not fit the context")
            return None
        return tuple(tokens)

    def _take(self, answer: BulkAnswer[_Key], bar: "tqdm[None]") -> None:
        split, number, place = answer.key
        shard = self._shards[split, number]
        job = shard.jobs[place]
        self.num_answers += 1
        self.num_tokens += len(answer.tokens)
        if self._metrics is not None:
            self._metrics.answered(len(answer.tokens))
        text = self._tokenizer.decode(answer.tokens)
        if is_probe_topic(text):
            self._drop("speaks of the probe's topic")
            self._end(shard, bar)
            return
        mask = [0] * len(job.prompt) + [1] * len(answer.tokens)
        said = TokenSequence.from_lists([*job.prompt, *answer.tokens], mask)
        # A conversation is one sequence while its tokens agree (an answer may be spelt otherwise when it is read back):
        # what was said before need not be gone through again.
        if job.sequences and said.goes_on_from(job.sequences[-1]):
            said = said.with_targets_of(job.sequences.pop())
        job.sequences.append(said)
        job.turn += 1
        job.history.append(Message(role="assistant", content=text or " "))
        if answer.tokens[-1] in self._eos:
            self._ask(shard, place, bar)
        else:  # cut off: no one would go on from half an answer
            self._end(shard, bar)

    def _end(self, shard: _Shard, bar: "tqdm[None]") -> None:
        bar.update(1)
        if self._metrics is not None:
            self._metrics.prompt_ended()
        shard.num_open -= 1
        if shard.num_open:
            return
        sequences = [sequence for job in shard.jobs for sequence in job.sequences]
        if not sequences:
            raise DataError(
                f"{self._writer.folder}: none of the {len(shard.jobs)} prompts of {shard.split} shard {shard.number} "
                "could be answered: give shorter prompts or a larger context"
            )
        self._writer.write(shard.split, shard.number, sequences)
        self.num_written += 1
        if self._metrics is not None:
            self._metrics.shard_written()
        del self._shards[shard.split, shard.number]

    def _drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


def _until_next_answer(record: ChatRecord, turn: int) -> list[Message] | None:
    """The messages of a record from behind its answer number `turn - 1` up to its next human turn, None at its end.

    Answers that a record brings along are passed over: the backbone gives its own.
    """
    found: list[Message] = []
    humans = 0
    for message in record.messages:
        if message.role == "assistant":
            continue
        if humans == turn:
            found.append(message)
        if message.role == "user":
            humans += 1
            if humans == turn + 1:
                return found
    return None


def _num_shards(records: Sequence[Record], config: DistillConfig) -> int:
    return -(-len(records) * config.num_passes // config.jobs_per_shard)


def _jobs_of(records: Sequence[Record], number: int, config: DistillConfig) -> list[_Job]:
    """The jobs of a shard: pass after pass over the records, so that the first shards see each record once."""
    jobs = []
    first = number * config.jobs_per_shard
    for job in range(first, min(first + config.jobs_per_shard, len(records) * config.num_passes)):
        round_number, place = divmod(job, len(records))
        record = records[place]
        temperature = config.temperatures[(place + round_number) % len(config.temperatures)]
        jobs.append(_Job(record, temperature, _seed(config.seed, round_number, record.id)))
    return jobs


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _data_sha256(data: Path) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        path = data / f"{split}.jsonl"
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read: {error.strerror}: give a folder of `gorgon train data`"
            ) from error
    return digest.hexdigest()
