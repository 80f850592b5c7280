"""A whole Hydra draft in C++ against the same search in tensor operations, on every instruction set.

Products, norms, SiLU and top-k are row-invariant and shared by both, so that the trees are equal to the bit; each of
those steps is compared with torch alone here, in test_native_kernels.py and in test_native_drafting.py.
"""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.drafters import choices
from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.drafters.beam import BeamLimits
from gorgon_engine.drafters.hydra import HydraDrafter
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.native import PackedHydraHeads
from gorgon_engine.kernels.cpu import Kind, NativeLibrary, PackedLinear, load_library
from gorgon_engine.kernels.cpu.drafting import TopLogProbs, top_log_probs
from gorgon_engine.kernels.cpu.elementwise import add_silu, add_silu_reference, rms_norm, rms_norm_reference
from gorgon_engine.kernels.cpu.hydra import NativeHydra, NativeHydraHead
from gorgon_engine.tree.candidates import CandidateTree
from support.native import num_threads

# What a machine without the newer instructions would run; the flags only take away.
BUILDS = {
    "native": (),
    "avx2": ("-mno-avx512f", "-mno-avxvnni"),
    "generic": ("-DGORGON_FORCE_GENERIC",),
}
FIELDS = ("tokens", "parents", "log_probs", "ranks")


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    return load_library(BUILDS[request.param])


@dataclass(frozen=True, slots=True)
class Setting:
    """Random heads with the backbone's two matrices; `flat` ones find many tokens equally likely."""

    shape: HydraShape
    kind: Kind = "fp32"
    vocab_size: int = 90  # tokens with an embedding
    num_drafted: int | None = None  # of a draft vocabulary; None = all tokens
    embedding_dtype: torch.dtype = torch.float32
    flat: bool = False
    sharpness: float = 1.0  # of the distributions
    seed: int = 0

    def random(self, *dims: int, offset: int) -> torch.Tensor:
        return torch.randn(dims, generator=torch.Generator().manual_seed(100 * self.seed + offset))

    def heads(self) -> HydraHeads:
        heads = HydraHeads(self.shape)
        generator = torch.Generator().manual_seed(self.seed)
        for name, parameter in heads.named_parameters():
            wide = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            torch.nn.init.normal_(parameter, mean=float(name == "norm"), std=1.5 * wide, generator=generator)
            if name.startswith("projection"):
                parameter.data = self.said(parameter.data, dim=1) * self.sharpness
        return heads.requires_grad_(False)

    def said(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """Weights of a projection with its outputs in `dim`. Flat: those of three tokens, again and again."""
        size = values.shape[dim]
        return values.index_select(dim, torch.arange(size) % 3) if self.flat else values

    def vocabulary(self) -> torch.Tensor | None:
        if self.num_drafted is None:
            return None
        return self.random(self.vocab_size, offset=1).argsort()[: self.num_drafted].sort().values

    def embeddings(self) -> torch.Tensor:
        return self.random(self.vocab_size, self.shape.hidden_size, offset=2).to(self.embedding_dtype)

    def lm_head(self) -> torch.Tensor:
        """[V, C] of the tokens that can be drafted."""
        size = self.shape.hidden_size
        weights = self.random(self.num_drafted or self.vocab_size, size, offset=3)
        return self.said(weights, dim=0) * self.sharpness * size**-0.5

    def context(self, batch: int) -> DraftContext:
        generator = torch.Generator().manual_seed(self.seed + 7)
        history = torch.randint(self.vocab_size, (batch, 1), generator=generator)
        lengths = torch.ones(batch, dtype=torch.int64)
        hidden = torch.randn(batch, self.shape.hidden_size, generator=generator) * 3
        return DraftContext(history[:, -1], hidden, history, lengths, lengths)


@dataclass(frozen=True, slots=True)
class Drafters:
    native: HydraDrafter
    searching: HydraDrafter  # in tensor operations


def drafters(setting: Setting, library: NativeLibrary, limits: BeamLimits | None = None) -> Drafters:
    packed = PackedHydraHeads(setting.heads(), setting.kind, library=library)
    embeddings, vocabulary = setting.embeddings(), setting.vocabulary()
    shared = None
    if packed.shares_projection:
        shared = PackedLinear.pack(setting.lm_head(), None, setting.kind, library=library)
    native = packed.in_one_call(embeddings=embeddings, shared=shared, draft_vocabulary=vocabulary)

    def make(**options: Any) -> HydraDrafter:
        return HydraDrafter(
            packed, embed=lambda tokens: embeddings[tokens], draft_vocabulary=vocabulary, limits=limits, **options
        )

    return Drafters(make(native=native), make(project=shared))


def search(drafter: HydraDrafter, context: DraftContext, max_nodes: int, library: NativeLibrary) -> CandidateTree:
    """In tensor operations, but for the top-k of the library."""

    def top(logits: torch.Tensor, k: int) -> TopLogProbs:
        return top_log_probs(logits, k, library=library)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choices, "native_top_log_probs", top)
        return drafter.propose(context, max_nodes)


def check_same(found: CandidateTree, expected: CandidateTree) -> None:
    """To the bit, apart from what the reference leaves in padding."""
    real = expected.log_probs > -torch.inf
    assert found.source == expected.source
    assert torch.equal(found.log_probs, expected.log_probs)
    for name, padding in (("tokens", 0), ("parents", -1), ("ranks", 0)):
        values = getattr(found, name)
        assert torch.equal(values[real], getattr(expected, name)[real]), name
        assert (values[~real] == padding).all(), name


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
    vocab_size = draw(st.sampled_from([1, 2, 31, 90, 256, 257, 700]))
    num_drafted = draw(st.one_of(st.none(), st.integers(1, vocab_size)))
    own = draw(st.booleans())
    shape = HydraShape(
        hidden_size=draw(st.sampled_from([1, 8, 33, 48, 64, 130])),
        num_heads=draw(st.integers(1, 4)),
        num_blocks=draw(st.integers(1, 3)),
        normalised=draw(st.booleans()),
        matrix_residual=draw(st.booleans()),
        own_projection=(num_drafted or vocab_size) if own else None,
        projection_bias=own and draw(st.booleans()),
    )
    return Setting(
        shape,
        kind=draw(st.sampled_from(["fp32", "bf16", "int8"])),
        vocab_size=vocab_size,
        num_drafted=num_drafted,
        embedding_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        flat=draw(st.booleans()),
        sharpness=draw(st.sampled_from([0.1, 1.0, 4.0])),
        seed=draw(st.integers(0, 10_000)),
    )


# No round probabilities: those that flat heads give would lie on them, where the last bit of an exponential decides.
limits_of_a_search = st.builds(
    BeamLimits,
    num_choices=st.integers(1, 9),
    width=st.one_of(st.integers(1, 5), st.just(40)),
    min_path_prob=st.sampled_from([0.0, 0.0101, 0.0703, 0.3307, 1.5]),
)


@settings(max_examples=120, deadline=None)
@given(
    setting=random_settings(),
    limits=limits_of_a_search,
    batch=st.integers(1, 4),
    max_nodes=st.one_of(st.integers(1, 12), st.integers(30, 60)),
)
def test_one_call_finds_what_the_search_finds(
    library: NativeLibrary, setting: Setting, limits: BeamLimits, batch: int, max_nodes: int
) -> None:
    made, context = drafters(setting, library, limits), setting.context(batch)
    found = made.native.propose(context, max_nodes)
    check_same(found, search(made.searching, context, max_nodes, library))
    check_tree(found)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_a_vocabulary_of_a_real_size(library: NativeLibrary, kind: Kind) -> None:
    """More columns than a thread's share of chunks, and a last chunk that is not whole."""
    shape = HydraShape(hidden_size=96, num_heads=3, num_blocks=4)
    setting = Setting(shape, kind=kind, vocab_size=9000, num_drafted=8201, sharpness=3.0)
    made = drafters(setting, library, BeamLimits(num_choices=6, width=4))
    found = made.native.propose(setting.context(3), 31)
    check_same(found, search(made.searching, setting.context(3), 31, library))
    assert (found.log_probs > -torch.inf).all()
    assert found.parents.max() > 5, "more than one depth was searched"


def test_packed_in_float32_it_finds_what_torch_finds(library: NativeLibrary) -> None:
    """Without any of the native kernels on the other side."""
    for seed, normalised in enumerate((True, False, True, False)):
        shape = HydraShape(hidden_size=48, num_heads=4, normalised=normalised, matrix_residual=seed > 1)
        setting = Setting(shape, sharpness=3.0, seed=seed)
        embeddings, lm_head, limits = setting.embeddings(), setting.lm_head(), BeamLimits(num_choices=5, width=3)
        torch_drafter = HydraDrafter(
            setting.heads(), embed=embeddings.__getitem__, project=partial(torch.matmul, other=lm_head.T), limits=limits
        )
        expected = torch_drafter.propose(setting.context(4), 20)
        found = drafters(setting, library, limits).native.propose(setting.context(4), 20)
        for name in ("tokens", "parents", "ranks"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-4, rtol=0.0)


@settings(max_examples=25, deadline=None)
@given(setting=random_settings(), limits=limits_of_a_search, data=st.data())
def test_a_sequence_does_not_see_the_others_or_the_threads(
    library: NativeLibrary, setting: Setting, limits: BeamLimits, data: st.DataObject
) -> None:
    native, context = drafters(setting, library, limits).native, setting.context(4)
    trees = []
    for threads in (1, 2, 3):
        with num_threads(library, threads):
            trees.append(native.propose(context, 15))
    row = data.draw(st.integers(0, 3))
    alone = dataclasses.replace(context, hidden=context.hidden[[row]], root_tokens=context.root_tokens[[row]])
    tree = native.propose(alone, 15)
    for name in FIELDS:
        assert all(torch.equal(getattr(trees[0], name), getattr(other, name)) for other in trees[1:])
        assert torch.equal(getattr(tree, name)[0], getattr(trees[0], name)[row])


def test_a_sequence_without_a_distribution_guesses_nothing(library: NativeLibrary) -> None:
    setting = Setting(HydraShape(hidden_size=48, num_heads=3))
    made, context = drafters(setting, library), setting.context(3)
    expected = made.native.propose(context, 9)
    context.hidden[1] = torch.nan
    found = made.native.propose(context, 9)
    assert (found.log_probs[1] == -torch.inf).all()
    for name in FIELDS:
        assert torch.equal(getattr(found, name)[[0, 2]], getattr(expected, name)[[0, 2]])


def test_drafts_at_the_same_time_wait_for_each_other(library: NativeLibrary) -> None:
    setting = Setting(HydraShape(hidden_size=48, num_heads=3))
    native = drafters(setting, library).native
    sizes = [4, 30] * 10
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda size: native.propose(setting.context(size % 3 + 1), size), sizes))
    for size, tree in zip(sizes, found, strict=True):
        check_same(tree, native.propose(setting.context(size % 3 + 1), size))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 48, 576])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_steps_between_the_products(library: NativeLibrary, size: int, scale: float) -> None:
    x, residual, weight = (torch.randn(3, 2, size) * scale, torch.randn(3, 2, size), torch.randn(size))
    for gain in (None, weight):
        torch.testing.assert_close(rms_norm(library, x, gain, 1e-5), rms_norm_reference(x, gain, 1e-5))
    torch.testing.assert_close(add_silu(library, x, residual), add_silu_reference(x, residual))


def test_steps_between_the_products_refuse_other_shapes(library: NativeLibrary) -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"x must be torch\.float32"):
        rms_norm(library, x.double(), None, 1e-5)
    with pytest.raises(ValueError, match=r"weight must be torch\.float32"):
        rms_norm(library, x, torch.ones(3), 1e-5)
    with pytest.raises(ValueError, match=r"residual must be torch\.float32"):
        add_silu(library, x, x[:, :2])
    with pytest.raises(ValueError, match="x must be contiguous"):
        add_silu(library, x.T, x.T)


SIZE, DRAFTED, EMBEDDED = 8, 12, 20


def linear(rows: int, columns: int, kind: Kind = "fp32") -> PackedLinear:
    return PackedLinear.pack(torch.zeros(rows, columns), None, kind)


def one_head(**parts: Any) -> NativeHydraHead:
    defaults = {
        "input": linear(SIZE, 2 * SIZE),
        "residual": None,
        "blocks": (linear(SIZE, SIZE),),
        "projection": linear(DRAFTED, SIZE),
    }
    return NativeHydraHead(**(defaults | parts))


def native_of(*heads: NativeHydraHead, **options: Any) -> NativeHydra:
    defaults: dict[str, Any] = {"norm": torch.ones(SIZE), "norm_eps": 1e-5, "embeddings": torch.ones(EMBEDDED, SIZE)}
    return NativeHydra(heads, **(defaults | {"vocabulary": torch.arange(DRAFTED)} | options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: native_of(), "there must be at least one head"),
        (
            lambda: native_of(one_head(), one_head()),
            r"head 2: a matrix must be \[8, 24\], not \[8, 16\]",
        ),
        (
            lambda: native_of(one_head(residual=linear(SIZE, SIZE))),
            r"head 1: a matrix must be \[8, 16\], not \[8, 8\]",
        ),
        (
            lambda: native_of(one_head(blocks=(linear(SIZE, 9),))),
            r"head 1: a matrix must be \[8, 8\], not \[8, 9\]",
        ),
        (
            lambda: native_of(one_head(projection=linear(DRAFTED, 9))),
            r"head 1: a matrix must be \[12, 8\], not \[12, 9\]",
        ),
        (
            lambda: native_of(one_head(), one_head(input=linear(SIZE, 3 * SIZE), blocks=())),
            "head 2: 0 blocks where the first head has 1",
        ),
        (
            lambda: native_of(one_head(residual=linear(SIZE, 2 * SIZE, "int8"))),
            "head 1: residual is int8, input fp32",
        ),
        (lambda: native_of(one_head(), norm=torch.ones(9)), r"norm must be torch.float32 \[8\]"),
        (
            lambda: native_of(one_head(), embeddings=torch.ones(EMBEDDED, SIZE).half()),
            r"embeddings must be float32 or bfloat16 \[E, 8\], not torch.float16",
        ),
        (lambda: native_of(one_head(), embeddings=torch.ones(EMBEDDED, 9)), r"embeddings must be .* \[20, 8\]"),
        (lambda: native_of(one_head(), embeddings=torch.ones(SIZE, EMBEDDED).T), "embeddings must be contiguous"),
        (lambda: native_of(one_head(), vocabulary=torch.arange(11)), r"vocabulary must be torch.int64 \[12\]"),
        (lambda: native_of(one_head(), vocabulary=torch.arange(DRAFTED) - 1), "vocabulary has a negative token"),
        (
            lambda: native_of(one_head(), vocabulary=torch.arange(DRAFTED) + 9),
            "token 20 can be drafted, but only 20 have embeddings",
        ),
        (
            lambda: native_of(one_head(), vocabulary=None, embeddings=torch.ones(11, SIZE)),
            "token 11 can be drafted, but only 11 have embeddings",
        ),
    ],
)
def test_heads_that_do_not_fit_together_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 9)}, r"hidden must be torch.float32 \[2, 8\]"),
        ({"hidden": torch.zeros(3, SIZE)}, r"hidden must be torch.float32 \[2, 8\]"),
        ({"root_tokens": torch.zeros(2)}, r"root_tokens must be torch.int64 \[2\]"),
        ({"root_tokens": torch.tensor([0, EMBEDDED])}, "a root token has no embedding"),
        ({"root_tokens": torch.tensor([-1, 0])}, "a root token has no embedding"),
        ({"max_nodes": 0}, "max_nodes 0, num_choices 3 and width 2 must be at least 1"),
        ({"num_choices": 0}, "must be at least 1"),
        ({"width": 0}, "must be at least 1"),
    ],
)
def test_calls_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {
        "hidden": torch.ones(2, SIZE),
        "root_tokens": torch.tensor([0, EMBEDDED - 1]),
        "max_nodes": 4,
        "num_choices": 3,
        "width": 2,
        "min_path_prob": 0.0,
    }
    native = native_of(one_head())
    assert native.draft(**call).tokens.tolist() == [[0, 1, 2, 0]] * 2, "three equal choices of one depth, and padding"
    with pytest.raises(ValueError, match=message):
        native.draft(**(call | change))
