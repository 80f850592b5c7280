"""The Hopper kernel: what the compiler makes of it, which needs no GPU, and on such a GPU what it computes."""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from gorgon_engine.kernels.triton import nf4_gluon
from gorgon_engine.kernels.triton.nf4_linear import Nf4Variant, nf4_linear, reference, sum_partials
from gorgon_engine.kernels.triton.nf4_packing import PackedNf4, pack_nf4
from gorgon_engine.kernels.triton.nf4_plan import SHARED_MEMORY, HopperTile, choose_tile, nf4_plans, plan_nf4
from gorgon_engine.models.nf4 import Nf4Tensor

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def compiled(tile: HopperTile, inner_splits: int, out: str) -> triton.compiler.CompiledKernel:
    x = f"tensordesc<bf16[{tile.block_r}, {tile.x_groups * 64}],{gl.NVMMASharedLayout(128, 16, 2)!r}>"
    words = f"tensordesc<i32[64, 32],{gl.NVMMASharedLayout(128, 32, 2)!r}>"
    scales = f"tensordesc<i32[8, 16],{gl.NVMMASharedLayout(64, 32, 2)!r}>"
    sizes = dict.fromkeys(("num_rows", "num_outputs", "num_input_blocks", "span"), "i32")
    signature = {"x": x, "words": words, "scales": scales, "words_ptr": "*i32", "table_ptr": "*i32", "out_ptr": out}
    constants = {
        "BLOCK_R": tile.block_r,
        "INNER": inner_splits,
        "WEIGHT_STAGES": tile.weight_stages,
        "X_GROUPS": tile.x_groups,
        "X_STAGES": tile.x_stages,
        "TABLE_WIDTH": tile.table_width,
        "TABLE_OFFSET": tile.table_offset(inner_splits),
        "DEPENDENT": True,
        "CONSUMER_REGISTERS": 112,
        "LOADER_REGISTERS": 24,
    }
    signature |= sizes | dict.fromkeys(constants, "constexpr")
    names = list(signature)
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name.endswith("_ptr")}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(nf4_gluon._nf4_linear_kernel, signature, places, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "launch_pdl": True})


@pytest.mark.parametrize(
    ("num_rows", "inner_splits", "shared", "out"),
    [
        (1, 1, False, "*bf16"),
        (64, 2, True, "*bf16"),
        (16, 4, True, "*fp32"),
        (64, 2, False, "*fp32"),
        (64, 1, True, "*fp32"),
    ],
)
def test_compiles_for_sm_90(num_rows: int, inner_splits: int, shared: bool, out: str) -> None:
    tile = choose_tile(num_rows, inner_splits, shared_weights=shared, half_sums=out == "*bf16")
    kernel = compiled(tile, inner_splits, out)
    assert nf4_gluon.table_offsets(kernel.asm["llir"]) == {tile.table_offset(inner_splits)}
    assert kernel.metadata.shared <= tile.num_bytes(inner_splits, half_sums=out == "*bf16") <= SHARED_MEMORY
    products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16", kernel.asm["ptx"])
    # 16 of a block, for each of the four warpgroups: the loops stay loops, and nothing falls back to smaller tiles.
    assert products == [str(tile.block_r)] * 64


def random_weight(out_features: int, in_features: int) -> PackedNf4:
    tensor = Nf4Tensor.quantize(torch.randn(out_features, in_features, device="cuda"))
    return pack_nf4(tensor.packed, tensor.absmax, tensor.code, out_features, in_features)


@on_hopper
@pytest.mark.parametrize("variant", [Nf4Variant.REGISTERS, Nf4Variant.SHARED])
@pytest.mark.parametrize(("out_features", "in_features"), [(300, 576), (6144, 4096), (1024, 14336)])
def test_against_the_reference(variant: Nf4Variant, out_features: int, in_features: int) -> None:
    weight = random_weight(out_features, in_features)
    plan = plan_nf4(weight.num_row_blocks, weight.num_input_blocks, max_inner_splits=2)  # fits both variants
    for num_rows in (1, 7, 16, 32, 64, 65, 200):
        x = torch.randn(num_rows, in_features, device="cuda").bfloat16()
        out = torch.empty(num_rows, out_features, dtype=torch.bfloat16, device="cuda")
        sum_partials(nf4_linear(x, weight, plan, variant=variant), out)
        want = reference(x, weight)
        assert (out.double() - want).norm() / want.norm() < 3e-3


@on_hopper
@pytest.mark.parametrize("variant", [Nf4Variant.REGISTERS, Nf4Variant.SHARED])
def test_a_rows_bits_are_its_own_and_the_portable_kernels(variant: Nf4Variant) -> None:
    weight = random_weight(1792, 4096)
    x = torch.randn(130, 4096, device="cuda").bfloat16()
    for plan in nf4_plans(weight.num_row_blocks, weight.num_input_blocks, max_inner_splits=2):
        whole = nf4_linear(x, weight, plan, variant=variant)
        for num_rows in (1, 8, 9, 31, 64, 65):
            some = nf4_linear(x[:num_rows].contiguous(), weight, plan, variant=variant)
            assert torch.equal(some, whole[:, :num_rows]), (plan, num_rows)
        portable = nf4_linear(x, weight, plan, variant=Nf4Variant.PORTABLE)
        torch.testing.assert_close(whole, portable, rtol=1e-3, atol=1e-2)


@on_hopper
def test_whole_sums_in_bfloat16() -> None:
    weight = random_weight(512, 512)
    plan = plan_nf4(weight.num_row_blocks, weight.num_input_blocks, max_partials=1)
    x = torch.randn(20, 512, device="cuda").bfloat16()
    half = torch.empty(1, 20, 512, dtype=torch.bfloat16, device="cuda")
    nf4_linear(x, weight, plan, partials=half, variant=Nf4Variant.REGISTERS)
    assert torch.equal(half, nf4_linear(x, weight, plan, variant=Nf4Variant.REGISTERS).bfloat16())
