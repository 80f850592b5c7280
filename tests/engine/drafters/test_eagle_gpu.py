"""Drafting with an EAGLE head through the GPU's kernels: the same trees as in tensor operations."""

import pytest

from gorgon_engine.drafters.beam import BeamLimits
from support.triton_checks import run_check

PRELUDE = """
from gorgon_engine.drafters.base import Committed, DraftContext, StatefulDrafter
from gorgon_engine.drafters.beam import BeamLimits
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.drafters.eagle_gpu import EagleGpuDrafter, angle_tables
from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.heads.eagle_layer import EagleLayer
from gorgon_engine.kernels.triton.products import DenseProduct, Nf4Product
from gorgon_engine.models.linear import DenseLinear

HIDDEN, VOCAB, SLOTS, POSITIONS = 64, 24, 4, 40
SHAPE = EagleShape(HIDDEN, 3, 1, 64, 64, num_heads={num_depths})
# The interpreter counts wrongly in anything less than float32, and GPUs' kernels do not take it.
dtype, tolerance = (torch.float16, 2e-2) if device == "cuda" else (torch.float32, 1e-3)
torch.backends.cuda.matmul.allow_tf32 = False
torch.manual_seed(3)


def make_head():
    generator = torch.Generator().manual_seed(1)
    head = EagleHead(SHAPE)
    for name, parameter in head.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("norm")), std=0.2, generator=generator)
    return head.requires_grad_(False).to(device)


embedding = torch.randn(60, HIDDEN, device=device)
lm_head = torch.randn(60, HIDDEN, device=device) * 0.4
said = torch.randperm(60, device=device)[:VOCAB] if {reduced} else None
rows = lm_head if said is None else lm_head[said]
limits = BeamLimits(num_choices={num_choices}, width={width})


def embed(tokens):
    return embedding[tokens]


def slow(head, rows=rows):
    drafter = EagleDrafter(
        head, embed=embed, project=lambda x: x.float() @ rows.T, draft_vocabulary=said, limits=limits
    )
    return drafter.for_slots(SLOTS, POSITIONS)


def fast(head, four_bit=False, num_depths=None):
    head = head.to(dtype)
    angles = angle_tables(head)
    layer = EagleLayer.pack(
        head, DenseLinear(rows.to(dtype)), four_bit=four_bit
    )
    drafter = EagleGpuDrafter(
        layer, angles=angles, embed=embed, vocab_size=len(rows), draft_vocabulary=said, limits=limits,
        num_depths=num_depths,
    )
    assert isinstance(drafter, StatefulDrafter)
    return drafter.for_slots(SLOTS, POSITIONS)


def make_texts(*lengths):
    return [(torch.randn(length, HIDDEN, device=device), torch.randint(60, (length + 1,), device=device))
            for length in lengths]


def committed(texts, slots, starts, counts):
    width = max(counts)
    hidden = torch.full((len(texts), width, HIDDEN), 7.0, device=device)
    tokens = torch.ones(len(texts), width, dtype=torch.int64, device=device)
    for row, ((features, text), start, count) in enumerate(zip(texts, starts, counts, strict=True)):
        hidden[row, :count] = features[start : start + count]
        tokens[row, :count] = text[start + 1 : start + count + 1]
    made = [torch.tensor(values, device=device) for values in (slots, starts, counts)]
    return Committed(made[0], made[1], hidden, tokens, made[2])


def context_of(texts, slots):
    lengths = torch.tensor([len(text) for _, text in texts], device=device)
    return DraftContext(
        root_tokens=torch.stack([text[-1] for _, text in texts]),
        hidden=torch.stack([features[-1] for features, _ in texts]),
        history=torch.nn.utils.rnn.pad_sequence([text for _, text in texts], batch_first=True),
        history_lengths=lengths, seeds=torch.arange(len(texts), device=device),
        slots=torch.tensor(slots, device=device),
    )


def observe(drafter, texts, slots, *cuts):
    starts = [0] * len(texts)
    for counts in [*cuts, None]:
        counts = counts or [len(features) - start for (features, _), start in zip(texts, starts, strict=True)]
        drafter.observe(committed(texts, slots, starts, counts))
        starts = [start + count for start, count in zip(starts, counts, strict=True)]


def paths(tree, row):
    found = []
    for token, parent in zip(tree.tokens[row].tolist(), tree.parents[row].tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def assert_same(got, want):
    torch.testing.assert_close(got.log_probs, want.log_probs, atol=tolerance, rtol=tolerance)
    for row in range(len(want.tokens)):
        likely = [dict(zip(paths(tree, row), tree.log_probs[row].tolist(), strict=True)) for tree in (got, want)]
        likely = [{path: value for path, value in one.items() if value > -torch.inf} for one in likely]
        last = min(likely[1].values())
        for path, value in likely[0].items():
            # Paths that tie within rounding with the last one may change places with it.
            assert abs(value - likely[1].get(path, last)) <= tolerance * max(1, abs(value)), (path, value, last)
"""

SAME_TREES = """
texts, slots = make_texts(9, 1, 31), [2, 0, 3]
reference, drafter = slow(make_head()), fast(make_head())
observe(reference, texts, slots)
# In stretches of unequal lengths, with what another text left in the slots, and one that is told nothing new.
observe(drafter, make_texts(20, 20, 20), slots)
observe(drafter, texts, slots, [3, 1, 16], [5, 0, 1], [1, 0, 13])
for max_nodes in (5, 40):
    got, want = (one.propose(context_of(texts, slots), max_nodes) for one in (drafter, reference))
    assert got.tokens.shape == want.tokens.shape == (3, max_nodes)
    assert got.source == want.source
    assert_same(got, want)
# A sequence does not see its neighbours, nor what a draft left in the scratch.
alone = drafter.propose(context_of(texts[1:2], slots[1:2]), 40)
assert_same(alone, type(want)(want.tokens[1:2], want.parents[1:2], want.log_probs[1:2], want.ranks[1:2], "head"))
"""

NF4 = """
# Rounded to what the kernels are given, before the code is chosen: elsewhere the two would differ by whole steps of it.
head = make_head().to(dtype).float()
rows = rows.to(dtype).float()
quantised = make_head()
from gorgon_engine.kernels.triton.nf4_packing import pack_nf4, reference_weights
from gorgon_engine.models.nf4 import quantize_nf4


def rounded(weight):
    tensor = quantize_nf4(weight)
    packed = pack_nf4(tensor.packed, tensor.absmax, tensor.code, tensor.out_features, tensor.in_features)
    return reference_weights(packed, torch.float32)


for name in ("fc", "qkv", "o", "gate_up", "down"):
    weight = getattr(head, name).weight
    getattr(quantised, name).weight = torch.nn.Parameter(rounded(weight), requires_grad=False)
for name in ("feature_norm", "embedding_norm", "attention_norm", "mlp_norm", "norm"):
    getattr(quantised, name).data = getattr(head, name).data
texts, slots = make_texts(7, 12), [1, 3]
reference, drafter = slow(quantised, rounded(rows)), fast(head, four_bit=True)
assert drafter._layer.is_four_bit
assert all(isinstance(product, Nf4Product) for product in drafter._layer.products)
for one in (reference, drafter):
    observe(one, texts, slots)
assert_same(drafter.propose(context_of(texts, slots), 20), reference.propose(context_of(texts, slots), 20))
"""


def program(body: str, *, limits: BeamLimits, num_depths: int, reduced: bool) -> str:
    text = PRELUDE + body
    for name, value in {
        "num_depths": num_depths,
        "reduced": reduced,
        "num_choices": limits.num_choices,
        "width": limits.width,
    }.items():
        text = text.replace("{" + name + "}", str(value))
    return text


@pytest.mark.parametrize(
    ("limits", "num_depths", "reduced"),
    [
        (BeamLimits(num_choices=4, width=3), 4, False),
        (BeamLimits(num_choices=3, width=5), 3, True),
        (BeamLimits(), 1, True),
    ],
)
def test_trees_are_those_of_the_tensor_operations(limits: BeamLimits, num_depths: int, reduced: bool) -> None:
    run_check(program(SAME_TREES, limits=limits, num_depths=num_depths, reduced=reduced))


def test_a_layer_in_nf4_is_its_dequantised_self() -> None:
    run_check(program(NF4, limits=BeamLimits(num_choices=4, width=3), num_depths=3, reduced=True))
