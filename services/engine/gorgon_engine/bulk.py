"""Plain decoding of very many prompts: for making training data, where only the number of tokens a second counts.

The same backbone, cache and sampling as the engine's, so the tokens are those that the engine gives; but no events, no
speculation and no look at a token before a sequence has ended. Sequences join and leave between rounds of several
steps; on a GPU a round is one CUDA graph, replayed, and the host prepares the next prompts meanwhile.
"""

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gorgon_engine.backbone.base import Backbone, ForwardInputs, LogitsFor
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.sampling import SamplingBatch, process_logits, sample
from gorgon_engine.transfer import read_back, to_device
from gorgon_protocol.errors import BadRequestError, ContextLengthError

K = TypeVar("K", bound=Hashable)

_PREFILL_ROWS = 65536  # of one batched prefill, padding included
_STEPS_PER_ROUND = 16


@dataclass(frozen=True, slots=True)
class BulkPrompt(Generic[K]):
    """One prompt. `key` is the caller's own; it comes back with the answer."""

    key: K
    tokens: tuple[int, ...]
    temperature: float
    seed: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class BulkAnswer(Generic[K]):
    """The tokens of an answer, the end-of-sequence token included where the model ended it."""

    key: K
    tokens: list[int]


class BulkGenerator(Generic[K]):
    """Decodes submitted prompts in `num_slots` slots. Not thread-safe.

    while generator.num_unfinished:
        for answer in generator.run_round(): ...
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_slots: int,
        context: int,
        max_new_tokens: int,
        prefill_rows: int = _PREFILL_ROWS,
        steps_per_round: int = _STEPS_PER_ROUND,
    ) -> None:
        """context: positions of a slot, prompt and answer. max_new_tokens: the most that any prompt may ask for."""
        shape, device = backbone.config, backbone.device
        self._backbone = backbone
        self._context = context
        self._prefill_rows = prefill_rows
        self._steps_per_round = steps_per_round
        self._cache = KVCache(
            num_layers=shape.num_layers,
            num_slots=num_slots,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            capacity=context,
            max_scratch=1,
            dtype=backbone.cache_dtype,
            device=device,
        )
        self._waiting: deque[BulkPrompt[K]] = deque()
        self._running: dict[int, BulkPrompt[K]] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eos = torch.tensor(sorted(shape.eos_token_ids), dtype=torch.int64, device=device)
        self._all_slots = torch.arange(num_slots, device=device)

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros((num_slots, *size), dtype=dtype, device=device)

        self._roots = zeros()
        self._temperatures = zeros(dtype=torch.float32)
        self._seeds = zeros()
        self._prompt_lengths = zeros()
        self._limits = zeros()
        self._produced = zeros()
        self._active = zeros(dtype=torch.bool)
        self._output = zeros(max_new_tokens)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    def submit(self, prompts: Iterable[BulkPrompt[K]]) -> None:
        """Queue prompts, all or none. Raises `BadRequestError` for one that is empty or does not fit its slot."""
        new = list(prompts)
        for prompt in new:
            if not prompt.tokens or prompt.max_tokens < 1:
                raise BadRequestError(f"prompt {prompt.key!r} is empty, or asks for no tokens")
            needed = len(prompt.tokens) + prompt.max_tokens
            if needed > self._context or prompt.max_tokens > self._output.shape[1]:
                raise ContextLengthError(
                    f"prompt {prompt.key!r}: {len(prompt.tokens)} tokens and an answer of {prompt.max_tokens} do not "
                    f"fit a context of {self._context} and answers of at most {self._output.shape[1]}"
                )
        self._waiting.extend(new)

    @torch.inference_mode()
    def run_round(self) -> list[BulkAnswer[K]]:
        """Collect what ended in the round before, start what waits, and begin a round of steps.

        On a GPU the round is still running when this returns.
        """
        answers = self._collect()
        self._start_waiting()
        if self._running:
            self._run_steps()
        return answers

    def _collect(self) -> list[BulkAnswer[K]]:
        if not self._running:
            return []
        state = read_back({"active": self._active, "produced": self._produced})
        ended = [slot for slot in self._running if not state["active"][slot]]
        if not ended:
            return []
        outputs = self._output[to_device(ended, self._output.device)].cpu()
        answers = []
        for row, slot in zip(outputs, ended, strict=True):
            prompt = self._running.pop(slot)
            self._cache.release(slot)
            answers.append(BulkAnswer(prompt.key, row[: int(state["produced"][slot])].tolist()))
        return answers

    def _start_waiting(self) -> None:
        count = min(self._cache.num_free_slots, len(self._waiting))
        if not count:
            return
        # Of similar lengths together: less padding.
        started = sorted((self._waiting.popleft() for _ in range(count)), key=lambda prompt: len(prompt.tokens))
        batch: list[BulkPrompt[K]] = []
        for prompt in started:
            if batch and (len(batch) + 1) * len(prompt.tokens) > self._prefill_rows:
                self._prefill(batch)
                batch = []
            batch.append(prompt)
        self._prefill(batch)

    def _prefill(self, prompts: list[BulkPrompt[K]]) -> None:
        device = self._backbone.device
        slots_on_host = [self._cache.acquire() for _ in prompts]
        self._running.update(zip(slots_on_host, prompts, strict=True))
        slots = to_device(slots_on_host, device)
        counts = to_device([len(prompt.tokens) for prompt in prompts], device)
        longest = max(len(prompt.tokens) for prompt in prompts)
        flat = [token for prompt in prompts for token in (*prompt.tokens, *[0] * (longest - len(prompt.tokens)))]
        self._temperatures[slots] = torch.tensor([prompt.temperature for prompt in prompts], device=device)
        self._seeds[slots] = to_device([prompt.seed for prompt in prompts], device)
        self._limits[slots] = to_device([prompt.max_tokens for prompt in prompts], device)
        self._prompt_lengths[slots] = counts
        inputs = ForwardInputs(
            tokens=to_device(flat, device).view(len(prompts), longest),
            depths=torch.arange(longest, device=device).expand(len(prompts), -1),
            slots=slots,
            lengths=torch.zeros_like(counts),
            num_rows=counts,
            prompt_lengths=counts,
            max_positions=longest,
        )
        output = self._backbone.forward(inputs, self._cache, logits_for=LogitsFor.LAST)
        self._cache.append(slots, counts)
        self._produced[slots] = 0
        self._active[slots] = True
        self._take(slots, output.logits[:, -1], counts)

    def _run_steps(self) -> None:
        if self._backbone.device.type != "cuda":
            for _ in range(self._steps_per_round):
                rows = self._active.nonzero().flatten()
                if not rows.numel():
                    return
                self._step(rows)
            return
        if self._graph is None:
            self._graph = self._capture()
        for _ in range(self._steps_per_round):
            self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """One step as a CUDA graph. The warm-up before it is a real step of the sequences that are running."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(self._all_slots)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(self._all_slots)
        return graph

    def _step(self, rows: Tensor) -> None:
        """One token for each of the slots `rows` [R]; those that have ended compute and change nothing."""
        lengths = self._cache.lengths[rows]
        inputs = ForwardInputs(
            tokens=self._roots[rows, None],
            depths=torch.zeros_like(rows)[:, None],
            slots=rows,
            lengths=lengths,
            num_rows=torch.ones_like(rows),
            prompt_lengths=self._prompt_lengths[rows],
            max_positions=self._cache.keys.shape[3],
        )
        output = self._backbone.forward(inputs, self._cache)
        self._cache.append(rows, self._active[rows].long())
        self._take(rows, output.logits[:, 0], lengths + 1)

    def _take(self, rows: Tensor, logits: Tensor, positions: Tensor) -> None:
        """Draw the tokens at `positions` [R] from logits [R, V], and note them for the slots that are active."""
        batch = SamplingBatch.of_temperatures(self._temperatures[rows], self._seeds[rows], vocab_size=logits.shape[1])
        tokens = sample(process_logits(logits, batch, None), batch, positions)
        active, produced = self._active[rows], self._produced[rows]
        column = produced.clamp(max=self._output.shape[1] - 1)
        self._output[rows, column] = torch.where(active, tokens, self._output[rows, column])
        produced = produced + active
        self._produced[rows] = produced
        ended = (tokens[:, None] == self._eos).any(dim=1) | (produced >= self._limits[rows])
        self._active[rows] = active & ~ended
        self._roots[rows] = tokens
