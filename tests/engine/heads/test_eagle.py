"""The EAGLE head against a plain restatement, one path at a time, and against transformers' decoder layer."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.heads.eagle import EagleHead, EagleShape, Paths, Prefix
from gorgon_engine.heads.native import pack_eagle_for_cpu
from gorgon_engine.models.loading import Quantization
from support.eagle import make_head, predict
from support.models import tiny_llama

HIDDEN, LENGTH, DEPTHS = 24, 9, 4
SHAPES = [
    EagleShape(HIDDEN, 6, 2, 4, 20),
    EagleShape(HIDDEN, 3, 3, 10, 40, rope_theta=100.0),
    EagleShape(HIDDEN, 4, 1, 2, 8, rope_theta=1e5),
]


def begin(head: EagleHead, features: torch.Tensor, embeddings: torch.Tensor) -> tuple[Prefix, Paths]:
    """The first step at every position of sequences [B, N, C]."""
    num_sequences, length, _ = features.shape
    positions = torch.arange(length).expand(num_sequences, -1)
    rows = head.rows(features[:, :, None], embeddings[:, :, None], head.angles(positions))
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(num_sequences, -1, -1)
    prefix = Prefix(rows.keys[:, :, 0].transpose(1, 2), rows.values[:, :, 0].transpose(1, 2), mask)
    return prefix, head.begin(rows, prefix)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_is_its_formula(shape: EagleShape) -> None:
    """Three paths below every position, which share their first tokens or do not."""
    head = make_head(shape)
    features, following = torch.randn(2, LENGTH, HIDDEN) * 3, torch.randn(2, LENGTH, HIDDEN) * 0.1
    drafted = torch.randn(2, LENGTH, 3, DEPTHS - 1, HIDDEN) * 0.1
    prefix, paths = begin(head, features, following)
    paths = paths.select(torch.zeros(2, LENGTH, 3, dtype=torch.int64))
    steps = [paths.features]
    for depth in range(1, DEPTHS):
        positions = (torch.arange(LENGTH) + depth).expand(2, -1)
        paths = head.extend(prefix, paths, drafted[:, :, :, depth - 1], head.angles(positions))
        steps.append(paths.features)
    predicted = torch.stack(steps, dim=3)  # [B, N, W, J, C]
    for row in range(2):
        for place in (0, 3, LENGTH - 1):
            for path in range(3):
                embeddings = torch.cat([following[row, : place + 1], drafted[row, place, path]])
                expected = predict(head, features[row, : place + 1], embeddings)
                torch.testing.assert_close(predicted[row, place, path], expected, rtol=1e-3, atol=1e-4)


def test_selected_paths_go_on_as_they_were() -> None:
    head = make_head(SHAPES[0])
    prefix, paths = begin(head, torch.randn(2, LENGTH, HIDDEN), torch.randn(2, LENGTH, HIDDEN))
    drafted = torch.randn(2, LENGTH, 3, 2, HIDDEN)
    positions = torch.arange(LENGTH).expand(2, -1)
    paths = paths.select(torch.zeros(2, LENGTH, 3, dtype=torch.int64))
    paths = head.extend(prefix, paths, drafted[:, :, :, 0], head.angles(positions + 1))
    straight = head.extend(prefix, paths, drafted[:, :, :, 1], head.angles(positions + 2))
    order = torch.tensor([2, 0, 2, 1]).expand(2, LENGTH, -1)
    chosen = head.extend(prefix, paths.select(order), drafted[:, :, order[0, 0], 1], head.angles(positions + 2))
    torch.testing.assert_close(chosen.features, straight.features[:, :, order[0, 0]])
    torch.testing.assert_close(chosen.keys, straight.keys[:, :, order[0, 0]])


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_a_llama_decoder_layer(shape: EagleShape) -> None:
    head = make_head(shape)
    queries, groups, _ = shape.head_counts
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=queries,
        num_key_value_heads=groups,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-5,
        rope_theta=shape.rope_theta,
        attn_implementation="eager",
    )
    layer = LlamaDecoderLayer(config, 0).eval()
    weights = dict(head.named_parameters())
    q, k, v = weights["qkv.weight"].split([count * shape.head_dim for count in shape.head_counts])
    gate, up = weights["gate_up.weight"].chunk(2)
    state = {
        "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": weights["o.weight"],
        "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": weights["down.weight"],
        "input_layernorm": weights["attention_norm"], "post_attention_layernorm": weights["mlp_norm"],
    }  # fmt: skip
    layer.load_state_dict({f"{name}.weight": tensor for name, tensor in state.items()})

    features, following = torch.randn(2, LENGTH, HIDDEN), torch.randn(2, LENGTH, HIDDEN)
    _, paths = begin(head, features, following)
    x = head.rows(features[:, :, None], following[:, :, None], head.angles(torch.arange(LENGTH).expand(2, -1))).x[
        :, :, 0
    ]
    angles = LlamaRotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        out = layer(x, attention_mask=mask, position_embeddings=angles)
    out = out[0] if isinstance(out, tuple) else out
    expected = torch.nn.functional.rms_norm(out, (HIDDEN,), head.norm, eps=1e-5)
    torch.testing.assert_close(paths.features[:, :, 0], expected, rtol=1e-4, atol=1e-4)


def test_a_place_sees_what_is_before_it_and_its_own_path() -> None:
    head = make_head(SHAPES[0])
    features = torch.randn(1, LENGTH, HIDDEN, requires_grad=True)
    following = torch.randn(1, LENGTH, HIDDEN, requires_grad=True)
    drafted = torch.randn(1, LENGTH, 2, HIDDEN, requires_grad=True)
    prefix, paths = begin(head, features, following)
    paths = paths.select(torch.zeros(1, LENGTH, 2, dtype=torch.int64))
    paths = head.extend(prefix, paths, drafted, head.angles(torch.arange(LENGTH)[None] + 1))
    for place in (0, 4):
        gradients = torch.autograd.grad(
            paths.features[0, place, 1].square().sum(), (features, following, drafted), retain_graph=True
        )
        for gradient in gradients[:2]:
            seen = gradient[0].abs().sum(dim=1) > 0
            assert seen.tolist() == [position <= place for position in range(LENGTH)]
        own = gradients[2][0].abs().sum(dim=2) > 0  # [N, W]
        assert own.nonzero().tolist() == [[place, 1]]


@pytest.mark.parametrize("started", [True, False])
def test_gradients_reach_every_weight(started: bool) -> None:
    head = make_head(SHAPES[0]).requires_grad_(True)
    if started:
        head.start_as_pass_through(hidden_rms=2.0)
    _, paths = begin(head, torch.randn(2, LENGTH, HIDDEN), torch.randn(2, LENGTH, HIDDEN))
    (paths.features - torch.randn(2, LENGTH, 1, HIDDEN)).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        # What is read through a matrix of zeros gets its gradient once that matrix has moved.
        waiting = started and name in ("qkv.weight", "gate_up.weight", "attention_norm", "mlp_norm")
        assert bool(parameter.grad.any()) is not waiting, name


def test_the_start_repeats_the_feature() -> None:
    head = make_head(SHAPES[0])
    head.start_as_pass_through(hidden_rms=2.5)
    features = torch.randn(2, LENGTH, HIDDEN) * 7
    _, paths = begin(head, features, torch.randn(2, LENGTH, HIDDEN))
    similarity = torch.cosine_similarity(paths.features[:, :, 0], features, dim=2)
    assert similarity.min() > 0.8
    assert paths.features.square().mean().sqrt() == pytest.approx(2.5, rel=0.01)


def test_dropout_falls_on_both_inputs_and_only_in_training() -> None:
    head = make_head(SHAPES[0])
    features, following = torch.randn(1, LENGTH, 1, HIDDEN), torch.randn(1, LENGTH, 1, HIDDEN)
    angles = head.angles(torch.arange(LENGTH)[None])
    plain = head.rows(features, following, angles).x
    assert torch.equal(plain, head.train().rows(features, following, angles).x), "the share is zero"
    head.dropout.p = 0.2
    many = torch.stack([head.rows(features, following, angles).x for _ in range(2000)])
    assert not torch.isclose(many[0], plain).any(dim=3).all()
    torch.testing.assert_close(many.mean(dim=0), plain, rtol=0.1, atol=0.15)
    assert torch.equal(plain, head.eval().rows(features, following, angles).x)


def test_half_precision_computes_in_it() -> None:
    head = make_head(SHAPES[0], std=0.1)
    features, following = torch.randn(2, LENGTH, HIDDEN).bfloat16(), torch.randn(2, LENGTH, HIDDEN).bfloat16()
    _, exact = begin(head, features.float(), following.float())
    prefix, narrow = begin(head.bfloat16(), features, following)
    assert narrow.features.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.features.float(), exact.features, rtol=0.1, atol=0.1)
    drafted = torch.randn(2, LENGTH, 1, HIDDEN).bfloat16()
    assert head.extend(prefix, narrow, drafted, head.angles(torch.ones(2, LENGTH))).features.dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05), ("int8", 0.15)])
def test_a_packed_head_says_the_same(tmp_path_factory: pytest.TempPathFactory, kind: str, tolerance: float) -> None:
    quantization = Quantization.INT8 if kind == "int8" else Quantization.NONE
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    options = BackboneOptions(quantization=quantization, dtype=dtype, kernels=Kernels.NATIVE, device="cpu")
    backbone, _ = load_backbone(tiny_llama(tmp_path_factory.mktemp(kind) / "tiny"), options)
    shape = EagleShape(HIDDEN, 6, 2, 4, 20)
    features, following = torch.randn(2, LENGTH, HIDDEN) * 3, torch.randn(2, LENGTH, HIDDEN)
    _, expected = begin(make_head(shape, std=0.15), features, following)
    packed = pack_eagle_for_cpu(make_head(shape, std=0.15), backbone)
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.modules())
    _, got = begin(packed, features, following)
    assert got.features.dtype == torch.float32
    assert (got.features - expected.features).abs().max() < tolerance
    if kind != "fp32":
        assert not torch.equal(got.features, expected.features)


def test_torch_backbones_keep_torch_heads(tmp_path_factory: pytest.TempPathFactory) -> None:
    options = BackboneOptions(dtype=torch.float32, kernels=Kernels.TORCH, device="cpu")
    backbone, _ = load_backbone(tiny_llama(tmp_path_factory.mktemp("torch") / "tiny"), options)
    head = make_head(SHAPES[0])
    modules = list(head.modules())
    assert pack_eagle_for_cpu(head, backbone) is head
    assert list(head.modules()) == modules
