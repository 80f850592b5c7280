"""The packed order of NF4 weights: what goes in comes out, and lies where the kernels read it."""

import itertools

import pytest
import torch

from gorgon_engine.kernels.triton.nf4_packing import pack_nf4, reference_weights, stack_nf4, unpack_nf4
from gorgon_engine.kernels.triton.nf4_plan import Nf4Plan, choose_tile, nf4_plans, plan_nf4
from gorgon_engine.models.nf4 import Nf4Tensor
from gorgon_protocol.errors import ModelError

LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}


def quantized(out_features: int, in_features: int, seed: int = 0) -> Nf4Tensor:
    generator = torch.Generator().manual_seed(seed)
    return Nf4Tensor.quantize(torch.randn(out_features, in_features, generator=generator))


def parts(tensor: Nf4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    return tensor.packed, tensor.absmax, tensor.code, tensor.out_features, tensor.in_features


@pytest.mark.parametrize("shape", [(1, 64), (64, 256), (257, 320), (300, 576), (512, 768)])
def test_round_trip(shape: tuple[int, int]) -> None:
    tensor = quantized(*shape)
    packed, absmax = unpack_nf4(pack_nf4(*parts(tensor)))
    assert torch.equal(packed, tensor.packed)
    assert torch.equal(absmax, tensor.absmax.to(torch.bfloat16).float())
    again = pack_nf4(packed, absmax, *parts(tensor)[2:])
    assert torch.equal(again.words, pack_nf4(*parts(tensor)).words)


def test_weights_are_bitsandbytes_own_up_to_the_rounding_of_scales() -> None:
    tensor = quantized(300, 576)
    rounded = Nf4Tensor(tensor.packed, tensor.absmax.to(torch.bfloat16).float(), *parts(tensor)[2:])
    weight = pack_nf4(*parts(tensor))
    assert torch.equal(reference_weights(weight), rounded.dequantize())
    error = (reference_weights(weight, torch.bfloat16).double() - tensor.dequantize().double()).norm()
    assert error / tensor.dequantize().double().norm() < 4e-3


def test_places_of_weights_and_scales() -> None:
    tensor = quantized(200, 500 // 64 * 64)
    weight = pack_nf4(*parts(tensor))
    indices = torch.stack((tensor.packed >> 4, tensor.packed & 15), dim=-1).view(200, -1)
    scales = tensor.absmax.view(200, -1).to(torch.bfloat16)
    blocks = weight.words.view(weight.num_row_blocks, weight.num_input_blocks, 2176)
    packed_scales = blocks[..., 2048:].contiguous().view(torch.bfloat16)
    for row, k in itertools.product(range(0, 200, 7), range(0, 448, 11)):
        block = blocks[row // 64, k // 256]
        r, i = row % 64, k % 256
        warp, half, g = r // 16, r // 8 % 2, r % 8
        input_half, byte, c, t, nibble = i // 128, i // 32 % 4, i // 8 % 4, i // 2 % 4, i % 2
        word = int(block[c * 512 + warp * 128 + (g * 4 + t) * 4 + half * 2 + input_half])
        assert (word >> (8 * byte + 4 * nibble)) & 15 == indices[row, k]
        assert packed_scales[row // 64, k // 256, r * 4 + i // 64] == scales[row, k // 64]


def test_padding_multiplies_to_zero() -> None:
    weight = pack_nf4(*parts(quantized(70, 64)))
    whole = pack_nf4(*unpack_nf4(weight), weight.code, 70, 64)
    padded = type(weight)(whole.words, whole.code, whole.table, 256, 256)
    values = reference_weights(padded)
    assert torch.equal(values[:70, :64], reference_weights(weight))
    values[:70, :64] = 0
    assert not values.any()


def test_table_holds_the_pairs_of_every_byte() -> None:
    weight = pack_nf4(*parts(quantized(64, 64)))
    pairs = weight.table.view(torch.bfloat16).view(256, 2)
    code = weight.code.to(torch.bfloat16)
    for byte in (0, 7, 0x7F, 0xA3, 255):
        assert pairs[byte].tolist() == [code[byte & 15].item(), code[byte >> 4].item()]


def test_stacked_is_what_the_stack_packs_to() -> None:
    several = [quantized(size, 320, seed) for seed, size in enumerate((512, 256, 100))]
    stacked = stack_nf4([pack_nf4(*parts(tensor)) for tensor in several])
    at_once = pack_nf4(*parts(Nf4Tensor.concat(several)))
    assert torch.equal(stacked.words, at_once.words)
    assert (stacked.out_features, stacked.in_features) == (868, 320)


def test_stacking_refuses_what_does_not_fit() -> None:
    first, other = (pack_nf4(*parts(quantized(100, size))) for size in (320, 64))
    with pytest.raises(ModelError, match="different input sizes"):
        stack_nf4([first, other])
    with pytest.raises(ModelError, match="stack them before they are packed"):
        stack_nf4([first, first])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_features": 65}, "multiple of 64"),
        ({"in_features": 0}, "multiple of 64"),
        ({"out_features": 63}, "its bytes are torch.uint8"),
        ({"packed": torch.zeros(64 * 32, dtype=torch.int8)}, "torch.int8"),
        ({"absmax": torch.zeros(64, dtype=torch.float16)}, "its scales are torch.float16"),
        ({"code": torch.zeros(15)}, "its code are torch.float32 .15."),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    names = ("packed", "absmax", "code", "out_features", "in_features")
    given = dict(zip(names, parts(quantized(64, 64)), strict=True)) | change
    with pytest.raises(ModelError, match=message) as caught:
        pack_nf4(**given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("num_row_blocks", "num_input_blocks"), [(4, 1), (4, 3), (8, 3), (12, 5), (96, 16), (448, 16)])
def test_plans_cover_every_block_once(num_row_blocks: int, num_input_blocks: int) -> None:
    plans = nf4_plans(num_row_blocks, num_input_blocks)
    assert plan_nf4(num_row_blocks, num_input_blocks) in plans
    for plan in plans:
        seen: dict[int, list[int]] = {}
        for unit in range(plan.num_units):
            seen.setdefault(unit // num_input_blocks, []).append(unit // plan.span)
        for programs in seen.values():
            lengths = [programs.count(program) for program in sorted(set(programs))]
            assert len(lengths) == plan.num_partials, plan
            assert all(length % plan.inner_splits == 0 for length in lengths), plan


@pytest.mark.parametrize("name", LLAMA_8B)
@pytest.mark.parametrize("inner", [1, 2])
def test_plans_of_the_reference_shape_fill_the_gpu_and_fit(name: str, inner: int) -> None:
    out_features, in_features = LLAMA_8B[name]
    plan = plan_nf4(out_features // 64, in_features // 256, inner)
    assert 96 <= plan.num_programs <= 132
    for num_rows in (1, 16, 32, 64, 65):
        for shared in (True, False):
            assert choose_tile(num_rows, plan.inner_splits, shared_weights=shared).block_r >= min(num_rows, 64)


def test_whole_sums_where_asked() -> None:
    assert plan_nf4(448, 16, max_partials=1) == Nf4Plan(448, 16, inner_splits=1, num_programs=112)


def test_more_inner_splits_than_shared_memory_holds() -> None:
    with pytest.raises(ModelError, match="plan the NF4 product with fewer"):
        choose_tile(64, 4, shared_weights=True)
