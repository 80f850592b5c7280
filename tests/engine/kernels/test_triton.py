"""The Triton kernels against their references."""

import pytest

from support.triton_checks import run_check

ATTENTION = """
from gorgon_engine.kernels.triton.attention import attention, reference
from gorgon_engine.tree.tree import ancestor_words

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
    run_check(ATTENTION.format(seed=1, shape=shape, tree=tree, dtype=dtype, tolerance=2e-3))


@pytest.mark.parametrize("shape", [(7, 67), (12, 3000)])
def test_gumbel_argmax(shape: tuple[int, int]) -> None:
    run_check(GUMBEL.format(seed=2, shape=shape))
