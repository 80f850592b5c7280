"""What fits on a GPU: arithmetic on shapes, checked against what tensors of those shapes take."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from gorgon_engine.kernels.triton.nf4_packing import pack_nf4
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.memory_plan import (
    GIB,
    EngineShape,
    check_engine_fits,
    check_weights_fit,
    free_bytes,
    largest_num_slots,
    plan_memory,
    weight_bytes,
)
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.linear import DenseLinear
from gorgon_engine.models.loading import load_weights
from gorgon_engine.models.nf4 import Nf4Linear
from gorgon_protocol.errors import BadRequestError, ModelError

LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=8192,
)


@pytest.fixture
def llama(tmp_path: Path) -> BackboneConfig:
    LLAMA_3_8B.save_pretrained(tmp_path)
    return BackboneConfig.from_folder(tmp_path)


@pytest.fixture
def shape(llama: BackboneConfig) -> EngineShape:
    return EngineShape(
        config=llama,
        num_slots=8,
        context=4096,
        max_scratch=128,
        max_nodes=32,
        chunk_size=512,
        element_size=2,
        graphs=True,
    )


def test_the_figures_of_llama_3_8b(llama: BackboneConfig, shape: EngineShape) -> None:
    # 3.93 GB of weights with float32 scales and 3.71 packed, both ends of 1.05 GB each.
    assert weight_bytes(llama, nf4=True, element_size=2) / 1e9 == pytest.approx(3.93 + 3.71 + 2 * 1.05, abs=0.02)
    assert weight_bytes(llama, nf4=False, element_size=2) / 1e9 == pytest.approx(16.06, abs=0.02)
    plan = plan_memory(shape)
    # A position of all layers is 128 KiB, and of one layer more 132; nine slots of 4,224.
    assert plan.kv_cache == 9 * (4096 + 128) * ((132 << 10) + 8)
    assert plan.total == plan.kv_cache + plan.workspaces + plan.graphs
    one = plan_memory(replace(shape, num_slots=1))
    in_nf4 = weight_bytes(llama, nf4=True, element_size=2)
    assert in_nf4 + one.total < 16e9, "one sequence of 4k runs under a cap of 16 GB"


def test_the_cache_takes_what_was_planned(shape: EngineShape) -> None:
    config = replace(shape.config, num_layers=2)
    plan = plan_memory(replace(shape, config=config, graphs=False, num_slots=3, context=100))
    cache = KVCache(
        num_layers=2,
        num_slots=3,
        num_kv_heads=8,
        head_dim=128,
        capacity=100,
        max_scratch=128,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    history = 3 * 228 * 8
    assert plan.kv_cache == cache.num_bytes + cache.num_bytes // 2 + history  # heads: a layer more


@pytest.mark.parametrize("nf4", [False, True])
def test_weights_take_what_was_planned(nf4: bool, tmp_path: Path) -> None:
    small = LlamaConfig(
        hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=61, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path)
    weights = load_weights(tmp_path, quantization="nf4" if nf4 else "none", dtype=torch.bfloat16)
    taken = weights.embedding.numel() * 2
    for linear in (part for one in weights.layers for part in (one.qkv, one.o, one.gate_up, one.down)):
        if isinstance(linear, Nf4Linear):
            w = linear.weight
            packed = pack_nf4(w.packed, w.absmax, w.code, w.out_features, w.in_features)
            taken += w.packed.numel() + w.absmax.numel() * 4 + packed.num_bytes
        else:
            assert isinstance(linear, DenseLinear)
            taken += linear.weight.numel() * 2
    assert weight_bytes(weights.config, nf4=nf4, element_size=2) == taken


@pytest.mark.parametrize(
    ("changes", "grows"),
    [
        ({"num_slots": 16}, ("kv_cache", "workspaces", "graphs")),
        ({"context": 8192}, ("kv_cache",)),
        ({"max_nodes": 64}, ("workspaces", "graphs")),
        ({"chunk_size": 2048}, ("workspaces",)),
        ({"element_size": 4}, ("kv_cache", "workspaces")),
    ],
)
def test_each_setting_costs_what_it_should(shape: EngineShape, changes: dict[str, int], grows: tuple[str, ...]) -> None:
    before, after = plan_memory(shape), plan_memory(replace(shape, **changes))  # type: ignore[arg-type]
    for part in ("kv_cache", "workspaces", "graphs"):
        if part in grows:
            assert getattr(after, part) > getattr(before, part), part
        assert getattr(after, part) >= getattr(before, part), part


def test_without_graphs_there_is_no_spare_slot(shape: EngineShape) -> None:
    plan = plan_memory(replace(shape, graphs=False))
    assert plan.graphs == 0
    assert plan.kv_cache * 9 == plan_memory(shape).kv_cache * 8


@pytest.mark.parametrize("gib", [2, 10, 40, 70])
def test_the_largest_number_of_slots_fits_and_one_more_does_not(shape: EngineShape, gib: int) -> None:
    slots = largest_num_slots(shape, gib * GIB)
    if slots:
        assert plan_memory(replace(shape, num_slots=slots)).total <= gib * GIB
    assert plan_memory(replace(shape, num_slots=slots + 1)).total > gib * GIB
    assert slots > 0 or gib == 2
    assert slots <= gib * 2


def test_what_does_not_fit_is_said_with_what_does(shape: EngineShape) -> None:
    assert check_engine_fits(shape, 40 * GIB) == plan_memory(shape)
    many = replace(shape, num_slots=200)
    with pytest.raises(BadRequestError) as error:
        check_engine_fits(many, 40 * GIB)
    message = str(error.value)
    assert "\n" not in message
    assert "200 slots of 4096 positions do not fit on the GPU" in message
    assert "40.00 GiB are free" in message
    (fit,) = re.findall(r"; (\d+) slots fit$", message)
    check_engine_fits(replace(shape, num_slots=int(fit)), 40 * GIB)


def test_a_shorter_context_is_named_where_it_helps(shape: EngineShape) -> None:
    long = replace(shape, context=131072, num_slots=1)
    with pytest.raises(BadRequestError, match=r"lower the context$") as error:
        check_engine_fits(long, 6 * GIB)
    (context,) = re.findall(r"one slot of (\d+) positions fits", str(error.value))
    check_engine_fits(replace(long, context=int(context)), 6 * GIB)
    with pytest.raises(BadRequestError, match="not even one slot does: lower chunk_size and max_nodes"):
        check_engine_fits(long, GIB // 4)


def test_weights_that_do_not_load(llama: BackboneConfig) -> None:
    check_weights_fit(llama, nf4=True, element_size=2, free_bytes=10 * GIB)
    with pytest.raises(ModelError, match=r"needs 14.96 GiB while it loads, and 10.00 GiB are free.*load it in NF4"):
        check_weights_fit(llama, nf4=False, element_size=2, free_bytes=10 * GIB)
    with pytest.raises(ModelError, match=r"take a smaller model or a larger GPU$") as error:
        check_weights_fit(llama, nf4=True, element_size=2, free_bytes=4 * GIB)
    assert "load it in NF4" not in str(error.value)


@pytest.mark.parametrize(("share", "expected"), [(1.0, 30 + 4), (0.25, 80 // 4 - 6)])
def test_what_is_free_is_also_what_torch_holds_and_no_more_than_it_may(
    share: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {
        "mem_get_info": (30 * GIB, 80 * GIB),
        "memory_reserved": 10 * GIB,
        "memory_allocated": 6 * GIB,
        "get_per_process_memory_fraction": share,
    }
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, figure=figure: figure)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert free_bytes(torch.device("cuda")) == expected * GIB
