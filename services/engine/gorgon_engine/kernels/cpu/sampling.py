"""argmax(logits + Gumbel noise) on a CPU: some hundredths of a millisecond for a vocabulary of 50,000.

The noise is that of `gorgon_engine.random` (same bits, logarithms to the last ulp or so).
"""

import torch
from torch import Tensor

from gorgon_engine.kernels.cpu.library import NativeLibrary, check


def gumbel_argmax(library: NativeLibrary, logits: Tensor, seeds: Tensor, positions: Tensor, stream: int) -> Tensor:
    """One token a row. logits: [R, V] float32; seeds, positions: [R] int64 -> [R] int64. Ties: the lowest id."""
    rows, vocab_size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    code = library.handle.gorgon_gumbel_argmax(
        check("logits", logits, (rows, vocab_size), torch.float32),
        rows,
        vocab_size,
        check("seeds", seeds, (rows,), torch.int64),
        check("positions", positions, (rows,), torch.int64),
        stream,
        tokens.data_ptr(),
    )
    if code != 0:
        raise MemoryError(f"no memory to draw {rows} tokens")
    return tokens
