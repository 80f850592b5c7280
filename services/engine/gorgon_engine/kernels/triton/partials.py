"""The sum that closes a split-K product (`nf4_linear`): done on the way by whichever kernel reads the product."""

import triton
import triton.language as tl


@triton.jit
def add_partials(partials_ptr, at, stride, mask, NUM_PARTIALS: tl.constexpr):  # type: ignore[no-untyped-def]
    """sum_s partials[s], s ascending, at offsets `at` of a part, for kernels that read a product. stride: of s."""
    total = tl.load(partials_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTIALS):
        total += tl.load(partials_ptr + part * stride + at, mask=mask, other=0.0).to(tl.float32)
    return total
