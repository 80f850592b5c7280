"""What every head says after a prompt: one look at trained heads, without drafting or verifying anything.

Letters: N prompt tokens, K heads, C hidden size, V tokens that can be drafted, M choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gorgon_engine.backbone.base import Backbone, ForwardInputs, ForwardOutput, LogitsFor
from gorgon_engine.drafters.choices import top_log_probs
from gorgon_engine.heads.checkpoint import LoadedHeads
from gorgon_engine.heads.eagle import EagleHead, Prefix
from gorgon_engine.heads.families import dtype_of
from gorgon_engine.heads.hydra import HydraHeads
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_engine.kv_cache import KVCache
from gorgon_protocol.errors import BadRequestError, ContextLengthError

_CHUNK_SIZE = 512


@dataclass(frozen=True, slots=True)
class Guess:
    token_id: int  # of the backbone's vocabulary, also where the heads draft from a part of it
    probability: float  # among the tokens that the head can draft


@dataclass(frozen=True, slots=True)
class HeadProbe:
    """The likeliest tokens at one offset behind the prompt's last token."""

    head: int  # from 1, in order of offset; the lm_head is counted where it answers for offset 1
    offset: int  # 1 = the very next token
    source: Literal["head", "lm_head"]
    top: tuple[Guess, ...]  # likeliest first


@torch.inference_mode()
def probe(backbone: Backbone, loaded: LoadedHeads, token_ids: Sequence[int], top: int = 3) -> list[HeadProbe]:
    """Run a prompt through the backbone and ask its heads, as `load_heads_for` gives them, what comes next.

    Offset 1 is answered by a head where the checkpoint has one for it, else by the backbone's own lm_head. Hydra and
    eagle heads are given the likeliest tokens of the lm_head and of the heads before, as if they had been drafted.

    Raises `BadRequestError` for a prompt that is empty, too long or not of this vocabulary, and for `top` below 1.
    """
    _check(backbone, token_ids, top)
    output = _prefill(backbone, token_ids)
    lm_head = _guesses(output.logits[0, -1], top)
    features = output.hidden[0].to(dtype_of(loaded.heads))  # [N, C]
    hidden = features[-1]  # [C]
    if isinstance(loaded.heads, EagleHead):
        known = [*token_ids[1:], lm_head[0].token_id]
        answers = _eagle(loaded.heads, backbone, features, known, loaded.draft_vocabulary, top)
    elif isinstance(loaded.heads, HydraHeads):
        answers = _hydra(loaded.heads, backbone, hidden, lm_head[0].token_id, loaded.draft_vocabulary, top)
    else:
        answers = _medusa(loaded.heads, backbone, hidden, loaded.draft_vocabulary, top)
    by_offset = dict(zip(loaded.manifest.offsets, answers, strict=True))
    probes = [] if 1 in by_offset else [HeadProbe(head=1, offset=1, source="lm_head", top=lm_head)]
    for head, (offset, guesses) in enumerate(by_offset.items(), start=1 + len(probes)):
        probes.append(HeadProbe(head=head, offset=offset, source="head", top=guesses))
    return probes


def _check(backbone: Backbone, token_ids: Sequence[int], top: int) -> None:
    config = backbone.config
    if top < 1:
        raise BadRequestError(f"top must be at least 1: got {top}")
    if not token_ids:
        raise BadRequestError("the prompt is empty: give at least one token of text")
    bad = next((token for token in token_ids if not 0 <= token < config.vocab_size), None)
    if bad is not None:
        raise BadRequestError(f"the prompt holds token {bad}: the vocabulary has {config.vocab_size} tokens")
    if len(token_ids) > config.max_positions:
        raise ContextLengthError(
            f"the prompt is {len(token_ids)} tokens long and the model takes {config.max_positions}: shorten it"
        )


def _prefill(backbone: Backbone, token_ids: Sequence[int]) -> ForwardOutput:
    """Of the whole prompt: hidden [1, N, C], logits [1, 1, V] of its last token."""
    config = backbone.config
    cache = KVCache(
        num_layers=config.num_layers,
        num_slots=1,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        capacity=len(token_ids),
        max_scratch=1,
        dtype=backbone.cache_dtype,
        device=backbone.device,
    )
    slot = cache.acquire()
    tokens = torch.tensor(list(token_ids), dtype=torch.int64, device=backbone.device)
    start, hidden = 0, []
    for chunk in tokens.split(_CHUNK_SIZE):
        inputs = ForwardInputs.chain(chunk, slot=slot, length=start, prompt_length=len(token_ids))
        output = backbone.forward(inputs, cache, logits_for=LogitsFor.LAST)
        cache.append(slot, chunk.shape[0])
        start += chunk.shape[0]
        hidden.append(output.hidden)
    return ForwardOutput(hidden=torch.cat(hidden, dim=1), row_logits=output.row_logits)


def _medusa(
    heads: MedusaHeads, backbone: Backbone, hidden: Tensor, vocabulary: Tensor | None, top: int
) -> list[tuple[Guess, ...]]:
    """All heads on the same hidden state [C]."""
    logits = heads(hidden[None], lambda features: _project(backbone, features, vocabulary))  # [1, K, V]
    return [_guesses(row, top, vocabulary) for row in logits[0]]


def _hydra(
    heads: HydraHeads, backbone: Backbone, hidden: Tensor, root: int, vocabulary: Tensor | None, top: int
) -> list[tuple[Guess, ...]]:
    """Head after head down their own greedy chain below the root."""
    drafted, answers = root, []
    conditions = heads.condition(hidden)  # [C], and [(1 + d) C] with d drafted tokens
    for depth in range(1, heads.num_heads + 1):
        embedding = backbone.embed(torch.tensor(drafted, device=hidden.device)).to(hidden.dtype)  # [C]
        conditions = torch.cat([conditions, heads.condition(embedding)])
        features = heads.features(depth, hidden, conditions)
        logits = heads.project(depth, features, lambda values: _project(backbone, values, vocabulary))  # [V]
        answers.append(_guesses(logits, top, vocabulary))
        drafted = answers[-1][0].token_id
    return answers


def _eagle(
    head: EagleHead, backbone: Backbone, features: Tensor, known: list[int], vocabulary: Tensor | None, top: int
) -> list[tuple[Guess, ...]]:
    """The layer behind the prompt's features [N, C] and the tokens `known` behind them, down its own greedy chain."""
    device, last = features.device, len(known) - 1
    following = backbone.embed(torch.tensor(known, device=device)).to(features.dtype)  # [N, C]
    angles = head.angles(torch.arange(len(known) + head.num_heads, device=device)[None])
    rows = head.rows(features[None, :, None], following[None, :, None], angles.up_to(len(known)))
    keys, values = (part[:, :, 0].transpose(1, 2) for part in (rows.keys, rows.values))
    prefix = Prefix(keys, values, torch.ones((1, 1, len(known)), dtype=torch.bool, device=device))
    answers: list[tuple[Guess, ...]] = []
    paths = head.begin(rows.at(last), prefix)
    while True:
        answers.append(_guesses(_project(backbone, paths.features.flatten(), vocabulary), top, vocabulary))
        if len(answers) == head.num_heads:
            return answers
        drafted = torch.tensor([[[answers[-1][0].token_id]]], device=device)
        embedding = backbone.embed(drafted).to(features.dtype)  # [1, 1, 1, C]
        paths = head.extend(prefix, paths, embedding, angles.at(last + len(answers)))


def _project(backbone: Backbone, features: Tensor, vocabulary: Tensor | None) -> Tensor:
    """The shared projection, [..., C] -> [..., V]: all rows of the lm_head, since a copy of some pays only later."""
    logits = backbone.project(features)
    return logits if vocabulary is None else logits[..., vocabulary]


def _guesses(logits: Tensor, top: int, vocabulary: Tensor | None = None) -> tuple[Guess, ...]:
    """The likeliest tokens of logits [V]."""
    log_probs, places = top_log_probs(logits[None], top)
    tokens = places if vocabulary is None else vocabulary[places]
    pairs = zip(tokens[0].tolist(), log_probs[0].exp().tolist(), strict=True)
    return tuple(Guess(token_id=token, probability=probability) for token, probability in pairs)
