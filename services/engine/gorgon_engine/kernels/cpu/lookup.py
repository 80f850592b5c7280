"""Prompt lookup on a CPU: one pass over the history, newest first, instead of a window for every position.

`gorgon_engine.drafters.ngram` says what is found, in tensor operations; the results are equal to the bit.

Letters: B sequences, S history positions, A chains, D depth of a chain.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from gorgon_engine.kernels.cpu.library import NativeLibrary, check


class LookupArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("history", "lengths")),
        *((name, ctypes.c_int64) for name in ("batch", "num_positions")),
        ("log_confidence", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("max_match", "num_chains", "depth")),
        *((name, ctypes.c_void_p) for name in ("tokens", "parents", "log_probs", "ranks")),
    )


class Chains(NamedTuple):
    """A chains of D candidates below each sequence's root, one after another; the fields are a CandidateTree's."""

    tokens: Tensor  # [B, A * D] int64
    parents: Tensor  # [B, A * D] int64
    log_probs: Tensor  # [B, A * D] float32, -inf = padding
    ranks: Tensor  # [B, A * D] int64


def lookup(
    library: NativeLibrary, history: Tensor, lengths: Tensor, log_confidence: Tensor, *, num_chains: int, depth: int
) -> Chains:
    """What followed the longest, then most recent, earlier occurrences of each sequence's end.

    history: [B, S] int64; lengths: [B] int64, at most S; log_confidence: [1 + max_match, 3] float32 by the number of
    matching tokens: of the first draft, of later ones, of the first draft of a further chain. num_chains: at most S.
    Raises ValueError for other shapes or lengths than these.
    """
    if history.ndim != 2 or not 1 <= num_chains <= history.shape[1] or depth < 1 or log_confidence.shape[0] < 2:
        raise ValueError(f"cannot look up {num_chains} chains of {depth} tokens in a history {list(history.shape)}")
    batch, num_positions = history.shape
    size = num_chains * depth
    tokens, parents, ranks = torch.empty((3, batch, size), dtype=torch.int64).unbind()
    log_probs = torch.empty((batch, size))
    arguments = LookupArgs(
        check("history", history, (batch, num_positions), torch.int64),
        check("lengths", lengths, (batch,), torch.int64),
        batch,
        num_positions,
        check("log_confidence", log_confidence, (log_confidence.shape[0], 3), torch.float32),
        log_confidence.shape[0] - 1,
        num_chains,
        depth,
        tokens.data_ptr(),
        parents.data_ptr(),
        log_probs.data_ptr(),
        ranks.data_ptr(),
    )
    if problem := library.handle.gorgon_lookup(ctypes.byref(arguments)):
        raise ValueError(f"prompt lookup: {problem.decode()}")
    return Chains(tokens, parents, log_probs, ranks)
