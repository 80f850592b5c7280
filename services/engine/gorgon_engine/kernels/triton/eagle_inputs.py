"""What one pass of an EAGLE head's layer begins with: both inputs normalised side by side, angles, places in the cache.

    inputs[r]   = [norm(feature[r]), norm(embedding[r])]          norm(x) = x / sqrt(mean(x^2) + eps) * gain
    residual[r] = 0                                               what the first product is added to
    position    = starts[b] + offset (+ row of the sequence, along committed text)
    places[b]   = starts[b] + place_offset                        where the sequence's first row is remembered

EAGLE: 2401.15077, section 3. Rows of a beam take the feature of the path that they go on from. One program a row and
input: a row's bits do not depend on the others.

Letters: B sequences, R = B * E rows, F features, C hidden size, D head dimension, P positions.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EagleInputs:
    inputs: Tensor  # [R, 2 C] in the layer's dtype
    residual: Tensor  # [R, C] float32, zeros
    cos: Tensor  # [R, D/2] float32
    sin: Tensor  # [R, D/2] float32
    places: Tensor  # [B] int64


@triton.jit(do_not_specialize=["rows_each", "offset", "place_offset", "num_angles"])
def _eagle_inputs_kernel(  # type: ignore[no-untyped-def]
    features_ptr, paths_ptr, embeddings_ptr, feature_gain_ptr, embedding_gain_ptr, starts_ptr, cos_ptr, sin_ptr,
    inputs_ptr, residual_ptr, row_cos_ptr, row_sin_ptr, places_ptr,
    eps, size, rows_each, offset, place_offset, num_angles,
    HAS_PATHS: tl.constexpr, IS_CHAIN: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    inside = dims < size
    if tl.program_id(1) == 0:
        source = tl.load(paths_ptr + row) if HAS_PATHS else row
        x = tl.load(features_ptr + source * size + dims, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(feature_gain_ptr + dims, mask=inside, other=0.0).to(tl.float32)
        to = row * 2 * size + dims
        tl.store(residual_ptr + row * size + dims, tl.zeros([BLOCK], tl.float32), mask=inside)
    else:
        x = tl.load(embeddings_ptr + row * size + dims, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(embedding_gain_ptr + dims, mask=inside, other=0.0).to(tl.float32)
        to = row * 2 * size + size + dims
        sequence = row // rows_each
        start = tl.load(starts_ptr + sequence)
        position = start + offset
        if IS_CHAIN:
            position += row % rows_each
        # Padding may stand behind the last position: any angle will do.
        position = tl.minimum(tl.maximum(position, 0), num_angles - 1)
        lane = tl.arange(0, HALF)
        tl.store(row_cos_ptr + row * HALF + lane, tl.load(cos_ptr + position * HALF + lane))
        tl.store(row_sin_ptr + row * HALF + lane, tl.load(sin_ptr + position * HALF + lane))
        if row % rows_each == 0:
            tl.store(places_ptr + sequence, start + place_offset)
    scale = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    tl.store(inputs_ptr + to, (x * scale * gain).to(inputs_ptr.dtype.element_ty), mask=inside)


def eagle_inputs(
    features: Tensor, embeddings: Tensor, starts: Tensor, *,
    feature_gain: Tensor, embedding_gain: Tensor, cos: Tensor, sin: Tensor, eps: float,
    paths: Tensor | None = None, offset: int = 0, place_offset: int = 0, is_chain: bool = False,
) -> EagleInputs:  # fmt: skip
    """features: [F, C], of which row r takes number paths[r] ([R] int64; None = r, F = R); embeddings: [R, C], both of
    any floating dtype; starts: [B] int64; gains: [C] in the layer's dtype; cos, sin: [P, D/2] float32 of all positions.
    is_chain: the rows of a sequence are at consecutive positions; else all at one. All contiguous, on one device.
    """
    num_rows, size = embeddings.shape
    batch, half = starts.shape[0], cos.shape[1]
    assert num_rows % batch == 0, (embeddings.shape, starts.shape)
    assert features.shape[1] == size, (features.shape, embeddings.shape)
    assert (features.shape if paths is None else paths.shape)[0] == num_rows, (features.shape, embeddings.shape)
    assert feature_gain.shape == embedding_gain.shape == (size,), (feature_gain.shape, embedding_gain.shape)
    assert cos.shape == sin.shape, (cos.shape, sin.shape)
    assert cos.dtype == sin.dtype == torch.float32, (cos.dtype, sin.dtype)
    assert half & (half - 1) == 0, half
    for tensor in (features, embeddings, starts, feature_gain, embedding_gain, cos, sin):
        assert tensor.is_contiguous(), tensor.stride()
    made = EagleInputs(
        inputs=feature_gain.new_empty(num_rows, 2 * size),
        residual=cos.new_empty(num_rows, size),
        cos=cos.new_empty(num_rows, half),
        sin=sin.new_empty(num_rows, half),
        places=torch.empty_like(starts),
    )
    _eagle_inputs_kernel[(num_rows, 2)](
        features, starts if paths is None else paths, embeddings, feature_gain, embedding_gain, starts, cos, sin,
        made.inputs, made.residual, made.cos, made.sin, made.places,
        eps, size, num_rows // batch, offset, place_offset, cos.shape[0],
        HAS_PATHS=paths is not None, IS_CHAIN=is_chain, HALF=half, BLOCK=triton.next_power_of_2(size),
        num_warps=8 if size > 2048 else 4,
    )  # fmt: skip
    return made


def reference(
    features: Tensor, embeddings: Tensor, starts: Tensor, *,
    feature_gain: Tensor, embedding_gain: Tensor, cos: Tensor, sin: Tensor, eps: float,
    paths: Tensor | None = None, offset: int = 0, place_offset: int = 0, is_chain: bool = False,
) -> EagleInputs:  # fmt: skip
    """The same in torch operations, the inputs in float64."""

    def normed(x: Tensor, gain: Tensor) -> Tensor:
        x = x.double()
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps) * gain.double()

    rows = torch.arange(embeddings.shape[0], device=starts.device)
    each = embeddings.shape[0] // starts.shape[0]
    positions = (starts[rows // each] + offset + (rows % each if is_chain else 0)).clamp(0, cos.shape[0] - 1)
    chosen = features if paths is None else features[paths]
    return EagleInputs(
        inputs=torch.cat([normed(chosen, feature_gain), normed(embeddings, embedding_gain)], dim=1),
        residual=torch.zeros(embeddings.shape, device=starts.device),
        cos=cos[positions],
        sin=sin[positions],
        places=starts + place_offset,
    )
