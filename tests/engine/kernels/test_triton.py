"""The Triton kernels against their references: on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so each check runs in a process of its own.
"""

import os
import subprocess
import sys

import pytest
import torch

# Triton 3.6 turns one-element arrays into integers in a way that numpy 2.4 refuses.
PRELUDE = """
import os
import torch
if os.environ.get("TRITON_INTERPRET"):
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
"""

ATTENTION = """
from gorgon_engine.kernels.triton.attention import attention, reference
from gorgon_engine.tree.tree import ancestor_words

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed({seed})
batch, rows, heads, kv_heads, dim, positions = {shape}
dtype = torch.{dtype}
keys = torch.randn(batch + 1, kv_heads, positions, dim, device=device).to(dtype)
values = torch.randn_like(keys)
query = torch.randn(batch, rows, heads, dim, device=device).to(dtype)
slots = torch.randperm(batch + 1, device=device)[:batch]
lengths = torch.randint(0, positions - rows + 1, (batch,), device=device)
ancestors = None
if {tree}:
    parents = torch.stack([(torch.rand(rows) * torch.arange(rows)).long() for _ in range(batch)]).to(device)
    parents[:, 0] = -1
    ancestors = ancestor_words(parents)
else:
    lengths[0] = 0
out = attention(query, keys, values, slots, lengths, ancestors)
want = reference(query, keys, values, slots, lengths, ancestors)
error = ((out.double() - want).norm() / want.norm()).item()
assert error < {tolerance}, error
"""

GUMBEL = """
from gorgon_engine.kernels.triton.gumbel_argmax import gumbel_argmax, reference
from gorgon_engine.random import Stream

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed({seed})
rows, vocab = {shape}
logits = torch.randn(rows, vocab, device=device) * 3
logits[0, vocab // 2 :] = -torch.inf
logits[1] = logits[1].round()  # ties: the lowest id
temperatures = torch.rand(rows, device=device) + 0.2
temperatures[1::3] = 0.0
seeds = torch.randint(0, 2**62, (rows,), device=device)
positions = torch.randint(0, 2**40, (rows,), device=device)
for stream in Stream:
    tokens = gumbel_argmax(logits, temperatures, seeds, positions, stream)
    expected = reference(logits, temperatures, seeds, positions, stream)
    greedy = temperatures == 0
    assert torch.equal(tokens[greedy], expected[greedy])
    # Logarithms differ in the last bit: near-ties may fall the other way, hardly ever.
    assert (tokens == expected).float().mean() > 0.98, (tokens, expected)
assert not torch.equal(gumbel_argmax(logits, temperatures, seeds + 1, positions, Stream.TARGET), tokens)
"""


def run(script: str) -> None:
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = os.environ | interpreted
    result = subprocess.run([sys.executable, "-c", PRELUDE + script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(
    ("tree", "shape"),
    [
        (True, (2, 5, 6, 2, 16, 150)),
        (True, (1, 70, 4, 2, 32, 90)),
        (True, (3, 1, 3, 1, 64, 200)),
        (False, (2, 9, 6, 2, 16, 100)),
        (False, (2, 40, 9, 3, 64, 130)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention(tree: bool, shape: tuple[int, ...], dtype: str) -> None:
    # A GPU multiplies float32 in tf32.
    run(ATTENTION.format(seed=1, shape=shape, tree=tree, dtype=dtype, tolerance=2e-3))


@pytest.mark.parametrize("shape", [(7, 67), (12, 3000)])
def test_gumbel_argmax(shape: tuple[int, int]) -> None:
    run(GUMBEL.format(seed=2, shape=shape))
