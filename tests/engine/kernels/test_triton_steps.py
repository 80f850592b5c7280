"""The kernels around the forward pass, each against what it stands for: lookup, trees, the walk, the commit, choices.

On a CPU they run in Triton's interpreter: the callers are told by `dispatch.uses_triton`, as they are on a GPU.
"""

from pathlib import Path

import pytest

from support.triton_checks import run_check

SWITCH = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from gorgon_engine.kernels import dispatch
dispatch.uses_triton = lambda tensor: True
from support.step_checks import assert_same, closed_forest, random_forest, random_parents
generator = torch.Generator().manual_seed(5)
"""

TREES = """
from gorgon_engine.kernels.triton import tree_build
from gorgon_engine.tree.tree import flatten, flatten_reference, merge_candidates, merge_reference

launched = []
for name in ("merge", "flatten"):
    kernel = getattr(tree_build, name)
    setattr(tree_build, name, lambda *a, name=name, kernel=kernel, **k: launched.append(name) or kernel(*a, **k))

MERGED = ("tokens", "parents", "log_probs", "ranks", "sources", "source_names")
FLAT = (*MERGED, "depths", "ancestors", "num_nodes")
cases = [((1,), 1, 2), ((5,), 3, 4), ((20, 17), 6, 33), ((3, 30, 9), 2, 20), ((64,), 16, 65), ((64, 64, 64), 9, 128)]
for counts, max_depth, max_nodes in cases:
    for vocab_size in (2, 40):
        raw = [random_forest(3, n, vocab_size=vocab_size, generator=generator, device=device) for n in counts]
        limits = dict(max_nodes=max_nodes, max_depth=max_depth)
        assert_same(merge_candidates(raw, **limits), merge_reference(raw, **limits), MERGED)
        merged = merge_reference([closed_forest(forest) for forest in raw], **limits)
        root_tokens = torch.tensor([9, 8, 7], device=device)
        for width in {1, 2, max_nodes // 2, max_nodes}:
            num_nodes = torch.tensor([width, max(1, width // 2), 1], device=device)
            got = flatten(root_tokens, merged, num_nodes, width)
            assert_same(got, flatten_reference(root_tokens, merged, num_nodes, width), FLAT)
        num_nodes = torch.ones_like(root_tokens)
        assert_same(flatten(root_tokens, None, num_nodes, 1), flatten_reference(root_tokens, None, num_nodes, 1), FLAT)
assert set(launched) == {"merge", "flatten"}

# A chain as deep as trees get; one topology expanded over the batch.
chain = torch.arange(127, device=device)
forest = random_forest(2, 127, vocab_size=99, generator=generator, device=device)
deep = type(forest)(
    forest.tokens, (chain - 1).expand(2, -1), -chain.float().expand(2, -1) / 8, (chain * 0).expand(2, -1), "test"
)
limits = dict(max_nodes=128, max_depth=127)
merged = merge_reference([deep], **limits)
assert_same(merge_candidates([deep], **limits), merged, MERGED)
for width in (64, 65, 128):
    arguments = torch.tensor([3, 4], device=device), merged, torch.tensor([width, 2], device=device), width
    assert_same(flatten(*arguments), flatten_reference(*arguments), FLAT)

# More than the kernel holds is left to tensor operations.
before = len(launched)
many = [random_forest(1, 100, vocab_size=3, generator=generator, device=device) for _ in range(3)]
assert_same(merge_candidates(many, **limits), merge_reference(many, **limits), MERGED)
assert len(launched) == before
"""

LOOKUP = """
from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.drafters.ngram import NgramDrafter
import gorgon_engine.kernels.triton.lookup as kernel

kernel._BLOCK = 32  # many blocks of a short history

def check(history, lengths, drafter, max_nodes):
    history, lengths = history.to(device), lengths.to(device)
    context = DraftContext(history[:, 0], history[:, :1].float(), history, lengths, lengths)
    depth = min(drafter.depth, max_nodes)
    num_chains = min(drafter.num_chains, history.shape[1], max(1, max_nodes // depth))
    got = drafter.propose(context, max_nodes)
    assert_same(got, drafter.propose_reference(context, num_chains, depth), ("tokens", "parents", "log_probs", "ranks"))

for trial in range(40):
    size = int(torch.randint(1, 150, (), generator=generator))
    vocab_size = (2, 5, 1000)[trial % 3]
    history = torch.randint(vocab_size, (3, size), generator=generator)
    lengths = torch.randint(1, size + 1, (3,), generator=generator)
    lengths[0] = size
    shape = dict(max_match=(1, 5, 8)[trial % 3], num_chains=1 + trial % 4, depth=1 + trial % 7)
    drafter = NgramDrafter(**shape, device=torch.device(device))
    check(history, lengths, drafter, 1 + trial)

drafter = NgramDrafter(device=torch.device(device))
check(torch.zeros(1, 200, dtype=torch.int64), torch.tensor([200]), drafter, 48)  # all equal: matches everywhere
check(torch.arange(100)[None], torch.tensor([100]), drafter, 48)  # nothing at all
check(torch.arange(40).repeat(5)[None], torch.tensor([190]), drafter, 48)  # the same match in every block
wide = torch.randint(3, (2, 300), generator=generator)[:, :130]  # a view: the rows of a longer history
check(wide, torch.tensor([130, 1]), drafter, 48)
"""

WALK = """
from gorgon_engine.kernels.triton.accept_walk import accept_walk, reference

for num_nodes in (1, 2, 7, 32, 64, 65, 128):
    for max_depth in (1, 4, 20):
        parents = random_parents(6, num_nodes, generator=generator).to(device)
        tokens = torch.randint(3, parents.shape, generator=generator).to(device)
        drawn = torch.randint(3, parents.shape, generator=generator).to(device)
        kept = torch.randint(1, num_nodes + 1, (6,), generator=generator).to(device)
        kept[0] = num_nodes
        # A whole branch right, and twins of which the first counts.
        drawn[0] = 1
        tokens[0] = 1
        got = accept_walk(drawn, tokens, parents, kept, max_depth=max_depth)
        assert_same(got, reference(drawn, tokens, parents, kept, max_depth=max_depth), got._fields)
        places = torch.arange(got.path.shape[1], device=device)
        assert (got.path >= places).all()
        assert (got.path < num_nodes).all()
"""

ACCEPT = """
from gorgon_engine.acceptance import AcceptanceRule, accept
from gorgon_engine.backbone.base import RowLogits
from gorgon_engine.sampling import SamplingBatch, SamplingParams
from gorgon_engine.tree.tree import TreeBatch, ancestor_words
import gorgon_engine.kernels.triton.gumbel_argmax as drawing

drawing._PART = 64  # several parts of a small vocabulary
launches = []
draw = drawing.draw_behind_nodes
drawing.draw_behind_nodes = lambda *a, **k: launches.append(1) or draw(*a, **k)

def trees(num_nodes, kept, vocab_size):
    parents = random_parents(3, num_nodes, generator=generator)
    depths = torch.zeros_like(parents)
    for node in range(1, num_nodes):
        depths[:, node] = depths.gather(1, parents[:, node : node + 1])[:, 0] + 1
    tokens = torch.randint(vocab_size, parents.shape, generator=generator)
    parts = [tokens, parents, depths, ancestor_words(parents), -depths.float(), tokens * 0, tokens * 0, kept]
    return TreeBatch(*(part.to(device) for part in parts))

greedy, hot, cold = SamplingParams(), SamplingParams(temperature=1.3, seed=2**40 + 7), SamplingParams(temperature=0.6)
for vocab_size, num_nodes, params in (
    (3, 12, [greedy] * 3), (4, 12, [hot, cold, greedy]), (150, 1, [hot, greedy, cold]), (200, 5, [greedy] * 3),
):
    sampling = SamplingBatch.of(params, vocab_size=vocab_size, device=torch.device(device))
    kept = torch.tensor([num_nodes, max(1, num_nodes - 2), 1])
    tree = trees(num_nodes, kept, vocab_size)
    flat = torch.randn(3 * num_nodes, vocab_size, generator=generator).to(device) * 2
    flat = flat.round() if params[0].greedy else flat  # ties: the lowest id
    whole = RowLogits(flat, torch.arange(3, device=device) * num_nodes, num_nodes)
    # The same rows without those that are padding.
    rows = torch.cat([b * num_nodes + torch.arange(int(kept[b])) for b in range(3)]).to(device)
    starts = torch.tensor([0, int(kept[0]), int(kept[0] + kept[1])], device=device)
    tight = RowLogits(flat[rows], starts, num_nodes)
    positions = torch.tensor([5, 2**33, 70], device=device)
    common = dict(positions=positions, sampling=sampling, counts=None, rule=AcceptanceRule.LOSSLESS, max_depth=6)
    launches.clear()
    outputs = [accept(tree, logits, **common) for logits in (whole, tight)]
    assert len(launches) == 2
    dispatch.uses_triton = lambda tensor: False
    want = accept(tree, whole, **common)
    dispatch.uses_triton = lambda tensor: True
    for got in outputs:
        assert torch.equal(got.num_committed, want.num_committed)
        for b, count in enumerate(want.num_committed.tolist()):
            assert torch.equal(got.path[b, :count], want.path[b, :count])
            assert torch.equal(got.tokens[b, :count], want.tokens[b, :count])

# Filters and biases are tensor operations' work, on a GPU too.
launches.clear()
filtered = SamplingBatch.of([SamplingParams(temperature=1.0, top_k=3)] * 3, vocab_size=200, device=torch.device(device))
accept(tree, whole, **(common | dict(sampling=filtered)))
assert not launches
"""

COMMIT = """
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.kernels.triton.kv_commit import reference

def make_cache(head_dim, dtype):
    cache = KVCache(num_layers=3, num_slots=4, num_kv_heads=2, head_dim=head_dim, capacity=40, max_scratch=20,
                    dtype=dtype, device=torch.device(device))
    cache.keys.copy_(torch.randn(cache.keys.shape, generator=generator))
    cache.values.copy_(torch.randn(cache.values.shape, generator=generator))
    return cache

for trial, (head_dim, hidden_size, dtype) in enumerate(
    [(16, 48, torch.float32), (24, 1100, torch.float16), (64, 2048, torch.float16), (8, 7, torch.float32)] * 3
):
    cache, batch = make_cache(head_dim, dtype), 1 + trial % 3
    places = (1, 3, 9)[trial % 3]
    slots = torch.randperm(4, generator=generator)[:batch].to(device)
    cache.lengths[slots] = torch.randint(0, 41, (batch,), generator=generator).to(device)
    path = torch.stack([torch.randperm(19, generator=generator)[: places - 1].sort().values + 1 for _ in range(batch)])
    path = torch.cat([torch.zeros(batch, 1, dtype=torch.int64), path], dim=1).to(device)
    if trial == 4:
        path[0] = torch.arange(places)  # nothing moves
    kept = torch.randint(1, places + 1, (batch,), generator=generator).to(device)
    kept[0] = places
    tokens = torch.randint(1000, path.shape, generator=generator).to(device)
    history = torch.randint(1000, (4, 61), generator=generator).to(device)
    hidden = torch.randn(batch, 20, hidden_size, generator=generator).to(dtype).to(device)
    starts = cache.lengths[slots]
    expected = [t.clone() for t in (cache.keys, cache.values, cache.lengths)]
    sliced = [t.clone() for t in expected]
    old_history = history.clone()
    after = reference(*expected, slots=slots, starts=starts, path=path, num_committed=kept, tokens=tokens,
                      history=old_history, hidden=hidden)
    got = cache.commit_step(slots, path, kept, tokens=tokens, history=history, hidden=hidden)
    assert torch.equal(cache.keys, expected[0])
    assert torch.equal(cache.values, expected[1])
    assert torch.equal(cache.lengths, expected[2])
    assert torch.equal(history, old_history)
    assert torch.equal(got.tokens, after.root_tokens)
    assert torch.equal(got.hidden, after.hidden)
    cache.keys, cache.values, cache.lengths = sliced
    cache.commit(slots, path, kept)
    for now, then in zip(sliced, expected):
        assert torch.equal(now, then)
"""

CHOICES = """
from gorgon_engine.drafters.choices import top_log_probs
from gorgon_engine.kernels.cpu.drafting import reference
import gorgon_engine.kernels.triton.top_log_probs as kernel

kernel._PART = 128  # several parts of a small vocabulary
launches = []
choose = kernel.top_log_probs
kernel.top_log_probs = lambda *a: launches.append(1) or choose(*a)
nan, inf = torch.nan, torch.inf
for rows, vocab_size, count, dtype in (
    (1, 1, 1, torch.float32), (3, 100, 16, torch.float32), (2, 128, 10, torch.float16), (5, 1000, 8, torch.float32),
    (4, 130, 3, torch.float32), (2, 3000, 1, torch.float16),
):
    logits = (torch.randn(rows, vocab_size, generator=generator) * 4).to(dtype).to(device)
    logits[-1] = logits[-1].round()  # ties
    logits[0, vocab_size // 2 :] = -inf
    logits[0, 0] = 0.0
    got, want = top_log_probs(logits, count), reference(logits, count)
    assert torch.equal(got[1], want.ids)
    torch.testing.assert_close(got[0], want.log_probs, atol=2e-6, rtol=2e-6)
    alone = top_log_probs(logits[:1].clone(), count)
    assert torch.equal(alone[0], got[0][:1])
broken = torch.randn(6, 300, generator=generator).to(device)
broken[0, 7], broken[1, 299], broken[2], broken[3, :2] = nan, inf, -inf, torch.tensor([-0.0, 0.0], device=device)
broken[3, 2:] = -1.0
broken[4, 128:] = -inf  # parts without a token
got, want = top_log_probs(broken, 5), reference(broken, 5)
assert torch.equal(got[1], want.ids)
torch.testing.assert_close(got[0], want.log_probs, atol=2e-6, rtol=2e-6)
view = torch.randn(2, 3, 400, generator=generator).to(device)[..., ::2]
assert torch.equal(top_log_probs(view, 4)[1], reference(view.flatten(0, 1), 4).ids.view(2, 3, 4))
assert len(launches) == 14
top_log_probs(broken, 17)
assert len(launches) == 14  # more than the kernel holds
"""

STEP = """
import tempfile
from pathlib import Path
from gorgon_engine.acceptance import AcceptanceRule
from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.step import SpeculativeStep, Wanted
from support.drafters import OracleDrafter, RandomDrafter
from support.models import VOCAB, tiny_llama
from support.steps import prefill

place = torch.device(device)
with tempfile.TemporaryDirectory() as folder:
    kernels = Kernels.TORCH if device == "cuda" else Kernels.NATIVE
    options = BackboneOptions(dtype=torch.float32, kernels=kernels, device=device)
    backbone = load_backbone(tiny_llama(Path(folder)), options)[0]
shape = backbone.config

class FromHost:
    is_costly = False

    def __init__(self, inner):
        self.inner, self.name = inner, inner.name

    def propose(self, context, max_nodes):
        context = type(context)(*(getattr(context, name).cpu() for name in context.__slots__))
        forest = self.inner.propose(context, max_nodes)
        parts = forest.tokens, forest.parents, forest.log_probs, forest.ranks
        return type(forest)(*(part.to(device) for part in parts), source=forest.source)

PROMPTS = ([5, 6, 7] * 4, [11, 12])

def answer(params, drafters, num_steps, *, in_kernels):
    dispatch.uses_triton = lambda tensor: in_kernels
    num_nodes = 16 if drafters else 1
    cache = KVCache(num_layers=shape.num_layers, num_slots=2, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
                    capacity=120, max_scratch=16, dtype=torch.float32, device=place)
    step = SpeculativeStep(backbone, cache, drafters, max_nodes=num_nodes, max_depth=5)
    states = [prefill(step, prompt, params, chunk=8) for prompt in PROMPTS]
    batch, said = states[0].batch.join(states[1].batch, [params] * 2), [list(state.tokens[0]) for state in states]
    for _ in range(num_steps):
        bound = int(cache.lengths.max())
        result = step.run(batch, [num_nodes] * 2, max_length=bound, rule=AcceptanceRule.LOSSLESS, wanted=Wanted())
        batch = result.batch
        for row, tokens in zip(said, result.tokens):
            row += tokens
    return said, batch.hidden, cache

for params in (SamplingParams(), SamplingParams(temperature=0.7, seed=4)):
    plain, *_ = answer(params, [], 16, in_kernels=True)
    # In places the future is not known: the walk ends there.
    known = [row[:7] + [0] + row[8:] for row in plain]
    oracle = OracleDrafter({tuple(prompt): row for prompt, row in zip(PROMPTS, known)})

    def drafters():
        return [FromHost(RandomDrafter(VOCAB, seed=3)), FromHost(oracle), NgramDrafter(num_chains=2, device=place)]

    said, hidden, cache = answer(params, drafters(), 3, in_kernels=True)
    want, want_hidden, want_cache = answer(params, drafters(), 3, in_kernels=False)
    assert said == want
    assert min(map(len, said)) > 10
    for row, plain_row in zip(said, plain):
        assert row[:15] == plain_row[: len(row)][:15]
    assert torch.equal(hidden, want_hidden)
    assert torch.equal(cache.lengths, want_cache.lengths)
    for slot, length in enumerate(cache.lengths.tolist()):
        assert torch.equal(cache.keys[:, slot, :, :length], want_cache.keys[:, slot, :, :length])
"""

PROGRAMS = {
    "trees": TREES,
    "lookup": LOOKUP,
    "walk": WALK,
    "accept": ACCEPT,
    "commit": COMMIT,
    "choices": CHOICES,
    "step": STEP,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_kernel_gives_what_it_stands_for(name: str) -> None:
    run_check(SWITCH + PROGRAMS[name])
