"""Sampling: parameters, the processing of logits, and random numbers that depend on (seed, position) alone.

A token is drawn as `argmax(logits + Gumbel noise)` (Gumbel 1954; exact sampling from the softmax). The noise of a token
is a function of (seed, absolute position, token id), never of the step that asked, so the same logits give the same
token whether it was verified in a tree or decoded plainly. Unlike inversion of the cumulative distribution, a rounding
difference in the logits moves the drawn token only where two perturbed maxima almost tie.

Letters: R rows (one sequence each), V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from gorgon_engine.kernels.cpu import NativeLibrary
from gorgon_engine.kernels.cpu.library import available_library
from gorgon_engine.kernels.cpu.sampling import gumbel_argmax
from gorgon_engine.random import Stream, gumbel_noise
from gorgon_protocol.errors import BadRequestError

MAX_LOGPROBS = 20
MAX_STOPS = 64


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request draws its tokens. Neutral values switch a parameter off; temperature 0 is greedy."""

    max_tokens: int | None = None  # None: up to the context's end
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output (CTRL, 1909.05858, section 4.1)
    presence_penalty: float = 0.0  # over the output, as OpenAI defines it
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # number of alternatives reported a token; 0 = the token's own only

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_p", self.top_p, 0.0, 1.0, exclusive_low=True)
        _in_range("top_k", self.top_k, 0, 2**31 - 1)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, exclusive_low=True)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("seed", self.seed, 0, 2**63 - 1)
        if self.max_tokens is not None:
            _in_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if self.logprobs is not None:
            _in_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOPS or not all(self.stop):
            raise BadRequestError(f"stop takes at most {MAX_STOPS} strings, none of them empty: got {self.stop!r}")
        for token, bias in self.logit_bias.items():
            _in_range(f"logit_bias of token {token}", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def filtered(self) -> bool:
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


def _in_range(name: str, value: float, low: float, high: float, *, exclusive_low: bool = False) -> None:
    if not math.isfinite(value) or not (low < value <= high or (value == low and not exclusive_low)):
        raise BadRequestError(f"{name} must be {'above' if exclusive_low else 'at least'} {low} and at most {high}: "
                              f"got {value}")  # fmt: skip


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What each sequence has said: the penalties' memory."""

    in_prompt: Tensor  # [R, V] bool
    in_output: Tensor  # [R, V] int32, number of times

    @classmethod
    def empty(cls, rows: Tensor, vocab_size: int) -> "TokenCounts":
        """Nothing said yet, for as many sequences as `rows` [R] has, on its device."""
        shape = (rows.shape[0], vocab_size)
        return cls(
            in_prompt=torch.zeros(shape, dtype=torch.bool, device=rows.device),
            in_output=torch.zeros(shape, dtype=torch.int32, device=rows.device),
        )

    def add(self, tokens: Tensor, active: Tensor) -> None:
        """Count one emitted token a row, in place. tokens: [R]; active: [R] bool."""
        self.in_output.scatter_add_(1, tokens[:, None], active[:, None].to(torch.int32))

    def select(self, rows: Tensor) -> "TokenCounts":
        """Copies of the given rows [S] int64."""
        return TokenCounts(in_prompt=self.in_prompt[rows], in_output=self.in_output[rows])


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The parameters of R rows as tensors; the host-side flags say which work none of the rows needs."""

    temperature: Tensor  # [R] float32
    top_p: Tensor  # [R] float32
    top_k: Tensor  # [R] int64
    min_p: Tensor  # [R] float32
    repetition_penalty: Tensor  # [R] float32
    presence_penalty: Tensor  # [R] float32
    frequency_penalty: Tensor  # [R] float32
    seeds: Tensor  # [R] int64
    vocab_size: int
    bias: Tensor | None  # [R, V] float32
    greedy: Tensor  # [R] bool
    all_greedy: bool
    any_penalty: bool
    any_filter: bool

    @classmethod
    def of(cls, params: "list[SamplingParams]", *, vocab_size: int, device: torch.device) -> "SamplingBatch":
        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=device)

        bias = None
        if any(p.logit_bias for p in params):
            bias = torch.zeros((len(params), vocab_size))
            for row, p in enumerate(params):
                for token, value in p.logit_bias.items():
                    if not 0 <= token < vocab_size:
                        raise BadRequestError(f"logit_bias names token {token}: the vocabulary has {vocab_size} tokens")
                    bias[row, token] = value
            bias = bias.to(device)
        return cls(
            temperature=column("temperature"),
            top_p=column("top_p"),
            top_k=column("top_k", torch.int64),
            min_p=column("min_p"),
            repetition_penalty=column("repetition_penalty"),
            presence_penalty=column("presence_penalty"),
            frequency_penalty=column("frequency_penalty"),
            seeds=column("seed", torch.int64),
            vocab_size=vocab_size,
            bias=bias,
            greedy=column("greedy", torch.bool),
            all_greedy=all(p.greedy for p in params),
            any_penalty=any(p.penalised for p in params),
            any_filter=any(p.filtered and not p.greedy for p in params),
        )

    @property
    def is_argmax(self) -> bool:
        """Whether every row's token is that of its largest logit, as the backbone gave it."""
        return self.all_greedy and not self.any_penalty and self.bias is None

    @classmethod
    def of_temperatures(cls, temperature: Tensor, seeds: Tensor, *, vocab_size: int) -> "SamplingBatch":
        """Rows that differ in temperature [R] float32 (0 = greedy) and seed [R] int64 alone. No value is looked at."""
        ones, zeros = torch.ones_like(temperature), torch.zeros_like(temperature)
        return cls(
            temperature=temperature,
            top_p=ones,
            top_k=torch.zeros_like(seeds),
            min_p=zeros,
            repetition_penalty=ones,
            presence_penalty=zeros,
            frequency_penalty=zeros,
            seeds=seeds,
            vocab_size=vocab_size,
            bias=None,
            greedy=temperature == 0.0,
            all_greedy=False,
            any_penalty=False,
            any_filter=False,
        )

    def repeat(self, times: int) -> "SamplingBatch":
        """Every row `times` times in a row: [R] -> [R * times]."""
        return self._map(lambda value: value.repeat_interleave(times, dim=0))

    def select(self, rows: Tensor) -> "SamplingBatch":
        """The given rows [S] int64 only: [R] -> [S]. The flags may speak of rows that are left out."""
        return self._map(lambda value: value[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "SamplingBatch":
        changed: dict[str, Any] = {
            f.name: change(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **changed)


def process_logits(logits: Tensor, batch: SamplingBatch, counts: TokenCounts | None) -> Tensor:
    """Logits [R, V] after bias, penalties, temperature and filters, float32: softmax gives the target distribution.

    `counts` must be given when `batch.any_penalty`. Filtered tokens are -inf; greedy rows keep their scale (their
    argmax is what counts). Order: bias, penalties, temperature, top_k, top_p, min_p (transformers' order). A row's
    result depends on that row alone, to the bit.
    """
    logits = logits.float()
    if batch.bias is not None:
        logits = logits + batch.bias
    if batch.any_penalty:
        assert counts is not None, "penalties need the sequences' token counts"
        logits = _penalise(logits, batch, counts)
    if batch.all_greedy:
        return logits
    logits = logits / torch.where(batch.greedy, 1.0, batch.temperature)[:, None]
    return _filter(logits, batch) if batch.any_filter else logits


def _penalise(logits: Tensor, batch: SamplingBatch, counts: TokenCounts) -> Tensor:
    if logits.device.type == "cpu":
        repetition, additive = batch.repetition_penalty != 1.0, (batch.presence_penalty, batch.frequency_penalty)
        rows = (repetition | (additive[0] != 0.0) | (additive[1] != 0.0)).nonzero()[:, 0]
        if rows.numel() < logits.shape[0]:  # nobody pays for another's penalties
            return logits.index_copy(0, rows, _penalised(logits[rows], batch.select(rows), counts.select(rows)))
    return _penalised(logits, batch, counts)


def _penalised(logits: Tensor, batch: SamplingBatch, counts: TokenCounts) -> Tensor:
    in_output = counts.in_output > 0
    repeated = torch.where(
        logits > 0, logits / batch.repetition_penalty[:, None], logits * batch.repetition_penalty[:, None]
    )
    logits = torch.where(in_output | counts.in_prompt, repeated, logits)
    logits = logits - batch.presence_penalty[:, None] * in_output
    return logits - batch.frequency_penalty[:, None] * counts.in_output


# Filters rarely keep more tokens than this: on a CPU, where sorting a vocabulary costs as much as half a forward pass,
# the rest is only looked at where they do.
_HEAD = 1024


def _filter(logits: Tensor, batch: SamplingBatch) -> Tensor:
    if logits.device.type != "cpu":
        return _filtered_by_sorting(logits, batch)
    # Row by row, so that one that needs a sort costs the others nothing and changes nothing of theirs.
    filtered = ((batch.top_p < 1.0) | (batch.top_k > 0) | (batch.min_p > 0.0)) & ~batch.greedy
    if logits.shape[1] <= _HEAD:
        return _replaced(logits, batch, filtered, _filtered_by_sorting)
    rows = filtered.nonzero()[:, 0]
    few = batch.select(rows)
    head, order = torch.softmax(logits[rows], dim=1).topk(_HEAD, dim=1)
    enough = (few.top_k > 0) & (few.top_k <= _HEAD)
    enough |= (few.top_p < 1.0) & (few.top_k == 0) & (head.cumsum(dim=1)[:, -1] >= few.top_p + 1e-4)
    enough |= (head[:, -1] < few.min_p * head[:, 0]) & (few.top_k <= _HEAD)
    kept = _keep(logits[rows[enough]], head[enough], order[enough], few.select(enough.nonzero()[:, 0]))
    sorted_too = torch.zeros_like(filtered)
    sorted_too[rows[~enough]] = True
    return _replaced(logits.index_copy(0, rows[enough], kept), batch, sorted_too, _filtered_by_sorting)


def _replaced(
    logits: Tensor, batch: SamplingBatch, where: Tensor, change: Callable[[Tensor, SamplingBatch], Tensor]
) -> Tensor:
    """Logits [R, V] with the rows `where` [R] bool changed."""
    rows = where.nonzero()[:, 0]
    if rows.numel() == 0:
        return logits
    return logits.index_copy(0, rows, change(logits[rows], batch.select(rows)))


def _filtered_by_sorting(logits: Tensor, batch: SamplingBatch) -> Tensor:
    # Stable: equal probabilities keep the order of their ids, so a cut through a tie is deterministic.
    ordered, order = torch.sort(torch.softmax(logits, dim=1), dim=1, descending=True, stable=True)
    return _keep(logits, ordered, order, batch)


def _keep(logits: Tensor, probs: Tensor, order: Tensor, batch: SamplingBatch) -> Tensor:
    """Logits [R, V] with all but the kept tokens at -inf. probs, order: [R, n], the n likeliest tokens, descending."""
    rank = torch.arange(probs.shape[1], device=probs.device)
    limited = (batch.top_k > 0)[:, None]
    in_top_k = ~limited | (rank < batch.top_k[:, None])
    kept = probs * in_top_k
    # top_p and min_p look at what top_k left, renormalised (transformers' processors run one after another).
    mass = kept.cumsum(dim=1)
    whole = torch.where(limited, mass[:, -1:], 1.0)
    reached = (mass - kept) / whole >= batch.top_p[:, None]
    drop = ~in_top_k | (reached & (batch.top_p < 1.0)[:, None]) | (kept < batch.min_p[:, None] * kept[:, :1])
    drop[:, 0] = False
    values = logits.gather(1, order).masked_fill(drop, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter_(1, order, values)


def sample(logits: Tensor, batch: SamplingBatch, positions: Tensor) -> Tensor:
    """One token a row from processed logits [R, V] at absolute positions [R] -> [R] int64. Ties: the lowest id."""
    if batch.all_greedy:
        return argmax(logits)
    if logits.device.type == "cpu" and (library := available_library()) is not None:
        return _drawn_on_cpu(library, logits, batch, positions)
    if logits.device.type == "cuda":
        from gorgon_engine.kernels.triton.gumbel_argmax import gumbel_argmax as fused_gumbel_argmax

        # The logits are at their temperature already: 1 draws from them as they are, 0 takes the largest.
        ones_and_zeros = torch.where(batch.greedy, 0.0, 1.0)
        return fused_gumbel_argmax(logits.contiguous(), ones_and_zeros, batch.seeds, positions, Stream.TARGET)
    noise = gumbel_noise(batch.seeds, positions, logits.shape[1])
    return torch.where(batch.greedy[:, None], logits, logits + noise).argmax(dim=1)


def _drawn_on_cpu(library: NativeLibrary, logits: Tensor, batch: SamplingBatch, positions: Tensor) -> Tensor:
    drawn = (~batch.greedy).nonzero()[:, 0]
    if drawn.numel() == logits.shape[0]:
        return gumbel_argmax(library, logits.contiguous(), batch.seeds, positions.contiguous(), Stream.TARGET)
    tokens = argmax(logits)
    tokens[drawn] = gumbel_argmax(library, logits[drawn], batch.seeds[drawn], positions[drawn], Stream.TARGET)
    return tokens


def argmax(logits: Tensor) -> Tensor:
    """The largest of each row [R, V] -> [R] int64, the lowest id among equals."""
    if logits.device.type == "cpu":
        # numpy's is vectorised, torch's is not: ten times as fast over a vocabulary.
        return torch.from_numpy(logits.detach().float().numpy().argmax(axis=1))
    return logits.argmax(dim=1)
