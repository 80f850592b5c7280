"""The NF4 product on Hopper GPUs (sm_90), in Triton's Gluon dialect. Interface, formula and shapes: `nf4_linear`.

One program fills a processor: four warpgroups that each multiply blocks of 64 rows of W with x^T, and warps that keep
rings of shared memory filled (warp specialisation). The product is transposed, [64 weights' rows] x [8..64 rows of x],
so that few rows of x waste nothing of the tensor cores.

- The weights are operand A of `wgmma`, from registers: packed in the order of its fragments (`nf4_packing`), they go
  from memory to the tensor cores without an exchange between threads.
- Decoding is one look-up for two weights: a table of the 256 bytes' value pairs, a copy for each of the 32 banks, read
  at byte * row + lane * 4 without conflicts; then one multiplication of the pair by its scale. The look-up is inline
  PTX: no operation of the dialect reads shared memory at an address of each thread's own.
- Within a warpgroup the product of one group of 64 inputs runs while the next group is decoded. No product is in
  flight across the loop's edge: ptxas would silently make all of them wait (its note C7513).
- Weights depend on nothing that the kernel in front writes: under programmatic dependent launch they are loaded, and
  the table filled, while that one still runs. Only the warp that loads x waits for it (`griddepcontrol.wait`), and what
  is written depends on x.

Row-invariance: a column of the tensor cores' tile does not see the others, and what is summed in which order is the
plan's (`nf4_plan`), whatever the number of rows.

Letters: R rows, N outputs, K inputs, S partial sums; [64, n] the tile of a warpgroup.
"""

import re
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gorgon_engine.kernels.triton.nf4_packing import BLOCK_WORDS, GROUP, PackedNf4
from gorgon_engine.kernels.triton.nf4_plan import WARPGROUPS, HopperTile, Nf4Plan
from gorgon_protocol.errors import ModelError

_CONSUMER_REGISTERS = 112  # for 120 in the first warpgroup: with more asked for, the others spill
_LOADER_REGISTERS = 24

_TAKE_X_AFTER_LAST_KERNEL = gl.constexpr("griddepcontrol.wait; mov.u32 $0, 0;")
_LET_NEXT_KERNEL_START = gl.constexpr("griddepcontrol.launch_dependents; mov.u32 $0, 0;")
_BLOCK_WORDS = gl.constexpr(BLOCK_WORDS)
_WORD_ROWS = gl.constexpr(BLOCK_WORDS // 32)  # of 128 bytes: 64 with weights, 4 with scales
_WGS = gl.constexpr(WARPGROUPS)


@triton.constexpr_function
def _decoder(group: int, table_width: int, table_offset: int) -> str:
    """PTX that decodes group `group` of a block's four.

    For two neighbouring elements of the packed words: $2, $3 the words (inputs 0..127 and 128..255 of the block), $4,
    $5 lane * 4, $6, $7 the row's scales of two groups, as two bfloat16; gives $0 and $1, two weights each: inputs 0..31
    and 32..63 of the group.
    """
    word = "$2" if group < 2 else "$3"
    lines = [".reg .b32 address, base, scale, pair;", "mov.u32 base, global_smem;"]
    lines.append(f"prmt.b32 scale, $6, $6, {'0x1010' if group % 2 == 0 else '0x3232'};")
    for half in range(2):
        byte = 2 * (group % 2) + half
        if table_width == 64:  # byte * 256 + lane * 4 is a permutation of bytes
            lines.append(f"prmt.b32 address, {word}, $4, 0x76{byte}4;")
        else:
            shift = f"shl.b32 address, {word}, 7;" if byte == 0 else f"shr.u32 address, {word}, {8 * byte - 7};"
            lines += [shift, "lop3.b32 address, address, 0x7f80, $4, 0xea;"]  # (address & 0x7f80) | lane * 4
        lines += [
            "add.u32 address, address, base;",
            f"ld.shared.b32 pair, [address+{table_offset}];",
            f"mul.rn.bf16x2 ${half}, pair, scale;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.jit
def _place(step, path, h):  # type: ignore[no-untyped-def]
    """Tile and input block of a program's step, for inner split h. A program sees one or two tiles, whose blocks each
    inner split takes in one run."""
    first_tile, first_input, first_steps, second_steps = path
    second = step >= first_steps
    tile = gl.where(second, first_tile + 1, first_tile)
    block = gl.where(second, h * second_steps + step - first_steps, first_input + h * first_steps + step)
    return tile, block


@gluon.jit
def _load_x(  # type: ignore[no-untyped-def]
    x, x_rings, row, path, BLOCK_R: gl.constexpr, INNER: gl.constexpr, X_GROUPS: gl.constexpr, X_STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
):  # fmt: skip
    x_ring, x_full, x_empty = x_rings
    if DEPENDENT:
        gl.inline_asm_elementwise(_TAKE_X_AFTER_LAST_KERNEL, "=r", [], gl.int32, is_pure=False, pack=1)
    stage = 0
    phase = 1
    for step in range(path[2] + path[3]):
        for piece in gl.static_range(4 // X_GROUPS):
            for h in gl.static_range(INNER):
                _tile, block = _place(step, path, h)
                full = x_full.index(h * X_STAGES + stage)
                mbarrier.wait(x_empty.index(h * X_STAGES + stage), phase)
                mbarrier.expect(full, BLOCK_R * X_GROUPS * 128)
                column = block * 256 + piece * X_GROUPS * 64
                tma.async_copy_global_to_shared(x, [row, column], full, x_ring.index(h * X_STAGES + stage))
            stage += 1
            if stage == X_STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _load_weights(  # type: ignore[no-untyped-def]
    words, scales, weight_rings, num_input_blocks, path, INNER: gl.constexpr, STAGES: gl.constexpr
):
    words_ring, scales_ring, full, empty = weight_rings
    TILE_BLOCKS: gl.constexpr = _WGS // INNER
    stage = 0
    phase = 1
    # No stage, no ring: the warpgroups load for themselves.
    for step in range(path[2] + path[3] if STAGES > 0 else 0):
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), _WGS * _BLOCK_WORDS * 4)
        for wg in gl.static_range(_WGS):
            tile, input_block = _place(step, path, wg // TILE_BLOCKS)
            row = ((tile * TILE_BLOCKS + wg % TILE_BLOCKS) * num_input_blocks + input_block) * _WORD_ROWS
            slot = stage * _WGS + wg
            tma.async_copy_global_to_shared(words, [row, 0], full.index(stage), words_ring.index(slot))
            # The scales behind them, as rows of half the length: a swizzle needs eight rows.
            tma.async_copy_global_to_shared(scales, [row * 2 + 128, 0], full.index(stage), scales_ring.index(slot))
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1


@gluon.jit
def _block_from_memory(words_ptr, block, A: gl.constexpr):  # type: ignore[no-untyped-def]
    """A block's words [64, 32] as the fragments of A, and its scales: of groups 0 and 1, and of 2 and 3 [64]."""
    base = words_ptr + block.to(gl.int64) * _BLOCK_WORDS
    rows: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    chunk = gl.arange(0, 4, layout=gl.SliceLayout(1, rows))
    word = gl.arange(0, 512, layout=gl.SliceLayout(0, rows))
    words = gl.load(base + gl.expand_dims(chunk, 1) * 512 + gl.expand_dims(word, 0), eviction_policy="evict_first")
    # [c1, c0, warp, g, t, half, input half] -> rows (warp, half, g), columns (c1, c0, t, input half)
    words = gl.reshape(words, (2, 2, 4, 8, 4, 2, 2))
    words = gl.reshape(gl.permute(words, (2, 5, 3, 0, 1, 4, 6)), (64, 32))
    words = gl.convert_layout(words, A, assert_trivial=True)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, A))
    scales = gl.load((base + 2048).to(gl.pointer_type(gl.int64), bitcast=True) + row)
    return words, scales.to(gl.int32), (scales >> 32).to(gl.int32)


@gluon.jit
def _block_from_ring(words_slot, scales_slot, A: gl.constexpr):  # type: ignore[no-untyped-def]
    """The same from shared memory."""
    threads: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [16, 0], [32, 0]], [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]], [[4, 0], [8, 0]], [], [64, 32]
    )
    words = gl.reshape(words_slot.load(threads), (2, 2, 4, 8, 4, 2, 2))
    words = gl.reshape(gl.permute(words, (2, 5, 3, 0, 1, 4, 6)), (64, 32))
    words = gl.convert_layout(words, A, assert_trivial=True)
    pairs: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [1, 0]], [[0, 0], [0, 0], [0, 2], [0, 4], [0, 8]], [[2, 0], [4, 0]], [], [8, 16]
    )
    low, high = gl.split(gl.reshape(scales_slot.load(pairs), (64, 2)))
    low = gl.convert_layout(low, gl.SliceLayout(1, A), assert_trivial=True)
    high = gl.convert_layout(high, gl.SliceLayout(1, A), assert_trivial=True)
    return words, low, high


@gluon.jit
def _decode(  # type: ignore[no-untyped-def]
    words, lane, low, high, group: gl.constexpr, TABLE_WIDTH: gl.constexpr, TABLE_OFFSET: gl.constexpr, A: gl.constexpr
):
    """Group `group` of a block: [64, 64] bfloat16, its weights times its scales."""
    scale = gl.expand_dims(low if group < 2 else high, 1) + gl.full([64, 32], 0, gl.int32, layout=A)
    decoder: gl.constexpr = _decoder(group, TABLE_WIDTH, TABLE_OFFSET)
    first, second = gl.inline_asm_elementwise(
        decoder, "=r,=r,r,r,r,r,r,r", [words, lane, scale], (gl.bfloat16, gl.bfloat16), is_pure=False, pack=2
    )
    both = gl.permute(gl.join(first, second), (0, 2, 1))
    return gl.convert_layout(gl.reshape(both, (64, 64)), A, assert_trivial=True)


@gluon.jit
def _fill_table(table, table_ptr, ready, WG: gl.constexpr):  # type: ignore[no-untyped-def]
    """A warpgroup's quarter of the table; then wait for the others."""
    threads: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    byte = WG * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, threads))
    pairs = gl.expand_dims(gl.load(table_ptr + byte), 1) + gl.full([64, 32], 0, gl.int32, layout=threads)
    table.slice(WG * 64, 64, dim=0).slice(0, 32, dim=1).store(pairs)
    mbarrier.arrive(ready.index(0), count=1)
    mbarrier.wait(ready.index(0), 0)


@gluon.jit
def _add_inner(  # type: ignore[no-untyped-def]
    sums, sums_buffers, fragment, H: gl.constexpr, B: gl.constexpr, INNER: gl.constexpr, C: gl.constexpr
):
    """The sums of a tile's inner splits, added up in order by the warpgroups of the first one."""
    buffer, ready, free = sums_buffers
    TILE_BLOCKS: gl.constexpr = _WGS // INNER
    if H > 0:
        # The buffer holds the first tile's sums until they are taken.
        mbarrier.wait(free.index(0), 0, pred=fragment > 0)
        buffer.index((H - 1) * TILE_BLOCKS + B).store(sums)
        mbarrier.arrive(ready.index(0), count=1)
    elif INNER > 1:
        mbarrier.wait(ready.index(0), fragment)
        for other in gl.static_range(INNER - 1):
            sums += buffer.index(other * TILE_BLOCKS + B).load(C)
        mbarrier.arrive(free.index(0), count=1)
    return sums


@gluon.jit
def _store_sums(sums, out_ptr, part, row_block, row, num_rows, num_outputs, BLOCK_R: gl.constexpr, L: gl.constexpr):  # type: ignore[no-untyped-def]
    """[64, BLOCK_R] of partial sum `part` -> out [S, R, N]"""
    IS_HALF: gl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth == 16
    # Neighbouring threads hold neighbouring outputs: 32 bytes of float32, but half a sector of 16-bit ones.
    THREADS: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]) if IS_HALF else L
    values = gl.convert_layout(sums.to(out_ptr.dtype.element_ty), THREADS)
    output = row_block * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, THREADS))
    row += gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, THREADS))
    start = (part * num_rows + row).to(gl.int64) * num_outputs
    inside = gl.expand_dims(row < num_rows, 0) & gl.expand_dims(output < num_outputs, 1)
    gl.store(out_ptr + gl.expand_dims(start, 0) + gl.expand_dims(output, 1), values, mask=inside)


@gluon.jit
def _multiply(  # type: ignore[no-untyped-def]
    memory, shared, job, WG: gl.constexpr, BLOCK_R: gl.constexpr, INNER: gl.constexpr, WEIGHT_STAGES: gl.constexpr,
    X_GROUPS: gl.constexpr, X_STAGES: gl.constexpr, TABLE_WIDTH: gl.constexpr, TABLE_OFFSET: gl.constexpr,
):  # fmt: skip
    """What warpgroup WG does: its row block of each tile of the program, its share of the tile's inputs."""
    TILE_BLOCKS: gl.constexpr = _WGS // INNER
    H: gl.constexpr = WG // TILE_BLOCKS
    B: gl.constexpr = WG % TILE_BLOCKS
    C: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_R, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    words_ptr, table_ptr, out_ptr = memory
    weight_rings, x_rings, tables, sums_buffers = shared
    first_part, path, num_input_blocks, row, num_rows, num_outputs = job
    words_ring, scales_ring, words_full, words_empty = weight_rings
    x_ring, x_full, x_empty = x_rings
    table, table_ready = tables
    first_tile, first_input, first_steps, second_steps = path
    num_steps = first_steps + second_steps
    if WEIGHT_STAGES == 0:  # on their way while the table is filled
        block = (first_tile * TILE_BLOCKS + B) * num_input_blocks + first_input + H * first_steps
        words, low, high = _block_from_memory(words_ptr, block, A)
    _fill_table(table, table_ptr, table_ready, WG)
    if WEIGHT_STAGES > 0:
        mbarrier.wait(words_full.index(0), 0)
        words, low, high = _block_from_ring(words_ring.index(WG), scales_ring.index(WG), A)
        mbarrier.arrive(words_empty.index(0), count=1)
    lane_id = gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], gl.int32, is_pure=True, pack=1)
    lane = gl.full([64, 32], 0, gl.int32, layout=A) + lane_id * 4
    weights = _decode(words, lane, low, high, 0, TABLE_WIDTH, TABLE_OFFSET, A)
    x_stage = 0
    x_phase = 0
    w_stage = 0
    w_phase = 0
    for fragment in range(gl.where(second_steps > 0, 2, 1)):
        # Not carried from one to the other: the compiler (Triton 3.6) would begin both at the first one's constant.
        first_step = gl.where(fragment == 0, 0, first_steps)
        end_step = gl.where(fragment == 0, first_steps, num_steps)
        sums = gl.full([64, BLOCK_R], 0.0, gl.float32, layout=C)
        for step in range(first_step, end_step):
            if WEIGHT_STAGES == 0:
                following = gl.minimum(step + 1, num_steps - 1)
                tile, input_block = _place(following, path, H)
                block = (tile * TILE_BLOCKS + B) * num_input_blocks + input_block
                next_words, next_low, next_high = _block_from_memory(words_ptr, block, A)
            for group in gl.static_range(4):
                if group % X_GROUPS == 0:
                    mbarrier.wait(x_full.index(H * X_STAGES + x_stage), x_phase)
                x_group = x_ring.index(H * X_STAGES + x_stage).slice((group % X_GROUPS) * 64, 64, dim=1)
                sums = warpgroup_mma(weights, x_group.permute((1, 0)), sums, is_async=True)
                if group < 3:
                    weights = _decode(words, lane, low, high, group + 1, TABLE_WIDTH, TABLE_OFFSET, A)
                else:
                    if WEIGHT_STAGES == 0:
                        words, low, high = next_words, next_low, next_high
                    else:
                        w_stage += 1
                        if w_stage == WEIGHT_STAGES:
                            w_stage = 0
                            w_phase ^= 1
                        more = step + 1 < num_steps
                        slot = w_stage * _WGS + WG
                        mbarrier.wait(words_full.index(w_stage), w_phase, pred=more)
                        # After the last block: an old one, decoded for nothing.
                        words, low, high = _block_from_ring(words_ring.index(slot), scales_ring.index(slot), A)
                        mbarrier.arrive(words_empty.index(w_stage), count=1, pred=more)
                    weights = _decode(words, lane, low, high, 0, TABLE_WIDTH, TABLE_OFFSET, A)
                sums = warpgroup_mma_wait(0, deps=[sums])
                if group % X_GROUPS == X_GROUPS - 1:
                    mbarrier.arrive(x_empty.index(H * X_STAGES + x_stage), count=1)
                    x_stage += 1
                    if x_stage == X_STAGES:
                        x_stage = 0
                        x_phase ^= 1
        sums = _add_inner(sums, sums_buffers, fragment, H, B, INNER, C)
        if H == 0:
            part = gl.where(fragment == 0, first_part, 0)  # a second tile begins here, with its first part
            row_block = (first_tile + fragment) * TILE_BLOCKS + B
            _store_sums(sums, out_ptr, part, row_block, row, num_rows, num_outputs, BLOCK_R, C)


@gluon.jit(do_not_specialize=["num_rows", "num_input_blocks", "span"])
def _nf4_linear_kernel(  # type: ignore[no-untyped-def]
    x, words, scales, words_ptr, table_ptr, out_ptr, num_rows, num_outputs, num_input_blocks, span,
    BLOCK_R: gl.constexpr, INNER: gl.constexpr, WEIGHT_STAGES: gl.constexpr, X_GROUPS: gl.constexpr,
    X_STAGES: gl.constexpr, TABLE_WIDTH: gl.constexpr, TABLE_OFFSET: gl.constexpr, DEPENDENT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    TILE_BLOCKS: gl.constexpr = _WGS // INNER
    if DEPENDENT:
        gl.inline_asm_elementwise(_LET_NEXT_KERNEL_START, "=r", [], gl.int32, is_pure=False, pack=1)
    start = gl.program_id(0) * span
    row = gl.program_id(1) * BLOCK_R
    first_tile = start // num_input_blocks
    first_input = start % num_input_blocks
    first_part = gl.program_id(0) - first_tile * num_input_blocks // span
    first_steps = gl.minimum(span, num_input_blocks - first_input) // INNER
    second_steps = span // INNER - first_steps

    table = gl.allocate_shared_memory(gl.int32, [256, TABLE_WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    x_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [X_STAGES * INNER, BLOCK_R, X_GROUPS * 64], x_layout)
    # A ring that is not used is as small as its swizzle allows.
    SLOTS: gl.constexpr = WEIGHT_STAGES * _WGS if WEIGHT_STAGES > 0 else 1
    HEIGHT: gl.constexpr = 64 if WEIGHT_STAGES > 0 else 8
    words_ring = gl.allocate_shared_memory(gl.int32, [SLOTS, HEIGHT, 32], gl.NVMMASharedLayout(128, 32, 2))
    scales_ring = gl.allocate_shared_memory(gl.int32, [SLOTS, 8, 16], gl.NVMMASharedLayout(64, 32, 2))
    SUMS: gl.constexpr = _WGS - TILE_BLOCKS if INNER > 1 else 1
    SUMS_HEIGHT: gl.constexpr = 64 if INNER > 1 else 1
    sums_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, BLOCK_R // 8, [1, 0])
    sums_buffer = gl.allocate_shared_memory(gl.float32, [SUMS, SUMS_HEIGHT, BLOCK_R], sums_layout)

    W_STAGES: gl.constexpr = WEIGHT_STAGES if WEIGHT_STAGES > 0 else 1
    words_full = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    words_empty = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES * INNER, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_STAGES * INNER, 1], mbarrier.MBarrierLayout())
    table_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    sums_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    sums_free = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(W_STAGES):
        mbarrier.init(words_full.index(slot), count=1)
        mbarrier.init(words_empty.index(slot), count=_WGS)
    for slot in gl.static_range(X_STAGES * INNER):
        mbarrier.init(x_full.index(slot), count=1)
        mbarrier.init(x_empty.index(slot), count=TILE_BLOCKS)
    mbarrier.init(table_ready.index(0), count=_WGS)
    mbarrier.init(sums_ready.index(0), count=SUMS)
    mbarrier.init(sums_free.index(0), count=TILE_BLOCKS)
    fence_async_shared()
    gl.thread_barrier()

    path = (first_tile, first_input, first_steps, second_steps)
    weight_rings = (words_ring, scales_ring, words_full, words_empty)
    x_rings = (x_ring, x_full, x_empty)
    memory = (words_ptr, table_ptr, out_ptr)
    shared = (weight_rings, x_rings, (table, table_ready), (sums_buffer, sums_ready, sums_free))
    job = (first_part, path, num_input_blocks, row, num_rows, num_outputs)
    gl.warp_specialize(
        [
            (_multiply, (memory, shared, job, 0, BLOCK_R, INNER, WEIGHT_STAGES, X_GROUPS, X_STAGES, TABLE_WIDTH,
                         TABLE_OFFSET)),
            (_multiply, (memory, shared, job, 1, BLOCK_R, INNER, WEIGHT_STAGES, X_GROUPS, X_STAGES, TABLE_WIDTH,
                         TABLE_OFFSET)),
            (_multiply, (memory, shared, job, 2, BLOCK_R, INNER, WEIGHT_STAGES, X_GROUPS, X_STAGES, TABLE_WIDTH,
                         TABLE_OFFSET)),
            (_multiply, (memory, shared, job, 3, BLOCK_R, INNER, WEIGHT_STAGES, X_GROUPS, X_STAGES, TABLE_WIDTH,
                         TABLE_OFFSET)),
            (_load_x, (x, x_rings, row, path, BLOCK_R, INNER, X_GROUPS, X_STAGES, DEPENDENT)),
            (_load_weights, (words, scales, weight_rings, num_input_blocks, path, INNER, WEIGHT_STAGES)),
        ],
        [4, 4, 4, 1, 1],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
    table._keep_alive()  # or other buffers would share its place: the look-ups are no uses that the compiler sees


def launch(
    x: Tensor, weight: PackedNf4, plan: Nf4Plan, partials: Tensor, tile: HopperTile, *, dependent: bool = True
) -> None:
    """x: [R, K] bfloat16; partials: [S, R, N] float32, or bfloat16 where S = 1, overwritten. Contiguous, on one GPU.

    dependent: start before the kernel in front has ended (programmatic dependent launch). Raises `ModelError` on
    anything but a GPU of compute capability 9.0.
    """
    check_device(x.device)
    inner = plan.inner_splits
    table_offset = tile.table_offset(inner)
    x_layout, words_layout = gl.NVMMASharedLayout(128, 16, 2), gl.NVMMASharedLayout(128, 32, 2)
    scales_layout = gl.NVMMASharedLayout(64, 32, 2)
    grid = (plan.num_programs, triton.cdiv(x.shape[0], tile.block_r))
    kernel = _nf4_linear_kernel[grid](
        TensorDescriptor.from_tensor(x, [tile.block_r, tile.x_groups * GROUP], x_layout),
        TensorDescriptor.from_tensor(weight.words.view(-1, 32), [64, 32], words_layout),
        TensorDescriptor.from_tensor(weight.words.view(-1, 16), [8, 16], scales_layout),
        weight.words, weight.table, partials, x.shape[0], weight.out_features, plan.num_input_blocks, plan.span,
        BLOCK_R=tile.block_r, INNER=inner, WEIGHT_STAGES=tile.weight_stages, X_GROUPS=tile.x_groups,
        X_STAGES=tile.x_stages, TABLE_WIDTH=tile.table_width, TABLE_OFFSET=table_offset, DEPENDENT=dependent,
        CONSUMER_REGISTERS=_CONSUMER_REGISTERS, LOADER_REGISTERS=_LOADER_REGISTERS, num_warps=4, launch_pdl=dependent,
    )  # fmt: skip
    _check_table(kernel, table_offset)


def check_device(device: torch.device) -> None:
    """Raises `ModelError` where the kernel cannot run."""
    if device.type != "cuda":
        raise ModelError(f"the Hopper NF4 kernel needs a GPU, not {device.type}: use the portable one")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        raise ModelError(
            f"the Hopper NF4 kernel needs compute capability 9.0, {torch.cuda.get_device_name(device)} has "
            f"{major}.{minor}: use the portable one"
        )


@cache
def _check_table(kernel: Any, expected: int) -> None:
    """The look-ups' address is ours, the table's place the compiler's: they must agree."""
    found = table_offsets(kernel.asm["llir"])
    assert found == {expected}, f"the table lies at {sorted(found)} of shared memory, its look-ups read at {expected}"


def table_offsets(llir: str) -> set[int]:
    """Where the table is stored, as read from LLVM's code: the kernel's only stores of four words."""
    base = re.compile(
        r"= getelementptr inbounds nuw i8, ptr addrspace\(3\) "
        r"(?:getelementptr \(i8, ptr addrspace\(3\) )?@global_smem(?:, i\d+ (\d+)\))?"
    )
    offset, found = -1, set()
    for line in llir.splitlines():
        if match := base.search(line):
            offset = int(match.group(1) or 0)
        if "store <4 x i32>" in line:
            found.add(offset)
    return found
