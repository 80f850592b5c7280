"""A whole EAGLE draft in C++, and what it remembers, against the same in other code, on every instruction set.

The reference runs the layer as a backbone of one layer (`NativeModel`), each path in a cache of its own, and searches
in tensor operations: products, attention and top-k are row-invariant, so that the trees are equal to the bit. Packed in
float32 they are also those of the head in plain torch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gorgon_engine.drafters.base import Committed, DraftContext
from gorgon_engine.drafters.beam import BeamLimits, likeliest_tree
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.heads.eagle import NORM_EPS, EagleHead, EagleShape
from gorgon_engine.heads.native import PackedEagleHead
from gorgon_engine.kernels.cpu import Kind, NativeLayer, NativeLibrary, NativeModel, PackedLinear, load_library
from gorgon_engine.kernels.cpu.drafting import top_log_probs
from gorgon_engine.kernels.cpu.eagle import NativeEagle, NativeEagleLayer, NativeEagleMemory
from gorgon_engine.kernels.cpu.elementwise import rms_norm
from gorgon_engine.tree.candidates import CandidateTree
from support.eagle import make_head
from support.native import num_threads

# What a machine without the newer instructions would run; the flags only take away.
BUILDS: dict[str, tuple[str, ...]] = {
    "native": (),
    "avx2": ("-mno-avx512f", "-mno-avxvnni"),
    "generic": ("-DGORGON_FORCE_GENERIC",),
}
if "amx" in load_library().instruction_set:
    BUILDS["no-amx"] = ("-DGORGON_NO_AMX",)
FIELDS = ("tokens", "parents", "log_probs", "ranks")
SHAPE = EagleShape(48, 4, 2, 8, 96, num_heads=3)


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    return load_library(BUILDS[request.param])


@dataclass(frozen=True, slots=True)
class Setting:
    """A random head with the backbone's two matrices; a `flat` one finds many tokens equally likely."""

    shape: EagleShape = SHAPE
    kind: Kind = "fp32"
    vocab_size: int = 90  # tokens with an embedding
    num_drafted: int | None = None  # of a draft vocabulary; None = all tokens
    embedding_dtype: torch.dtype = torch.float32
    flat: bool = False
    sharpness: float = 1.0  # of the distributions
    seed: int = 0

    def random(self, *dims: int, offset: int) -> Tensor:
        return torch.randn(dims, generator=torch.Generator().manual_seed(100 * self.seed + offset))

    def head(self) -> EagleHead:
        """Weights under which nothing grows with the sizes."""
        head = make_head(self.shape, seed=self.seed)
        for parameter in head.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5 * parameter.shape[1] ** -0.5)
        return head

    def vocabulary(self) -> Tensor | None:
        if self.num_drafted is None:
            return None
        return self.random(self.vocab_size, offset=1).argsort()[: self.num_drafted].sort().values

    def embeddings(self) -> Tensor:
        return self.random(self.vocab_size, self.shape.hidden_size, offset=2).to(self.embedding_dtype)

    def lm_head(self) -> Tensor:
        """[V, C] of the tokens that can be drafted."""
        size = self.shape.hidden_size
        weights = self.random(self.num_drafted or self.vocab_size, size, offset=3) * self.sharpness * size**-0.5
        return weights[torch.arange(len(weights)) % 3] if self.flat else weights


@dataclass(frozen=True, slots=True)
class Texts:
    """Of several sequences: committed positions, the root behind them."""

    hidden: list[Tensor]  # [T, C] each
    tokens: list[Tensor]  # [T + 1] each
    slots: list[int]
    num_positions: int  # of a slot

    @classmethod
    def of(cls, setting: Setting, lengths: Sequence[int], slots: Sequence[int] | None = None) -> "Texts":
        generator = torch.Generator().manual_seed(setting.seed + 7)
        hidden = [torch.randn(length, setting.shape.hidden_size, generator=generator) * 3 for length in lengths]
        tokens = [torch.randint(setting.vocab_size, (length + 1,), generator=generator) for length in lengths]
        return cls(hidden, tokens, list(slots or range(len(lengths))), max(lengths) + 2)

    def only(self, row: int) -> "Texts":
        return dataclasses.replace(self, hidden=[self.hidden[row]], tokens=[self.tokens[row]], slots=[self.slots[row]])

    @property
    def num_slots(self) -> int:
        return 1 + max(self.slots)

    def context(self) -> DraftContext:
        return DraftContext(
            root_tokens=torch.stack([tokens[-1] for tokens in self.tokens]),
            hidden=torch.stack([hidden[-1] for hidden in self.hidden]),
            history=torch.nn.utils.rnn.pad_sequence(self.tokens, batch_first=True),
            history_lengths=torch.tensor([len(tokens) for tokens in self.tokens]),
            seeds=torch.tensor(self.slots),
            slots=torch.tensor(self.slots),
        )

    def committed(self, starts: Sequence[int], counts: Sequence[int]) -> Committed:
        """A stretch of each, and rows past it that belong to no text."""
        width = max(counts) + 1
        hidden = torch.full((len(counts), width, self.hidden[0].shape[1]), 7.0)
        tokens = torch.full((len(counts), width), -3)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            hidden[row, :count] = self.hidden[row][start : start + count]
            tokens[row, :count] = self.tokens[row][start + 1 : start + count + 1]
        return Committed(torch.tensor(self.slots), torch.tensor(starts), hidden, tokens, torch.tensor(counts))

    def all_committed(self) -> Committed:
        return self.committed([0] * len(self.hidden), [len(hidden) for hidden in self.hidden])


@dataclass(frozen=True, slots=True)
class Made:
    """The native head and what it was made of."""

    setting: Setting
    library: NativeLibrary
    packed: PackedEagleHead
    native: NativeEagle
    projection: PackedLinear
    embeddings: Tensor
    vocabulary: Tensor | None

    @classmethod
    def of(cls, setting: Setting, library: NativeLibrary) -> "Made":
        packed = PackedEagleHead(setting.head(), setting.kind, library=library)
        projection = PackedLinear.pack(setting.lm_head(), None, setting.kind, library=library)
        embeddings, vocabulary = setting.embeddings(), setting.vocabulary()
        native = packed.in_one_call(embeddings=embeddings, projection=projection, draft_vocabulary=vocabulary)
        return cls(setting, library, packed, native, projection, embeddings, vocabulary)

    def drafter(self, texts: Texts, limits: BeamLimits | None = None, *, observed: bool = True) -> EagleDrafter:
        drafter = EagleDrafter(
            self.packed,
            embed=lambda tokens: self.embeddings[tokens].float(),
            draft_vocabulary=self.vocabulary,
            limits=limits,
            native=self.native,
        ).for_slots(texts.num_slots, texts.num_positions)
        if observed:
            drafter.observe(texts.all_committed())
        return drafter


def memory_of(drafter: EagleDrafter) -> tuple[Tensor, Tensor]:
    """Keys and values, [S, G, P, D] each, of all that was observed."""
    assert drafter._memory is not None
    drafter._remember(drafter._memory)
    return drafter._memory.keys, drafter._memory.values


class OneLayerModel:
    """The head as a backbone of one layer that reads what `fc` makes of a feature and a token."""

    def __init__(self, made: Made) -> None:
        self.made = made
        head = made.packed
        linears = {name: getattr(head, name).linear for name in ("qkv", "o", "gate_up", "down")}
        layer = NativeLayer(head.attention_norm, head.mlp_norm, q_norm=None, k_norm=None, **linears)
        shape = head.shape
        self.model = NativeModel(
            [layer],
            head.norm,
            made.projection,
            num_heads=shape.num_query_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rms_norm_eps=NORM_EPS,
        )

    def cache(self, num_slots: int, num_positions: int) -> Tensor:
        """[keys or values, 1, S, G, P, D]"""
        shape = self.made.packed.shape
        sizes = (2, 1, num_slots, shape.num_kv_heads, num_positions, shape.head_dim)
        return torch.zeros(sizes, dtype=self.made.native.memory_dtype)

    def run(
        self, features: Tensor, tokens: Tensor, slots: Tensor, positions: Tensor, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """features [R, C] at positions [R] of slots [R] of the cache, tokens [R] behind them -> the predicted features
        [R, C] and logits [R, V]."""
        made, head = self.made, self.made.packed
        embeddings = made.embeddings[tokens].float()
        parts = ((features, head.feature_norm), (embeddings, head.embedding_norm))
        x = head.fc(torch.cat([rms_norm(made.library, part, gain, NORM_EPS) for part, gain in parts], dim=1))
        angles, num_rows = head.angles(positions[None]), len(positions)
        out, logits = torch.empty_like(features), torch.empty(num_rows, made.projection.out_features)
        self.model.forward(
            embeddings=x,
            cos=angles.cos[0],
            sin=angles.sin[0],
            slots=slots.int(),
            write_positions=positions.int(),
            prefix_lengths=positions.int() + 1,
            tree_base=positions.int(),
            ancestors=torch.zeros((num_rows, 1), dtype=torch.int64),
            keys=cache[0],
            values=cache[1],
            logits_rows=None,
            out_hidden=out,
            out_logits=logits,
        )
        return out, logits


@dataclass(frozen=True, slots=True, eq=False)
class ModelBeam:
    """The paths of B sequences, W each, every one in a slot of its own."""

    model: OneLayerModel
    features: Tensor  # [B W, C]
    logits: Tensor  # [B W, V]
    cache: Tensor  # [2, 1, B W, G, P, D]
    positions: Tensor  # [B] of the features

    @classmethod
    def begin(cls, model: OneLayerModel, texts: Texts) -> "ModelBeam":
        num_positions = texts.num_positions + model.made.packed.num_heads
        cache, lasts = model.cache(len(texts.hidden), num_positions), []
        for row, (hidden, tokens) in enumerate(zip(texts.hidden, texts.tokens, strict=True)):
            slots = torch.full((len(hidden),), row)
            features, logits = model.run(hidden, tokens[1:], slots, torch.arange(len(hidden)), cache)
            lasts.append((features[-1], logits[-1]))
        features, logits = (torch.stack(rows) for rows in zip(*lasts, strict=True))
        return cls(model, features, logits, cache, torch.tensor([len(hidden) - 1 for hidden in texts.hidden]))

    def choices(self, count: int) -> tuple[Tensor, Tensor]:
        made, batch = self.model.made, len(self.positions)
        count = min(count, self.logits.shape[1])
        best = top_log_probs(self.logits, count, library=made.library)
        tokens = best.ids if made.vocabulary is None else made.vocabulary[best.ids]
        return best.log_probs.view(batch, -1, count), tokens.view(batch, -1, count)

    def extend(self, parents: Tensor, tokens: Tensor) -> "ModelBeam":
        batch, width = parents.shape
        first = torch.arange(batch)[:, None] * (len(self.features) // batch)
        rows, positions = (first + parents).flatten(), self.positions + 1
        cache = self.cache[:, :, rows].contiguous()
        slots, places = torch.arange(batch * width), positions.repeat_interleave(width)
        features, logits = self.model.run(self.features[rows], tokens.flatten(), slots, places, cache)
        return ModelBeam(self.model, features, logits, cache, positions)


def search(made: Made, texts: Texts, limits: BeamLimits, max_nodes: int) -> CandidateTree:
    beam = ModelBeam.begin(OneLayerModel(made), texts)
    return likeliest_tree(beam, num_depths=made.packed.num_heads, limits=limits, max_nodes=max_nodes, source="head")


def check_same(found: CandidateTree, expected: CandidateTree) -> None:
    """To the bit."""
    assert found.source == expected.source
    for name in FIELDS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def check_tree(tree: CandidateTree) -> None:
    """Parents before children and likelier than they are, siblings of different ranks and tokens."""
    for row in range(tree.tokens.shape[0]):
        nodes = list(zip(*(getattr(tree, name)[row].tolist() for name in FIELDS), strict=True))
        for place, (_, parent, log_prob, _) in enumerate(nodes):
            assert parent < place
            assert log_prob <= (nodes[parent][2] if parent >= 0 else 0.0)
        real = [node for node in nodes if node[2] > -torch.inf]
        assert len({(parent, token) for token, parent, _, _ in real}) == len(real)
        assert len({(parent, rank) for _, parent, _, rank in real}) == len(real)


@st.composite
def random_settings(draw: st.DrawFn) -> Setting:
    vocab_size = draw(st.sampled_from([1, 2, 31, 90, 257, 700]))
    heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (4, 4), (6, 2), (9, 3), (26, 1)]))
    shape = EagleShape(
        hidden_size=draw(st.sampled_from([1, 8, 33, 48, 64, 130])),
        num_query_heads=heads,
        num_kv_heads=groups,
        head_dim=draw(st.sampled_from([2, 8, 10, 16, 64])),
        intermediate_size=draw(st.sampled_from([1, 7, 32, 100])),
        rope_theta=draw(st.sampled_from([500.0, 10000.0])),
        num_heads=draw(st.integers(1, 4)),
    )
    return Setting(
        shape,
        kind=draw(st.sampled_from(["fp32", "bf16", "int8"])),
        vocab_size=vocab_size,
        num_drafted=draw(st.one_of(st.none(), st.integers(1, vocab_size))),
        embedding_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        flat=draw(st.booleans()),
        sharpness=draw(st.sampled_from([0.3, 1.0, 4.0])),
        seed=draw(st.integers(0, 10_000)),
    )


# No round probabilities: those that flat heads give would lie on them, where the last bit of an exponential decides.
limits_of_a_search = st.builds(
    BeamLimits,
    num_choices=st.integers(1, 9),
    width=st.one_of(st.integers(1, 5), st.just(40)),
    min_path_prob=st.sampled_from([0.0, 0.0101, 0.0703, 0.3307, 1.5]),
)
# Around the ends of the attention's blocks of 16 and chunks of 256 keys.
lengths_of_texts = st.lists(
    st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 258, 511, 512, 513]), st.integers(1, 700)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=80, deadline=None)
@given(
    setting=random_settings(),
    limits=limits_of_a_search,
    lengths=lengths_of_texts,
    max_nodes=st.one_of(st.integers(1, 12), st.integers(30, 60)),
    data=st.data(),
)
def test_one_call_finds_what_the_search_finds(
    library: NativeLibrary,
    setting: Setting,
    limits: BeamLimits,
    lengths: list[int],
    max_nodes: int,
    data: st.DataObject,
) -> None:
    texts = Texts.of(setting, lengths, data.draw(st.permutations(range(len(lengths) + 1)))[: len(lengths)])
    made = Made.of(setting, library)
    found = made.drafter(texts, limits).propose(texts.context(), max_nodes)
    check_same(found, search(made, texts, limits, max_nodes))
    check_tree(found)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_sizes_of_a_real_head(library: NativeLibrary, kind: Kind) -> None:
    """Parts of a chunk, of a panel and of a thread's share at once; more depths than are usual."""
    shape = EagleShape(96, 9, 3, 32, 200, num_heads=5)
    setting = Setting(shape, kind=kind, vocab_size=9000, num_drafted=8201, sharpness=4.0)
    limits = BeamLimits(num_choices=6, width=4)
    texts, made = Texts.of(setting, [300, 13, 700]), Made.of(setting, library)
    found = made.drafter(texts, limits).propose(texts.context(), 31)
    check_same(found, search(made, texts, limits, 31))
    assert (found.log_probs > -torch.inf).all()
    depths = torch.zeros_like(found.tokens)
    for node in range(31):
        parent = found.parents[:, node]
        depths[:, node] = 1 + torch.where(parent >= 0, depths.gather(1, parent.clamp(min=0)[:, None])[:, 0], 0)
    assert depths.max() >= 3


@pytest.mark.parametrize("num_drafted", [None, 40])
def test_packed_in_float32_it_finds_what_torch_finds(library: NativeLibrary, num_drafted: int | None) -> None:
    """Without any of the native kernels on the other side."""
    limits = BeamLimits(num_choices=5, width=3)
    for seed, (heads, groups) in enumerate([(4, 2), (9, 3), (2, 2)]):
        shape = EagleShape(48, heads, groups, 8, 96, num_heads=4)
        setting = Setting(shape, num_drafted=num_drafted, sharpness=3.0, seed=seed)
        embeddings, lm_head = setting.embeddings(), setting.lm_head()
        texts = Texts.of(setting, [1, 17, 258, 40], [2, 0, 3, 5])
        in_torch = EagleDrafter(
            setting.head(),
            embed=embeddings.__getitem__,
            project=partial(torch.matmul, other=lm_head.T),
            draft_vocabulary=setting.vocabulary(),
            limits=limits,
        ).for_slots(texts.num_slots, texts.num_positions)
        in_torch.observe(texts.all_committed())
        native = Made.of(setting, library).drafter(texts, limits)
        expected, found = (drafter.propose(texts.context(), 20) for drafter in (in_torch, native))
        for name in ("tokens", "parents", "ranks"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(memory_of(native), memory_of(in_torch), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def in_stretches(drafter: EagleDrafter, texts: Texts, stretches: Sequence[Sequence[int]]) -> None:
    """Observe the first positions of every text, then the next, each stretch for itself."""
    starts = [0] * len(texts.hidden)
    for counts in stretches:
        drafter.observe(texts.committed(starts, counts))
        memory_of(drafter)
        starts = [start + count for start, count in zip(starts, counts, strict=True)]


@settings(max_examples=40, deadline=None)
@given(setting=random_settings(), data=st.data())
def test_it_remembers_what_a_pass_over_the_text_writes(
    library: NativeLibrary, setting: Setting, data: st.DataObject
) -> None:
    """However a text is cut, whatever the threads; and nothing else is written."""
    batch = data.draw(st.integers(1, 3))
    row_counts = st.one_of(st.integers(0, 6), st.integers(7, 100), st.integers(180, 300))
    stretches = data.draw(
        st.lists(st.lists(row_counts, min_size=batch, max_size=batch), min_size=1, max_size=3).filter(
            lambda stretches: all(map(sum, zip(*stretches, strict=True)))
        )
    )
    texts = Texts.of(setting, [sum(counts) for counts in zip(*stretches, strict=True)], range(1, batch + 1))
    made = Made.of(setting, library)
    drafter = made.drafter(texts, observed=False)
    for part in memory_of(drafter):
        part.fill_(3.0)
    with num_threads(library, data.draw(st.integers(1, 3))):
        in_stretches(drafter, texts, stretches)
    model = OneLayerModel(made)
    cache = model.cache(texts.num_slots, texts.num_positions).fill_(3.0)
    for slot, hidden, tokens in zip(texts.slots, texts.hidden, texts.tokens, strict=True):
        model.run(hidden, tokens[1:], torch.full((len(hidden),), slot), torch.arange(len(hidden)), cache)
    for ours, theirs in zip(memory_of(drafter), cache[:, 0], strict=True):
        assert torch.equal(ours, theirs)


def test_a_long_prompt_is_shared_by_the_threads(library: NativeLibrary) -> None:
    setting = Setting(EagleShape(256, 4, 2, 64, 32, num_heads=1), kind="int8")
    texts, made = Texts.of(setting, [400, 150], [1, 0]), Made.of(setting, library)
    model = OneLayerModel(made)
    cache = model.cache(texts.num_slots, texts.num_positions)
    for slot, hidden, tokens in zip(texts.slots, texts.hidden, texts.tokens, strict=True):
        model.run(hidden, tokens[1:], torch.full((len(hidden),), slot), torch.arange(len(hidden)), cache)
    for threads in (1, 2, 3):
        with num_threads(library, threads):
            for ours, theirs in zip(memory_of(made.drafter(texts)), cache[:, 0], strict=True):
                assert torch.equal(ours, theirs)


def test_what_waited_is_remembered_at_once(library: NativeLibrary) -> None:
    setting = Setting(kind="int8")
    texts, made = Texts.of(setting, [20, 11], [1, 0]), Made.of(setting, library)
    waiting = made.drafter(texts, observed=False)
    starts = [0, 0]
    for counts in ([12, 1], [1, 5], [3, 4], [4, 1]):
        waiting.observe(texts.committed(starts, counts))
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    whole = made.drafter(texts)
    check_same(waiting.propose(texts.context(), 12), whole.propose(texts.context(), 12))
    for ours, theirs in zip(memory_of(waiting), memory_of(whole), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("num_earlier", [1, 3, 12])
def test_what_is_outlived_leaves_no_trace(library: NativeLibrary, num_earlier: int) -> None:
    """Others were in the slots before, longer ones, and nobody drafted for them; in the end more than may wait."""
    setting = Setting(kind="int8")
    texts, made = Texts.of(setting, [20, 11], [1, 0]), Made.of(setting, library)
    texts = dataclasses.replace(texts, num_positions=500)
    earlier = Texts.of(dataclasses.replace(setting, seed=setting.seed + 1), [400, 300], [1, 0])
    waiting = made.drafter(texts, observed=False)
    for _ in range(num_earlier):
        waiting.observe(earlier.all_committed())
    waiting.observe(texts.committed([0, 0], [12, 1]))
    waiting.observe(texts.committed([12, 1], [8, 10]))
    assert waiting._memory is not None
    assert waiting._memory.num_waiting < 6000
    assert not waiting._memory.keys.any(), "nothing has been computed so far"
    whole = made.drafter(texts)
    check_same(waiting.propose(texts.context(), 12), whole.propose(texts.context(), 12))
    for ours, theirs in zip(memory_of(waiting), memory_of(whole), strict=True):
        assert torch.equal(ours, theirs)


@settings(max_examples=25, deadline=None)
@given(setting=random_settings(), limits=limits_of_a_search, data=st.data())
def test_a_sequence_does_not_see_the_others_or_the_threads(
    library: NativeLibrary, setting: Setting, limits: BeamLimits, data: st.DataObject
) -> None:
    texts = Texts.of(setting, [9, 300, 1, 513], [3, 0, 4, 1])
    drafter = Made.of(setting, library).drafter(texts, limits)
    trees = []
    for threads in (1, 2, 3):
        with num_threads(library, threads):
            trees.append(drafter.propose(texts.context(), 15))
    row = data.draw(st.integers(0, 3))
    alone = drafter.propose(texts.only(row).context(), 15)
    for name in FIELDS:
        assert all(torch.equal(getattr(trees[0], name), getattr(other, name)) for other in trees[1:])
        assert torch.equal(getattr(alone, name)[0], getattr(trees[0], name)[row])


def test_a_sequence_without_a_distribution_guesses_nothing(library: NativeLibrary) -> None:
    setting = Setting()
    texts = Texts.of(setting, [20, 30, 5])
    drafter = Made.of(setting, library).drafter(texts)
    expected = drafter.propose(texts.context(), 9)
    context = texts.context()
    context.hidden[1] = torch.nan
    found = drafter.propose(context, 9)
    assert (found.log_probs[1] == -torch.inf).all()
    for name in FIELDS:
        assert torch.equal(getattr(found, name)[[0, 2]], getattr(expected, name)[[0, 2]])


def test_what_lies_behind_a_text_is_not_read(library: NativeLibrary) -> None:
    """A slot's earlier text was longer; what is there now is its own."""
    setting = Setting(kind="bf16")
    texts = Texts.of(setting, [270, 5])
    drafter = Made.of(setting, library).drafter(texts)
    expected = drafter.propose(texts.context(), 20)
    for part in memory_of(drafter):
        part[0, :, 270:] = torch.nan
        part[1, :, 5:] = torch.nan
    check_same(drafter.propose(texts.context(), 20), expected)


def test_calls_at_the_same_time_wait_for_each_other(library: NativeLibrary) -> None:
    setting = Setting()
    texts, made = Texts.of(setting, [20, 30, 5]), Made.of(setting, library)
    expected = made.drafter(texts).propose(texts.context(), 20)

    def draft(_: int) -> CandidateTree:
        return made.drafter(texts).propose(texts.context(), 20)

    with ThreadPoolExecutor(3) as threads:
        for found in threads.map(draft, range(12)):
            check_same(found, expected)


SIZE, DRAFTED, EMBEDDED, POSITIONS = 8, 12, 20, 6
LAYER_SHAPES = {"fc": (8, 16), "qkv": (16, 8), "o": (8, 8), "gate_up": (10, 8), "down": (8, 5), "projection": (12, 8)}
NORMS = ("feature_norm", "embedding_norm", "attention_norm", "mlp_norm", "norm")


def linear(rows: int, columns: int) -> PackedLinear:
    return PackedLinear.pack(torch.zeros(rows, columns), None, "fp32")


def native_of(**changes: Any) -> NativeEagle:
    """Two query heads over one of keys and values, of four dimensions; equally likely tokens."""
    parts: dict[str, Any] = {name: linear(*shape) for name, shape in LAYER_SHAPES.items()}
    parts |= {name: torch.ones(SIZE) for name in NORMS}
    options: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "max_depth": 1, "norm_eps": 1e-5}
    options |= {"embeddings": torch.ones(EMBEDDED, SIZE), "vocabulary": torch.arange(DRAFTED)}
    parts, options = ({name: changes.get(name, value) for name, value in group.items()} for group in (parts, options))
    return NativeEagle(NativeEagleLayer(**parts), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({name: linear(rows + 1, columns)}, rf"{name} must be \[{rows}, {columns}\], not \[{rows + 1}, {columns}\]")
            for name, (rows, columns) in LAYER_SHAPES.items()
            if name not in ("fc", "projection")  # the others are judged by these
        ),
        ({"fc": linear(8, 15)}, r"fc must be \[8, 16\], not \[8, 15\]"),
        ({"projection": linear(12, 9)}, r"projection must be \[12, 8\], not \[12, 9\]"),
        *(({name: torch.ones(9)}, rf"{name} must be torch.float32 \[8\]") for name in NORMS),
        ({"num_kv_heads": 0}, "num_heads 2 is not a multiple of num_kv_heads 0"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads 3 is not a multiple of num_kv_heads 2"),
        ({"head_dim": 5}, "head_dim must be even and at most 512, not 5"),
        ({"head_dim": 514}, "head_dim must be even and at most 512, not 514"),
        ({"max_depth": 0}, "max_depth must be at least 1, not 0"),
        ({"embeddings": torch.ones(EMBEDDED, SIZE).half()}, r"embeddings must be float32 or bfloat16 \[E, 8\]"),
        ({"embeddings": torch.ones(EMBEDDED, 9)}, r"embeddings must be .* \[20, 8\]"),
        ({"vocabulary": torch.arange(11)}, r"vocabulary must be torch.int64 \[12\]"),
        ({"vocabulary": torch.arange(DRAFTED) + 9}, "token 20 can be drafted, but only 20 have embeddings"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native_of(**change)


def memory(num_slots: int = 2, **changes: Any) -> NativeEagleMemory:
    size = (num_slots, 1, POSITIONS, 4)
    parts = {"keys": torch.zeros(size), "values": torch.zeros(size)}
    parts |= {"cos": torch.ones(POSITIONS + 1, 2), "sin": torch.zeros(POSITIONS + 1, 2)}
    return NativeEagleMemory(native_of(), **(parts | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(2, 1, 6, 4).double()}, r"keys must be bf16 or fp32 \[S, G, P, D\], not torch.float64"),
        ({"keys": torch.zeros(2, 6, 4)}, r"keys must be bf16 or fp32 \[S, G, P, D\]"),
        ({"keys": torch.zeros(2, 2, 6, 4)}, r"keys must be torch.float32 \[2, 1, 6, 4\]"),
        ({"values": torch.zeros(2, 1, 7, 4)}, r"values must be torch.float32 \[2, 1, 6, 4\]"),
        ({"values": torch.zeros(2, 1, 6, 4).bfloat16()}, r"values must be torch.float32 \[2, 1, 6, 4\]"),
        ({"cos": torch.ones(6, 2)}, r"cos must be torch.float32 \[7, 2\]"),
        ({"sin": torch.ones(7, 4)}, r"sin must be torch.float32 \[7, 2\]"),
    ],
)
def test_memories_that_do_not_fit_the_head_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory(**change)


def draft(**changes: Any) -> CandidateTree:
    call: dict[str, Any] = {
        "slots": torch.tensor([1, 0]),
        "lengths": torch.tensor([2, POSITIONS + 1]),
        "hidden": torch.ones(2, SIZE),
        "root_tokens": torch.tensor([0, EMBEDDED - 1]),
        "max_nodes": 4,
        "num_choices": 3,
        "width": 2,
        "min_path_prob": 0.0,
    }
    return CandidateTree(**memory().draft(**(call | changes))._asdict(), source="head")


def observe(**changes: Any) -> None:
    call = {
        "slots": torch.tensor([1, 0]),
        "starts": torch.tensor([0, 3]),
        "counts": torch.tensor([2, 3]),
        "hidden": torch.ones(2, 3, SIZE),
        "next_tokens": torch.tensor([[0, EMBEDDED - 1, -1], [1, 2, 3]]),
    }
    memory().observe(**(call | changes))


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        (draft, {"slots": torch.tensor([0, 2])}, "a slot lies outside the memory"),
        (draft, {"slots": torch.tensor([-1, 0])}, "a slot lies outside the memory"),
        (draft, {"slots": torch.tensor([0])}, r"slots must be torch.int64 \[2\]"),
        (draft, {"lengths": torch.tensor([1, 2])}, "a length lies outside the memory"),
        (draft, {"lengths": torch.tensor([2, POSITIONS + 2])}, "a length lies outside the memory"),
        (draft, {"lengths": torch.tensor([2, 2]).int()}, r"lengths must be torch.int64 \[2\]"),
        (draft, {"hidden": torch.zeros(2, 9)}, r"hidden must be torch.float32 \[2, 8\]"),
        (draft, {"hidden": torch.zeros(3, SIZE)}, r"hidden must be torch.float32 \[2, 8\]"),
        (draft, {"root_tokens": torch.zeros(2)}, r"root_tokens must be torch.int64 \[2\]"),
        (draft, {"root_tokens": torch.tensor([0, EMBEDDED])}, "a root token has no embedding"),
        (draft, {"root_tokens": torch.tensor([-1, 0])}, "a root token has no embedding"),
        (draft, {"max_nodes": 0}, "max_nodes 0, num_choices 3 and width 2 must be at least 1"),
        (draft, {"num_choices": 0}, "must be at least 1"),
        (draft, {"width": 0}, "must be at least 1"),
        (observe, {"slots": torch.tensor([0, 2])}, "a slot lies outside the memory"),
        (observe, {"starts": torch.tensor([0, 4])}, "a position lies outside the memory"),
        (observe, {"starts": torch.tensor([-1, 0])}, "a position lies outside the memory"),
        (observe, {"counts": torch.tensor([2, 4])}, "a count lies outside the rows"),
        (observe, {"counts": torch.tensor([-1, 3])}, "a count lies outside the rows"),
        (observe, {"counts": torch.tensor([3, 3])}, "a token has no embedding"),
        (observe, {"next_tokens": torch.full((2, 3), EMBEDDED)}, "a token has no embedding"),
        (observe, {"next_tokens": torch.zeros(6)}, r"slots must be torch.int64 \[0\]"),
        (observe, {"hidden": torch.ones(2, 2, SIZE)}, r"hidden must be torch.float32 \[2, 3, 8\]"),
        (observe, {"hidden": torch.ones(3, 2, SIZE).transpose(0, 1)}, "hidden must be contiguous"),
    ],
)
def test_calls_that_do_not_fit_are_refused(call: Callable[..., object], change: dict[str, Any], message: str) -> None:
    call()
    with pytest.raises(ValueError, match=message):
        call(**change)


def test_three_equal_choices_of_one_depth_and_padding() -> None:
    tree = draft()
    assert tree.tokens.tolist() == [[0, 1, 2, 0]] * 2
    assert tree.parents.tolist() == [[-1] * 4] * 2
    assert tree.log_probs[:, 3].tolist() == [-torch.inf] * 2


def test_no_sequence_at_all(library: NativeLibrary) -> None:
    made = Made.of(Setting(), library)
    texts = Texts.of(Setting(), [4])
    drafter = made.drafter(texts)
    before = [part.clone() for part in memory_of(drafter)]
    none = torch.zeros(0, dtype=torch.int64)
    drafter.observe(Committed(none, none, torch.zeros(0, 2, SHAPE.hidden_size), torch.zeros(0, 2).long(), none))
    assert all(torch.equal(*pair) for pair in zip(memory_of(drafter), before, strict=True))
    context = DraftContext(none, torch.zeros(0, SHAPE.hidden_size), none[:, None], none, none, none)
    assert drafter.propose(context, 5).tokens.shape == (0, 5)
