"""The CPU kernels: right against plain arithmetic, and bit-identical however the rows come. Whole forwards are in
test_native_forward.py; here every instruction set is compiled and its linears are checked."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.kernels.cpu import Kind, NativeLibrary, PackedLinear, load_library, set_num_threads
from gorgon_engine.kernels.cpu.build import cpu_identity
from support.native import num_threads

GROUP = 64
# What a machine without the newer instructions would run; the flags only take away.
BUILDS = {
    "native": (),
    "avx2": ("-mno-avx512f", "-mno-avxvnni"),
    "generic": ("-DGORGON_FORCE_GENERIC",),
}
if "amx_int8" in cpu_identity():
    BUILDS["no-amx"] = ("-DGORGON_NO_AMX",)
SHAPES = [(1, 1), (3, 5), (64, 32), (70, 33), (130, 47), (576, 192)]


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    return load_library(BUILDS[request.param])


def test_the_builds_are_what_their_names_say() -> None:
    assert load_library(BUILDS["generic"]).instruction_set == "generic"
    avx2 = load_library(BUILDS["avx2"]).instruction_set
    assert avx2 in ("avx2", "generic")  # generic where the machine is not x86
    native = load_library().instruction_set
    if "no-amx" in BUILDS:
        assert load_library(BUILDS["no-amx"]).instruction_set == native.removesuffix("+amx")
    else:
        assert "amx" not in native


def int8_reference(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """Groups of 64 activations with a scale of their own, exact integer sums, in float64 from there."""
    weight = packed.dequantized().double()
    out = torch.zeros(x.shape[0], packed.out_features, dtype=torch.float64)
    for start in range(0, x.shape[1], GROUP):
        part = x[:, start : start + GROUP].double()
        scale = part.abs().amax(dim=1, keepdim=True) / 127
        rounded = torch.where(scale > 0, part / scale.clamp(min=1e-300), 0.0).round()
        out += (rounded * scale) @ weight[:, start : start + GROUP].T
    return out


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_linears_equal_plain_arithmetic(library: NativeLibrary, kind: Kind, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(inputs * 1000 + outputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    x = torch.randn(9, inputs, generator=generator)
    x[:, ::7] *= 30  # outliers, as the hidden states of real models have
    packed = PackedLinear.pack(weight, bias, kind, library=library)
    if kind == "int8":
        expected = int8_reference(x, packed)
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        assert (packed.dequantized() - weight).abs().le(scale * 0.5001).all()
    else:
        rounded = (lambda t: t.bfloat16()) if kind == "bf16" else (lambda t: t)
        expected = rounded(x).double() @ rounded(weight).double().T
    got = packed(x).double()
    tolerance = 2e-5 * (x.abs().double() @ weight.abs().double().T + 1)
    assert ((got - bias.double() - expected).abs() <= tolerance).all()


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["fp32", "bf16", "int8"]),
    rows=st.integers(1, 150),
    seed=st.integers(0, 2**31),
    shape=st.sampled_from(SHAPES),
)
def test_a_row_does_not_see_the_others(
    library: NativeLibrary, kind: Kind, rows: int, seed: int, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = PackedLinear.pack(torch.randn(shape[1], shape[0], generator=generator), None, kind, library=library)
    x = torch.randn(rows, shape[0], generator=generator)
    together = packed(x)
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(packed(x[order].contiguous()), together[order])
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(packed(x[row : row + 1]), together[row : row + 1])


def extreme_rows(rows: int, inputs: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of ordinary values, all zeros, one sign (the largest sums that int8 gives), tiny, huge and with outliers."""
    x = torch.randn(rows, inputs, generator=generator)
    for row, kind in enumerate(torch.randint(0, 7, (rows,), generator=generator).tolist()):
        if kind == 0:
            x[row] = 0
        elif kind == 1:
            x[row] = 3
        elif kind == 2:
            x[row] = -3
        elif kind == 3:
            x[row] *= 1e-30
        elif kind == 4:
            x[row] *= 1e30
        elif kind == 5:
            x[row, :: GROUP // 2] *= 1000
    return x


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70) | st.sampled_from([191, 193, 390]),
    inputs=st.integers(1, 400) | st.sampled_from([64, 128, 576]),
    outputs=st.integers(1, 130),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_int8_has_the_same_bits_on_every_instruction_set(
    rows: int, inputs: int, outputs: int, threads: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight[0] = 1  # the largest value of every input
    weight[-1] = -1
    bias = torch.randn(outputs, generator=generator) if seed % 2 else None
    x = extreme_rows(rows, inputs, generator)
    results = {}
    for name, flags in BUILDS.items():
        library = load_library(flags)
        with num_threads(library, threads):
            results[name] = PackedLinear.pack(weight, bias, "int8", library=library)(x)
    for name, result in results.items():
        assert torch.equal(result, results["generic"]), name
    assert results["generic"].isfinite().all()


if "no-amx" in BUILDS:
    # The kernel refuses the tiles to a process with a signal stack too small for their state.
    REFUSED = """
import ctypes, torch
class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, len(memory))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
from gorgon_engine.kernels.cpu import PackedLinear, load_library
generator = torch.Generator().manual_seed(7)
weight, x = torch.randn(100, 200, generator=generator), torch.randn(20, 200, generator=generator)
print(load_library().instruction_set, PackedLinear.pack(weight, None, "int8")(x).numpy().tobytes().hex())
"""

    def test_vector_code_serves_where_the_kernel_refuses_the_tiles() -> None:
        done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True)
        instruction_set, result = done.stdout.split()
        assert "amx" not in instruction_set
        generator = torch.Generator().manual_seed(7)
        weight, x = torch.randn(100, 200, generator=generator), torch.randn(20, 200, generator=generator)
        assert PackedLinear.pack(weight, None, "int8")(x).numpy().tobytes().hex() == result


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_threads_do_not_change_bits(kind: Kind) -> None:
    packed = PackedLinear.pack(torch.randn(300, 200), None, kind)
    x = torch.randn(37, 200)
    before = load_library().num_threads
    try:
        results = []
        for threads in (1, 2, 3):
            set_num_threads(threads)
            results.append(packed(x))
    finally:
        set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 5), r"x must be \[..., 8\]"),
        (torch.zeros(2, 8, dtype=torch.float64), "x must be torch.float32"),
        (torch.zeros(8, 2).T, "x must be contiguous"),
    ],
)
def test_wrong_inputs_are_refused(x: torch.Tensor, message: str) -> None:
    packed = PackedLinear.pack(torch.randn(4, 8), None, "fp32")
    with pytest.raises(ValueError, match=message):
        packed(x)


def test_wrong_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of"):
        PackedLinear.pack(torch.randn(4, 8), None, "int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight must be floating"):
        PackedLinear.pack(torch.zeros(4, dtype=torch.int64), None, "fp32")
    with pytest.raises(ValueError, match=r"bias must be floating \[4\]"):
        PackedLinear.pack(torch.randn(4, 8), torch.randn(5), "fp32")
