"""The kernels of an EAGLE draft against their references, and against the search in tensor operations."""

import pytest

from support.triton_checks import run_check

INPUTS = """
from gorgon_engine.kernels.triton.eagle_inputs import eagle_inputs, reference

for batch, each, size, is_chain, has_paths in (
    (1, 1, 48, False, True), (2, 3, 100, True, False), (3, 2, 64, False, True)
):
    rows = batch * each
    features = torch.randn(5 if has_paths else rows, size, device=device) * 3
    given = dict(
        feature_gain=torch.rand(size, device=device) + 0.5, embedding_gain=torch.rand(size, device=device) + 0.5,
        cos=torch.randn(12, 8, device=device), sin=torch.randn(12, 8, device=device), eps=1e-5, offset=2,
        place_offset=7, is_chain=is_chain, paths=torch.randint(5, (rows,), device=device) if has_paths else None,
    )
    # The last sequence stands at the end: its padding is behind the last angle.
    starts = torch.tensor([0, 4, 8][:batch], device=device)
    got, want = (f(features, embeddings, starts, **given)
                 for embeddings in [torch.randn(rows, size, device=device)] for f in (eagle_inputs, reference))
    torch.testing.assert_close(got.inputs.double(), want.inputs, atol=1e-5, rtol=1e-5)
    for name in ("residual", "cos", "sin", "places"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
"""

KEEP = """
from gorgon_engine.kernels.triton.eagle_keep import eagle_keep, reference

for batch, each, size, heads in ((1, 1, 48, 2), (3, 4, 1100, 3)):
    x = torch.randn(batch * each, size, device=device)
    query = torch.randn(batch * each, heads, 16, device=device).half()
    slots = torch.randperm(5, device=device)[:batch]
    counts = torch.tensor([each, 0, 2][:batch], device=device)
    kept = [(torch.full((5, size), 7.0, device=device), torch.full((5, heads, 16), 7.0, device=device).half())
            for _ in range(2)]
    eagle_keep(x, query, slots, counts, *kept[0])
    reference(x, query, slots, counts, *kept[1])
    assert all(torch.equal(got, want) for got, want in zip(*kept))
    assert not torch.equal(kept[0][0], torch.full_like(kept[0][0], 7.0))
"""

BEAM = """
from dataclasses import fields

from gorgon_engine.kernels.triton import eagle_beam, eagle_tree
from gorgon_engine.kernels.triton.eagle_beam import BeamPaths, FoundNodes


def same(got, want):
    for field in fields(got):
        left, right = getattr(got, field.name), getattr(want, field.name)
        assert torch.equal(left, right), (field.name, left, right)


def some_log_probs(*shape):
    # Few different values: ties everywhere; some paths end.
    values = -torch.randint(0, 4, shape, device=device).float()
    return torch.where(torch.rand(shape, device=device) < 0.1, -torch.inf, values)


vocabulary = torch.randperm(50, device=device)
for batch, sizes, num_choices, said in (
    (1, [1, 3, 4], 3, None), (3, [1, 2, 8, 8, 1], 5, vocabulary), (2, [1, 8, 16, 16, 16], 8, vocabulary),
    (2, [1], 4, None),
):
    kept = [min(20, width * num_choices) for width in sizes]
    found = [FoundNodes.empty(batch, sum(kept), torch.device(device)) for _ in range(2)]
    for nodes in found:
        for field in fields(nodes):
            getattr(nodes, field.name).zero_()
    paths = [None, None]
    bit = 0
    for depth, width in enumerate(sizes):
        log_probs = some_log_probs(batch, width, num_choices)
        choices = torch.randint(50, log_probs.shape, device=device)
        below = sizes[depth + 1] if depth + 1 < len(sizes) else 0
        more = dict(
            vocabulary=said, first_node=sum(kept[:depth]), num_kept=kept[depth], width=min(below, kept[depth]),
            first_bit=bit,
        )
        paths = [f(log_probs, choices, above, nodes, **more)
                 for f, above, nodes in zip((eagle_beam.eagle_beam, eagle_beam.reference), paths, found)]
        bit += below
        same(*paths)
        same(*found)
    for num_nodes in (1, 7, sum(kept), sum(kept) + 40):
        same(eagle_tree.eagle_tree(found[0], num_nodes), eagle_tree.reference(found[1], num_nodes))
"""


@pytest.mark.parametrize("program", [INPUTS, KEEP, BEAM], ids=["inputs", "keep", "beam and tree"])
def test_against_the_reference(program: str) -> None:
    run_check(program)
