"""Tree attention: against the loop over branches and masked SDPA, and that a row's bits are its own."""

import pytest
import torch

from gorgon_engine.kernels.triton.tree_attention_plan import TreeAttentionPlan, check_dtype, pack_tree_mask
from gorgon_engine.tree.tree import ancestor_words, pack_mask, tree_mask
from gorgon_protocol.errors import BadRequestError, ModelError
from support.triton_checks import run_check

COMMON = """
from dataclasses import replace

from gorgon_engine.kernels import tree_attention as masked
from gorgon_engine.kernels.triton.tree_attention import reference, tree_attention
from gorgon_engine.kernels.triton.tree_attention_plan import TreeAttentionPlan
from gorgon_engine.tree.tree import ancestor_words, tree_mask

dtypes = (torch.float16, torch.bfloat16) if device == "cuda" else (torch.float32, torch.float16)


def make_plan(variant, *, heads, kv_heads, dim, batch, nodes, max_length, max_depth=15, **changes):
    plan = getattr(TreeAttentionPlan, variant)(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, batch=batch, num_nodes=nodes, max_length=max_length,
        max_depth=max_depth, device=torch.device(device),
    )
    return replace(plan, **changes)


def random_parents(nodes, max_depth=15):
    parents, depths = [-1], [0]
    while len(parents) < nodes:
        parent = int(torch.randint(len(parents), ()))
        if depths[parent] < max_depth:
            parents.append(parent)
            depths.append(depths[parent] + 1)
    return parents


def attend(plan, query, keys, values, slots, lengths, ancestors):
    workspace = plan.workspace(query.device)
    for tensor in (workspace.outs, workspace.bests, workspace.totals):
        tensor.fill_(torch.nan)  # nothing is read that was not written
    return tree_attention(query, keys, values, slots, lengths, ancestors, plan=plan, workspace=workspace)
"""

AGAINST_REFERENCE = (
    COMMON
    + """
for number, (variant, dim, heads, kv_heads, nodes, lengths, changes) in enumerate(CASES):
    # The interpreter is slow: there each case runs in one of the types.
    for dtype in dtypes if device == "cuda" else dtypes[number % 2 :][:1]:
        lengths_ = torch.tensor(lengths, device=device)
        batch, positions = len(lengths), max(lengths) + nodes + 3
        query = torch.randn(batch, nodes, heads, dim, device=device).to(dtype)
        keys = torch.randn(batch + 1, kv_heads, positions, dim, device=device).to(dtype)
        values = torch.randn_like(keys)
        slots = torch.randperm(batch + 1, device=device)[:batch]
        ancestors = ancestor_words(torch.tensor([random_parents(nodes) for _ in lengths], device=device))
        plan = make_plan(
            variant, heads=heads, kv_heads=kv_heads, dim=dim, batch=batch, nodes=nodes, max_length=max(lengths),
            **changes,
        )
        out = attend(plan, query, keys, values, slots, lengths_, ancestors)
        want = reference(query, keys, values, slots, lengths_, ancestors)
        error = ((out.double() - want).norm() / want.norm()).item()
        assert error < (4e-3 if dtype == torch.bfloat16 else 1e-3), (variant, dim, nodes, dtype, error)
        depths = torch.zeros(batch, nodes, dtype=torch.int64, device=device)
        mask = masked.attention_mask(lengths_, depths, ancestors, num_positions=positions, sliding_window=0)
        sdpa = masked.tree_attention(query.float(), keys, values, slots, mask)
        assert ((out.float() - sdpa).norm() / sdpa.norm()).item() < 5e-3, (variant, dim, nodes, dtype)
"""
)


@pytest.mark.parametrize(
    "cases",
    [
        # variant, head dim, query heads, KV heads, nodes, lengths, changes of the plan
        [
            ("exact", 64, 4, 1, 1, (70, 0), {}),
            ("exact", 128, 2, 1, 5, (300, 3, 64), {}),
            ("exact", 64, 3, 1, 20, (130,), {"unit": 64}),
            ("exact", 64, 7, 1, 9, (90,), {"whole": True, "unit": 64}),
            ("exact", 64, 2, 1, 4, (64 * 21,), {"unit": 64}),  # units of all three sizes
        ],
        [
            ("exact", 64, 2, 1, 128, (100,), {}),
            ("exact", 64, 4, 2, 9, (17, 16), {"tail": 64}),
            ("fast", 128, 4, 2, 3, (200, 11), {}),
            ("fast", 64, 4, 1, 33, (260,), {"unit": 128}),
            ("exact", 64, 2, 1, 6, (150,), {"tensor_descriptors": True}),
        ],
    ],
)
def test_equals_the_loop_over_branches(cases: list[object]) -> None:
    run_check(f"CASES = {cases!r}\ntorch.manual_seed(1)\n" + AGAINST_REFERENCE)


ROW_INVARIANCE = (
    COMMON
    + """
torch.manual_seed(SEED)
heads, kv_heads, dim, unit = 4, 2 if device == "cuda" else 1, 64, 64
for number, (length, nodes, parents, changes) in enumerate(CASES):
    for dtype in dtypes if device == "cuda" else dtypes[number % 2 :][:1]:
        parents = parents or random_parents(nodes)
        positions = length + 2 * nodes + 5
        max_length = length + nodes
        query = torch.randn(1, nodes, heads, dim, device=device).to(dtype)
        keys = torch.randn(2, kv_heads, positions, dim, device=device).to(dtype)
        values = torch.randn_like(keys)
        slot, lengths = torch.tensor([1], device=device), torch.tensor([length], device=device)
        shape = dict(heads=heads, kv_heads=kv_heads, dim=dim, batch=1, unit=unit)
        plan = make_plan("exact", nodes=nodes, max_length=max_length, **shape, **changes)
        out = attend(plan, query, keys, values, slot, lengths, ancestor_words(torch.tensor([parents], device=device)))
        # The same path as committed text behind the same prefix, its last token decoded plainly.
        plain = make_plan("exact", nodes=1, max_length=4 * max_length, **shape)
        one = torch.ones(1, 1, 1, dtype=torch.int64, device=device)
        for node in {0, nodes // 2, nodes - 1}:
            path = [node]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            rows = length + torch.tensor(path, device=device)
            plain_keys, plain_values = torch.randn_like(keys), torch.randn_like(values)
            for to, source in ((plain_keys, keys), (plain_values, values)):
                to[0, :, :length] = source[1, :, :length]
                to[0, :, length : length + len(path)] = source[1][:, rows]
            alone = attend(
                plain, query[:, node : node + 1].contiguous(), plain_keys, plain_values,
                torch.zeros_like(slot), lengths + len(path) - 1, one,
            )
            assert torch.equal(alone[0, 0], out[0, node]), (length, nodes, node, dtype, changes)
"""
)

CHAIN, STAR = [-1, *range(11)], [-1, *([0] * 11)]
FLATTENED = [-1, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "cases",
    [
        # length, nodes, parents (None = random), changes of the plan
        [
            (63, 12, CHAIN, {}),
            (64, 12, STAR, {}),
            (72, 12, CHAIN, {}),
            (5, 12, CHAIN, {}),
            (79, 20, None, {}),
            (80, 20, None, {"whole": True}),
        ],
        [
            (81, 9, FLATTENED, {}),
            (0, 5, None, {}),
            (143, 66, None, {}),
            (143, 16, None, {}),
            (190, 12, CHAIN, {"whole": True}),
            (520, 9, FLATTENED, {}),
        ],
    ],
)
def test_a_row_has_the_same_bits_in_a_tree_as_alone(cases: list[object]) -> None:
    run_check(f"CASES = {cases!r}\nSEED = 3\n" + ROW_INVARIANCE)


EDGES = (
    COMMON
    + """
torch.manual_seed(5)
query, keys, values = (torch.randn(2, n, h, 64, device=device).half() for n, h in ((9, 2), (1, 150), (1, 150)))
slots, lengths = torch.tensor([1, 0], device=device), torch.tensor([130, 40], device=device)
parents = torch.tensor([[-1, 0, 0, 1, 1, 1, 2, 2, 2]] * 2, device=device)
plan = make_plan("exact", heads=2, kv_heads=1, dim=64, batch=2, nodes=9, max_length=140)

# The flattening example: the boolean TreeMask of both sequences, block by block, is what its words are.
boolean = torch.block_diag(*tree_mask(parents)).bool()
assert boolean.shape == (18, 18)
words = ancestor_words(parents)
by_mask = attend(plan, query, keys, values, slots, lengths, boolean)
assert torch.equal(by_mask, attend(plan, query, keys, values, slots, lengths, words))

# In a batch or alone, with a plan for more: the same bits. Scratch of other nodes never shows.
larger = make_plan("exact", heads=2, kv_heads=1, dim=64, batch=4, nodes=30, max_length=700)
for b in range(2):
    pick = slice(b, b + 1)
    alone = attend(larger, query[pick], keys, values, slots[pick], lengths[pick], words[pick])
    assert torch.equal(alone, by_mask[pick])
keys[1, :, 131] += 3
changed = attend(plan, query, keys, values, slots, lengths, words)
for node in range(9):
    sees = bool(tree_mask(parents)[0, node, 1])
    assert torch.equal(changed[0, node], by_mask[0, node]) != sees, node
assert torch.equal(changed[1], by_mask[1])

# Any mask: gaps, no bit at all (the prefix alone; nothing at all gives zeros), more ancestors than the tail holds.
free = torch.rand(2, 9, 9, device=device) < 0.5
free[:, 3] = False
words = (free.long() << torch.arange(9, device=device)).sum(2)[:, :, None]
lengths[1] = 0
out = attend(plan, query, keys, values, slots, lengths, words)
want = reference(query, keys, values, slots, lengths, words).nan_to_num(0.0)
torch.testing.assert_close(out.double(), want, atol=4e-3, rtol=4e-3)
assert not out[1, 3].any()
chain = torch.arange(40, device=device)[None] - 1
query = torch.randn(1, 40, 2, 64, device=device).half()
lengths[0] = 110
out = attend(larger, query[:, :30].contiguous(), keys, values, slots[:1], lengths[:1], ancestor_words(chain[:, :30]))
want = reference(query[:, :30], keys, values, slots[:1], lengths[:1], ancestor_words(chain[:, :30]))
torch.testing.assert_close(out.double(), want, atol=4e-3, rtol=4e-3)
"""
)


def test_masks_batches_and_chains_at_the_edges() -> None:
    run_check(EDGES)


def make(**changes: int) -> TreeAttentionPlan:
    shape = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "batch": 1, "num_nodes": 64, "max_length": 8192}
    return TreeAttentionPlan.exact(**(shape | changes), max_depth=15, device=torch.device("cpu"))


def test_unsupported_shapes_are_one_clear_line() -> None:
    with pytest.raises(ModelError, match=r"head dim of 80: use the torch attention, or a model with 64 or 128$"):
        make(head_dim=80)
    with pytest.raises(BadRequestError, match="1 to 128 nodes, not 129: lower max_nodes"):
        make(num_nodes=129)
    with pytest.raises(ModelError, match=r"bfloat16 or float16, not torch\.float32"):
        check_dtype(torch.float32)


def test_units_do_not_depend_on_tree_or_batch() -> None:
    plans = [make(batch=b, num_nodes=n) for b in (1, 8) for n in (1, 16, 128)]
    assert {(plan.unit, plan.growing, plan.tail, plan.num_units) for plan in plans} == {(256, True, 16, 16)}
    assert [make(max_length=n).num_units for n in (0, 1, 256, 257, 2048, 2049, 4096, 4097)] == [
        1,
        1,
        1,
        2,
        8,
        9,
        12,
        13,
    ]
    assert not make().whole
    assert make(batch=8).whole
    assert make(batch=8).num_partial_rows == 8 * 64 * 32


@pytest.mark.parametrize("num_nodes", [1, 63, 64, 65, 128])
def test_a_tree_mask_packs_to_ancestor_words(num_nodes: int) -> None:
    parents = torch.stack([torch.arange(num_nodes) - 1, (torch.arange(num_nodes) - 1) // 2])
    parents[:, 0] = -1
    mask = tree_mask(parents)
    packed = pack_tree_mask(torch.block_diag(*mask).bool(), 2)
    assert torch.equal(packed, ancestor_words(parents))
    assert torch.equal(packed, pack_mask(mask))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 4, dtype=torch.bool), "sees another sequence's nodes"),
        (torch.ones(4, 2, dtype=torch.bool), r"not \(4, 2\)"),
        (torch.ones(3, 3, dtype=torch.bool), r"not \(3, 3\)"),
        (torch.eye(4), "is boolean"),
    ],
)
def test_what_is_no_tree_mask_is_refused(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        pack_tree_mask(mask, 2)
