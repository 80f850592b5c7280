"""NF4 weights in the order in which the tensor cores' threads read them.

bitsandbytes stores W [N, K] row by row, two weights a byte. Here it is cut into blocks of 64 rows x 256 inputs, each
one contiguous piece of 8,704 bytes that one warpgroup reads in whole: 2,048 words with eight weights each, then 256
scales in bfloat16.

    word [c 4, warp 4, lane 32, v 4]:  row = 16 warp + 8 (v // 2) + lane // 4
      its byte b, nibble e:            k = 128 (v % 2) + 32 b + 8 c + 2 (lane % 4) + e     the low nibble is e = 0
    scale [row 64, group 4]:           of the inputs 64 group .. 64 group + 63

The four words (c, warp, lane) lie in 16 bytes: one load of a thread. They are its share of operand A of the PTX
instruction `wgmma.m64nNk16` ("Asynchronous Warpgroup Level Matrix Instructions", register fragments of A), so that a
loaded word needs no exchange between threads: two bytes give a register pair of one product over 64 inputs, which is
one group of scales.

Letters: N outputs, K inputs, P row blocks, Q blocks along the inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon_protocol.errors import ModelError

BLOCK_ROWS = 64
BLOCK_INPUTS = 256
GROUP = 64  # weights a scale
WORDS = 2048  # of weights in a block
BLOCK_WORDS = 2176  # with the scales
_ROW_MULTIPLE = 256  # four blocks, one for each warpgroup of a program
_ZERO = 7  # index of 0.0 in bitsandbytes' NF4 code


@dataclass(frozen=True, slots=True)
class PackedNf4:
    """A matrix [out, in], padded with zeros to multiples of 256 by 256.

    A weight is code[index] * scale, both rounded to the 16-bit type of the product, and the result as well. In
    float32 nothing but the scale is rounded, to bfloat16.
    """

    words: Tensor  # [P * Q * 2176] int32
    code: Tensor  # [16] float32
    table: Tensor  # [256] int32: the two values of a byte in bfloat16, the low nibble's in the low half
    out_features: int
    in_features: int

    @property
    def num_row_blocks(self) -> int:
        return _padded(self.out_features, _ROW_MULTIPLE) // BLOCK_ROWS

    @property
    def num_input_blocks(self) -> int:
        return _padded(self.in_features, BLOCK_INPUTS) // BLOCK_INPUTS

    @property
    def num_bytes(self) -> int:
        return self.words.numel() * self.words.element_size()


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def pack_nf4(packed: Tensor, absmax: Tensor, code: Tensor, out_features: int, in_features: int) -> PackedNf4:
    """packed: [N * K / 2] uint8, the high nibble the lower input; absmax: [N * K / 64] float32; code: [16] float32.
    Any device, on which the result stays. Raises `ModelError` for shapes and dtypes that are not these.

    The scales are rounded to bfloat16; everything else can be had back (`unpack_nf4`).
    """
    _check(packed, absmax, code, out_features, in_features)
    rows, inputs = _padded(out_features, _ROW_MULTIPLE), _padded(in_features, BLOCK_INPUTS)
    low_first = torch.stack((packed & 15, packed >> 4), dim=-1)  # [N * K / 2, 2]: of inputs 2i + 1 and 2i
    indices = packed.new_full((rows, inputs), _ZERO)
    indices[:out_features, :in_features] = low_first.flip(-1).view(out_features, in_features)
    scales = torch.zeros(rows, inputs // GROUP, dtype=torch.bfloat16, device=packed.device)
    scales[:out_features, : in_features // GROUP] = absmax.view(out_features, -1).to(torch.bfloat16)
    num_blocks = rows // BLOCK_ROWS, inputs // BLOCK_INPUTS
    words = torch.empty(*num_blocks, BLOCK_WORDS, dtype=torch.int32, device=packed.device)
    words[..., :WORDS] = _words_of(indices)
    per_block = scales.view(num_blocks[0], BLOCK_ROWS, num_blocks[1], -1).transpose(1, 2)  # [P, Q, 64, 4]
    words[..., WORDS:] = per_block.flatten(2).contiguous().view(torch.int32)
    code = code.to(packed.device)
    return PackedNf4(words.view(-1), code, _pair_table(code), out_features, in_features)


def unpack_nf4(weight: PackedNf4) -> tuple[Tensor, Tensor]:
    """bitsandbytes' bytes [N * K / 2] uint8 and scales [N * K / 64] float32, rounded as they were when packed."""
    blocks = weight.words.view(weight.num_row_blocks, weight.num_input_blocks, BLOCK_WORDS)
    rows, inputs = weight.num_row_blocks * BLOCK_ROWS, weight.num_input_blocks * BLOCK_INPUTS
    bytes_ = blocks[..., :WORDS].contiguous().view(torch.uint8)
    # [P, Q, c, warp, g, t, half, input half, byte] -> [P, warp, half, g, Q, input half, byte, c, t]
    bytes_ = bytes_.view(*blocks.shape[:2], 4, 4, 8, 4, 2, 2, 4).permute(0, 3, 6, 4, 1, 7, 8, 2, 5)
    swapped = (bytes_ >> 4) | (bytes_ << 4)
    packed = swapped.reshape(rows, inputs // 2)[: weight.out_features, : weight.in_features // 2]
    scales = blocks[..., WORDS:].contiguous().view(torch.bfloat16).view(*blocks.shape[:2], BLOCK_ROWS, -1)
    scales = scales.transpose(1, 2).reshape(rows, inputs // GROUP)
    return packed.reshape(-1), scales[: weight.out_features, : weight.in_features // GROUP].float().reshape(-1)


def reference_weights(weight: PackedNf4, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [N, K] as the kernels multiply it: the code in `dtype` times the scale, rounded once to `dtype`."""
    packed, absmax = unpack_nf4(weight)
    indices = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1, GROUP)
    values = weight.code.to(dtype).float()[indices.long()] * absmax[:, None]
    return values.to(dtype).view(weight.out_features, weight.in_features)


def stack_nf4(parts: Sequence[PackedNf4]) -> PackedNf4:
    """One matrix of several along the outputs (q, k and v; gate and up), without unpacking. Raises `ModelError` where
    inputs or codes differ, or where a part but the last has outputs that are no multiple of 256: stack those before
    they are packed."""
    first = parts[0]
    for part in parts[1:]:
        if part.in_features != first.in_features or not torch.equal(part.code, first.code):
            raise ModelError("NF4 matrices of different input sizes or codes cannot be stacked")
    if any(part.out_features % _ROW_MULTIPLE for part in parts[:-1]):
        sizes = [part.out_features for part in parts]
        raise ModelError(f"packed NF4 matrices of {sizes} outputs: stack them before they are packed")
    words = torch.cat([part.words for part in parts])
    return PackedNf4(words, first.code, first.table, sum(part.out_features for part in parts), first.in_features)


def _check(packed: Tensor, absmax: Tensor, code: Tensor, out_features: int, in_features: int) -> None:
    if in_features % GROUP or in_features < 1 or out_features < 1:
        raise ModelError(
            f"NF4 matrix [{out_features}, {in_features}]: the kernels need an input size that is a multiple of {GROUP}"
        )
    num_weights = out_features * in_features
    expected = {
        "bytes": (packed, torch.uint8, num_weights // 2),
        "scales": (absmax, torch.float32, num_weights // GROUP),
        "code": (code, torch.float32, 16),
    }
    for name, (tensor, dtype, size) in expected.items():
        if tensor.dtype != dtype or tensor.shape != (size,):
            raise ModelError(
                f"NF4 matrix [{out_features}, {in_features}]: its {name} are {tensor.dtype} {list(tensor.shape)}, "
                f"expected {dtype} [{size}]"
            )


def _words_of(indices: Tensor) -> Tensor:
    """indices [rows, inputs] uint8 -> [P, Q, 2048] int32"""
    num_rows, num_inputs = indices.shape
    nibbles = indices.view(-1, 4, 2, 8, num_inputs // BLOCK_INPUTS, 2, 4, 4, 4, 2)
    bytes_ = nibbles[..., 0] | (nibbles[..., 1] << 4)  # [P, warp, half, g, Q, input half, byte, c, t]
    bytes_ = bytes_.permute(0, 4, 7, 1, 3, 8, 2, 5, 6).contiguous()  # [P, Q, c, warp, g, t, half, input half, byte]
    return bytes_.view(num_rows // BLOCK_ROWS, num_inputs // BLOCK_INPUTS, WORDS * 4).view(torch.int32)


def _pair_table(code: Tensor) -> Tensor:
    values = code.to(torch.bfloat16)
    byte = torch.arange(256, device=code.device)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=-1).view(torch.int32).view(-1)
