"""Kernels that start before those in front of them have ended touch no memory before they wait. No GPU is needed."""

import re
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gorgon_engine.kernels.triton import rms_norm, rope_append, silu_mul, tree_attention
from gorgon_engine.kernels.triton.early_launch import early_options, launches_early

POINTERS = {"slots_ptr": "*i64", "lengths_ptr": "*i64", "ancestors_ptr": "*i64"}
FLOATS = ("eps", "scale_log2")
SIXTEEN_BITS = {"query_ptr", "keys_ptr", "values_ptr", "normed_ptr", "keys", "values"}
ATTENTION = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "NUM_WORDS": 1, "GROWING": True, "TAIL": 32,
             "WHOLE": False}  # fmt: skip
KERNELS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "rms_norm": (rms_norm._add_rms_norm_kernel, {"NUM_PARTIALS": 4, "BLOCK": 4096}, 8),
    "silu_mul": (silu_mul._silu_mul_kernel, {"NUM_PARTIALS": 2, "BLOCK": 1024}, 4),
    "rope_append": (
        rope_append._rope_append_kernel,
        {"NUM_PARTIALS": 2, "NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HALF": 64, "HEADS_EACH": 8, "HAS_NORMS": False},
        4,
    ),
    "prefix": (
        tree_attention._prefix_kernel,
        ATTENTION | {"BLOCK_M": 64, "BLOCK_N": 64, "STAGES": 3, "DESCRIPTORS": True},
        4,
    ),
    "fold": (tree_attention._fold_kernel, ATTENTION | {"HEADS": 4}, 1),
}


def ptx(kernel: Any, constants: dict[str, Any], num_warps: int) -> str:
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("keys", "values"):
            signature[name] = "tensordesc<bf16[64, 128]>"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*bf16" if name in SIXTEEN_BITS else "*fp32")
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name.endswith("_ptr")}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, aligned)
    options = {"num_warps": num_warps, "launch_pdl": constants["EARLY"]}
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


# Instructions that touch the GPU's memory.
GLOBAL_MEMORY = re.compile(r"\b(ld\.global|st\.global|cp\.async|red\.|atom\.)")


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_touched_before_the_wait(name: str) -> None:
    kernel, constants, num_warps = KERNELS[name]
    code = ptx(kernel, constants | {"EARLY": True}, num_warps)
    assert code.count("griddepcontrol.wait") == 1
    assert code.count("griddepcontrol.launch_dependents") == 1
    before = code[: code.index("griddepcontrol.wait")]
    if name == "fold":
        # It sums the tail meanwhile: what it reads for that was there before the prefix kernel began.
        assert not re.search(r"\bst\.global", before)
        assert before.count("ld.global") >= 4
        # The partial sums come behind it.
        assert len(GLOBAL_MEMORY.findall(code[len(before) :])) >= 3
    else:
        assert not GLOBAL_MEMORY.search(before), GLOBAL_MEMORY.findall(before)
    if name == "prefix":
        assert code.index("griddepcontrol.launch_dependents") > len(before), (
            "the fold reads what this one has waited for"
        )


@pytest.mark.parametrize("name", ["rms_norm", "silu_mul", "rope_append"])
def test_other_gpus_are_not_asked_for_it(name: str) -> None:
    kernel, constants, num_warps = KERNELS[name]
    assert "griddepcontrol" not in ptx(kernel, constants | {"EARLY": False}, num_warps)


def test_only_gpus_that_can_launch_early(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launches_early(torch.device("cpu"))
    for index, (major, can) in enumerate(((8, False), (9, True), (10, True)), start=100):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        options = early_options(torch.device("cuda", index), 16)
        assert options == ({"EARLY": True, "launch_pdl": True} if can else {"EARLY": False})
