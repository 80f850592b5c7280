"""The native forward on every instruction set: right against plain torch, and the same bits for a row however it comes:
in a tree or as a chain, in a batch or alone, in one prefill or in pieces, with one thread or several."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from gorgon_engine.kernels.cpu import Kind, NativeLayer, NativeLibrary, NativeModel, PackedLinear, load_library
from support.native import num_threads

# What a machine without the newer instructions would run; the flags only take away.
BUILDS = {
    "native": (),
    "avx2": ("-mno-avx512f", "-mno-avxvnni"),
    "generic": ("-DGORGON_FORCE_GENERIC",),
}
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCAB = 3, 90, 150, 6, 2, 18, 77
SLOTS, POSITIONS = 2, 420
EPS = 1e-5


@dataclass(frozen=True)
class Variant:
    kind: Kind
    cache: torch.dtype
    qk_norm: bool = False
    bias: bool = False
    window: int = 0


VARIANTS = {
    "fp32": Variant("fp32", torch.float32),
    "fp32-all": Variant("fp32", torch.float32, qk_norm=True, bias=True, window=45),
    "bf16": Variant("bf16", torch.bfloat16, bias=True),
    "int8": Variant("int8", torch.bfloat16, qk_norm=True),
    "int8-window": Variant("int8", torch.bfloat16, window=270),
    "int8-fp32-cache": Variant("int8", torch.float32, bias=True),
}


@dataclass(frozen=True)
class Rows:
    """Rows to compute: one entry a row in every tensor."""

    embeddings: Tensor
    slots: Tensor
    positions: Tensor  # in the text, for RoPE
    write_positions: Tensor
    prefix_lengths: Tensor
    tree_base: Tensor
    ancestors: Tensor

    def __getitem__(self, index: Tensor) -> Rows:
        return Rows(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def chain(embeddings: Tensor, first: int, slot: int = 0, words: int = 1) -> Rows:
    count = len(embeddings)
    positions = torch.arange(first, first + count, dtype=torch.int32)
    zeros = torch.zeros(count, dtype=torch.int32)
    ancestors = torch.zeros(count, words, dtype=torch.int64)
    return Rows(embeddings, zeros + slot, positions, positions, positions + 1, zeros, ancestors)


def tree(embeddings: Tensor, parents: list[int], first: int, words: int) -> Rows:
    """Node i is written at first + i; parents[i] < i, or -1 for a child of the prefix."""
    count = len(parents)
    masks: list[int] = []
    depths: list[int] = []
    for node, parent in enumerate(parents):
        masks.append((masks[parent] if parent >= 0 else 0) | 1 << node)
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    signed = [[(m >> 64 * w & (1 << 64) - 1) for w in range(words)] for m in masks]
    ancestors = torch.tensor([[v - (1 << 64) if v >> 63 else v for v in row] for row in signed], dtype=torch.int64)
    base = torch.full((count,), first, dtype=torch.int32)
    written = base + torch.arange(count, dtype=torch.int32)
    positions = base + torch.tensor(depths, dtype=torch.int32)
    return Rows(embeddings, torch.zeros_like(base), positions, written, base, base, ancestors)


class Rig:
    """A random model, a cache full of NaN wherever nothing was written, and a plain-torch twin."""

    def __init__(self, library: NativeLibrary, variant: Variant, seed: int) -> None:
        self.variant, self.generator = variant, torch.Generator().manual_seed(seed)

        def linear(rows: int, columns: int) -> PackedLinear:
            bias = self.random(rows) * 0.1 if variant.bias else None
            return PackedLinear.pack(self.random(rows, columns) / columns**0.5, bias, variant.kind, library=library)

        def norm(size: int) -> Tensor:
            return 1 + 0.2 * self.random(size)

        self.layers = [
            NativeLayer(
                input_norm=norm(HIDDEN),
                post_norm=norm(HIDDEN),
                q_norm=norm(DIM) if variant.qk_norm else None,
                k_norm=norm(DIM) if variant.qk_norm else None,
                qkv=linear((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
                o=linear(HIDDEN, HEADS * DIM),
                gate_up=linear(2 * INNER, HIDDEN),
                down=linear(HIDDEN, INNER),
                sliding_window=variant.window if index % 2 else 0,
            )
            for index in range(LAYERS)
        ]
        self.final_norm, self.head = norm(HIDDEN), linear(VOCAB, HIDDEN)
        self.model = NativeModel(
            self.layers,
            self.final_norm,
            self.head,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=DIM,
            rms_norm_eps=EPS,
        )
        shape = (LAYERS, SLOTS, KV_HEADS, POSITIONS, DIM)
        self.keys = torch.full(shape, torch.nan, dtype=variant.cache)
        self.values = self.keys.clone()
        inverse = 100.0 ** -(torch.arange(0, DIM, 2) / DIM)
        self.angles = torch.arange(POSITIONS)[:, None] * inverse

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def parents(self, count: int) -> list[int]:
        return [int(torch.randint(-1, max(i, 1), (), generator=self.generator)) if i else -1 for i in range(count)]

    def run(self, rows: Rows, logits_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        angles = self.angles[rows.positions].double()  # torch's first fp32 cosine of a process is 1e-4 off at times
        hidden = torch.empty_like(rows.embeddings)
        logits = torch.empty(len(rows.embeddings) if logits_rows is None else len(logits_rows), VOCAB)
        self.model.forward(
            embeddings=rows.embeddings.contiguous(),
            cos=angles.cos().float(),
            sin=angles.sin().float(),
            slots=rows.slots,
            write_positions=rows.write_positions,
            prefix_lengths=rows.prefix_lengths,
            tree_base=rows.tree_base,
            ancestors=rows.ancestors,
            keys=self.keys,
            values=self.values,
            logits_rows=logits_rows,
            out_hidden=hidden,
            out_logits=logits,
        )
        return hidden, logits

    def reference(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """A causal text from position 0, in float64 with the dequantised weights."""
        count = len(embeddings)
        cos, sin = self.angles[:count].double().cos()[:, None], self.angles[:count].double().sin()[:, None]
        distance = torch.arange(count)[:, None] - torch.arange(count)

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()

        def project(linear: PackedLinear, x: Tensor) -> Tensor:
            bias = 0 if linear._bias is None else linear._bias[: linear.out_features].double()
            return x @ linear.dequantized().double().T + bias

        def rotate(x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

        x = embeddings.double()
        for layer in self.layers:
            qkv = project(layer.qkv, norm(x, layer.input_norm)).view(count, -1, DIM)
            q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
            q, k = (t if w is None else norm(t, w) for t, w in ((q, layer.q_norm), (k, layer.k_norm)))
            q, k = rotate(q), rotate(k).repeat_interleave(HEADS // KV_HEADS, dim=1)
            v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
            hidden_from = (distance < 0) | (distance >= (layer.sliding_window or count + 1))
            scores = torch.einsum("ihd,jhd->hij", q, k) / DIM**0.5
            weights = scores.masked_fill(hidden_from, -torch.inf).softmax(-1)
            x = x + project(layer.o, torch.einsum("hij,jhd->ihd", weights, v).reshape(count, -1))
            gate, up = project(layer.gate_up, norm(x, layer.post_norm)).chunk(2, dim=-1)
            x = x + project(layer.down, silu(gate) * up)
        hidden = norm(x, self.final_norm)
        return hidden, project(self.head, hidden)


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    return load_library(BUILDS[request.param])


@pytest.fixture(params=VARIANTS)
def rig(request: pytest.FixtureRequest, library: NativeLibrary) -> Rig:
    seed = secrets.randbelow(1 << 31)
    print(f"seed {seed}")
    return Rig(library, VARIANTS[request.param], seed)


def assert_same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert a[1].isfinite().all()


def test_it_equals_plain_torch(rig: Rig) -> None:
    text = rig.random(300, HIDDEN)
    hidden, logits = rig.run(chain(text, 0))
    expected_hidden, expected_logits = rig.reference(text)
    allowed = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.03}[rig.variant.kind]
    for got, expected in ((hidden, expected_hidden), (logits, expected_logits)):
        assert (got - expected).norm() / expected.norm() < allowed


def test_a_prefill_may_come_in_pieces(rig: Rig) -> None:
    text = rig.random(290, HIDDEN)
    whole = rig.run(chain(text, 0))
    for size in (1, 37, 128):
        rig.keys.fill_(torch.nan)
        rig.values.fill_(torch.nan)
        pieces = [rig.run(chain(text[i : i + size], i)) for i in range(0, len(text), size)]
        assert_same(whole, (torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])))


@pytest.mark.parametrize(("context", "nodes", "words"), [(5, 12, 1), (250, 64, 1), (273, 90, 2)])
def test_a_tree_equals_its_chains(rig: Rig, context: int, nodes: int, words: int) -> None:
    rig.run(chain(rig.random(context, HIDDEN), 0))
    rows = tree(rig.random(nodes, HIDDEN), parents := rig.parents(nodes), context, words)
    together = rig.run(rows)

    order = torch.randperm(nodes, generator=rig.generator)
    shuffled = rig.run(rows[order])
    assert_same((together[0][order], together[1][order]), shuffled)

    for node in {0, nodes // 2, nodes - 1}:
        alone = rig.run(rows[torch.tensor([node])])  # its ancestors' keys are in the cache by now
        assert_same((together[0][node : node + 1], together[1][node : node + 1]), alone)

        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        rig.keys[:, 1], rig.values[:, 1] = rig.keys[:, 0], rig.values[:, 0]
        rig.keys[:, 1, :, context:], rig.values[:, 1, :, context:] = torch.nan, torch.nan
        steps = [rig.run(chain(rows.embeddings[n : n + 1], context + i, slot=1)) for i, n in enumerate(path)]
        chained = torch.cat([s[0] for s in steps]), torch.cat([s[1] for s in steps])
        assert_same((together[0][path], together[1][path]), chained)


def test_slots_mix_in_any_order_and_threads_do_not_matter(rig: Rig, library: NativeLibrary) -> None:
    texts = rig.random(2, 280, HIDDEN)
    apart = [rig.run(chain(texts[slot], 0, slot)) for slot in range(2)]
    both = [chain(texts[slot], 0, slot) for slot in range(2)]
    joined = Rows(*(torch.cat([getattr(b, name) for b in both]) for name in Rows.__dataclass_fields__))
    order = torch.randperm(560, generator=rig.generator)
    expected = tuple(torch.cat([a[i] for a in apart])[order] for i in range(2))
    for threads in (1, 2, 3):
        with num_threads(library, threads):
            assert_same((expected[0], expected[1]), rig.run(joined[order]))


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.kind == "int8"])
@pytest.mark.parametrize("nodes", [1, 2, 17, 60])
def test_amx_changes_no_bit(name: str, nodes: int) -> None:
    seed = secrets.randbelow(1 << 31)
    print(f"seed {seed}")
    results = []
    for flags in ((), ("-DGORGON_NO_AMX",)):  # the same instructions where the machine has no AMX
        rig = Rig(load_library(flags), VARIANTS[name], seed)
        text = rig.random(250, HIDDEN)
        prefill = rig.run(chain(text, 0))
        verified = rig.run(tree(rig.random(nodes, HIDDEN), rig.parents(nodes), len(text), 1))
        results.append((torch.cat((prefill[0], verified[0])), torch.cat((prefill[1], verified[1]))))
    assert_same(results[0], results[1])


def test_logits_only_where_asked(rig: Rig) -> None:
    rows = chain(rig.random(20, HIDDEN), 0)
    hidden, logits = rig.run(rows)
    wanted = torch.tensor([19, 3, 3], dtype=torch.int32)
    assert_same((hidden, logits[wanted]), rig.run(rows, wanted))
    assert rig.run(rows, torch.empty(0, dtype=torch.int32))[1].shape == (0, VOCAB)


def test_wrong_calls_are_refused() -> None:
    rig = Rig(load_library(), VARIANTS["fp32"], 0)
    rows = chain(rig.random(4, HIDDEN), 0)
    for change, message in (
        ({"slots": rows.slots + SLOTS}, "a slot lies outside"),
        ({"write_positions": rows.write_positions + POSITIONS}, "a write position lies outside"),
        ({"prefix_lengths": rows.prefix_lengths + POSITIONS}, "a prefix length lies outside"),
        ({"ancestors": rows.ancestors + 2, "tree_base": rows.tree_base + POSITIONS - 1}, "an ancestor lies outside"),
        ({"slots": rows.slots.long()}, r"slots must be torch.int32 \[4\]"),
        ({"ancestors": rows.ancestors[:, 0]}, "ancestors must be int64"),
        ({"embeddings": rows.embeddings[:, 1:]}, "embeddings must be torch.float32"),
    ):
        fields = {name: getattr(rows, name) for name in Rows.__dataclass_fields__}
        with pytest.raises(ValueError, match=message):
            rig.run(Rows(**(fields | change)))
    with pytest.raises(ValueError, match="a logits row is not one of the rows"):
        rig.run(rows, torch.tensor([4], dtype=torch.int32))
