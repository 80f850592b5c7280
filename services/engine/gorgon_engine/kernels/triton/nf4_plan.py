"""How an NF4 product is cut into programs: by the matrix's shape alone, so that a row's bits are its own.

A program has four warpgroups, and a tile of W is 4 / inner_splits row blocks high: with inner splits, warpgroups share
rows and divide the inputs among them. The blocks of all tiles, tile after tile, stand in one line of units
(tile, input block) that is cut into equal spans, one for each program (Stream-K, 2301.03598, but never by the number of
rows or by what is idle). Where a cut falls inside a tile, the tile's sum is left in parts that the next operator adds
up in order.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache

from gorgon_engine.kernels.triton.nf4_packing import BLOCK_ROWS, BLOCK_WORDS, GROUP, WORDS
from gorgon_protocol.errors import ModelError

WARPGROUPS = 4
MAX_BLOCK_R = 64
SHARED_MEMORY = 232448  # bytes that one program may have on sm_90
_BARRIER_BYTES = 2048  # room for barriers and what the compiler adds
_EXCHANGE_BYTES = 8192  # what it adds where 16-bit sums are written
_MAX_PROGRAMS = 132  # the processors of an H100, one program each
# In blocks of weights read by a program: filling its table and its rings, and one more partial sum of each output,
# written and added up again.
_WAVE_COST = 8
_PARTIAL_COST = 2


@dataclass(frozen=True, slots=True)
class Nf4Plan:
    num_row_blocks: int
    num_input_blocks: int
    inner_splits: int  # of a tile's inputs, between the warpgroups of a program
    num_programs: int

    def __post_init__(self) -> None:
        assert WARPGROUPS % self.inner_splits == 0
        assert self.num_row_blocks % self.tile_blocks == 0
        assert self.num_units % self.num_programs == 0
        assert self.span <= self.num_input_blocks, "a program sees two tiles at most"
        assert _num_partials(self.span, self.num_input_blocks, self.inner_splits) is not None, self

    @property
    def tile_blocks(self) -> int:
        """Row blocks of a tile."""
        return WARPGROUPS // self.inner_splits

    @property
    def num_units(self) -> int:
        return self.num_row_blocks // self.tile_blocks * self.num_input_blocks

    @property
    def span(self) -> int:
        """Units of a program."""
        return self.num_units // self.num_programs

    @property
    def num_partials(self) -> int:
        """Partial sums of each output."""
        count = _num_partials(self.span, self.num_input_blocks, self.inner_splits)
        assert count is not None
        return count

    @property
    def _cost(self) -> tuple[int, int]:
        waves = math.ceil(self.num_programs / _MAX_PROGRAMS)
        blocks = waves * (self.span * self.tile_blocks + _WAVE_COST)
        return blocks + _PARTIAL_COST * self.num_partials, self.inner_splits


def _num_partials(span: int, num_input_blocks: int, inner_splits: int) -> int | None:
    """Parts into which spans cut a tile. None where tiles differ in it, or where a part cannot be divided evenly."""
    counts = set()
    for tile in range(span // math.gcd(span, num_input_blocks)):  # after these the pattern repeats
        start, end = tile * num_input_blocks, (tile + 1) * num_input_blocks
        cuts = [start, *range((start // span + 1) * span, end, span), end]
        if any((right - left) % inner_splits for left, right in itertools.pairwise(cuts)):
            return None
        counts.add(len(cuts) - 1)
    return counts.pop() if len(counts) == 1 else None


@cache
def plan_nf4(
    num_row_blocks: int, num_input_blocks: int, max_inner_splits: int = WARPGROUPS, max_partials: int = 8
) -> Nf4Plan:
    """The plan that reads the fewest blocks of W in its busiest program, partial sums weighed in.

    num_row_blocks: a multiple of four. max_inner_splits: 1, 2 or 4; more need more shared memory for x (4 leave none
    for weights beside 64 rows). max_partials = 1 keeps every sum whole.
    """
    return min(nf4_plans(num_row_blocks, num_input_blocks, max_inner_splits, max_partials), key=lambda plan: plan._cost)


def nf4_plans(
    num_row_blocks: int, num_input_blocks: int, max_inner_splits: int = WARPGROUPS, max_partials: int = 8
) -> list[Nf4Plan]:
    """Every plan of a matrix within the limits; whole tiles are always one."""
    plans = []
    for inner_splits in (1, 2, 4):
        if inner_splits > max_inner_splits:
            break
        num_units = num_row_blocks * inner_splits // WARPGROUPS * num_input_blocks
        for span in range(1, num_input_blocks + 1):
            if num_units % span:
                continue
            parts = _num_partials(span, num_input_blocks, inner_splits)
            if parts is not None and parts <= max_partials:
                plans.append(Nf4Plan(num_row_blocks, num_input_blocks, inner_splits, num_units // span))
    return plans


@dataclass(frozen=True, slots=True)
class HopperTile:
    """How a program of the Hopper kernel is laid out. None of it changes a bit of the result."""

    block_r: int  # rows of x in the tensor cores' tile: 8, 16, 32 or 64
    weight_stages: int  # blocks of W in shared memory for each warpgroup; 0: they go straight to registers, one ahead
    x_groups: int  # groups of 64 inputs in a stage of x: 2 or 4
    x_stages: int
    table_width: int  # words a byte's row of the table spans: 64 (one instruction less a look-up) or 32

    @property
    def _table_bytes(self) -> int:
        return self.table_width * 256 * 4

    def _other_bytes(self, inner_splits: int) -> tuple[int, ...]:
        """Of the words' ring, of the scales' and of x, and of the sums between warpgroups."""
        slots = self.weight_stages * WARPGROUPS
        return (
            slots * WORDS * 4,
            slots * (BLOCK_WORDS - WORDS) * 4,
            self.x_stages * inner_splits * self.block_r * self.x_groups * GROUP * 2,
            (WARPGROUPS - WARPGROUPS // inner_splits) * BLOCK_ROWS * self.block_r * 4,
        )

    def num_bytes(self, inner_splits: int, *, half_sums: bool = False) -> int:
        """Of shared memory. half_sums: the sums leave in 16 bits, and change places between threads before."""
        exchange = _EXCHANGE_BYTES if half_sums else 0
        return self._table_bytes + sum(self._other_bytes(inner_splits)) + exchange + _BARRIER_BYTES

    def table_offset(self, inner_splits: int) -> int:
        """Where the compiler places the table: behind the buffers that are larger."""
        return sum(size for size in self._other_bytes(inner_splits) if size > self._table_bytes)


def choose_tile(num_rows: int, inner_splits: int, *, shared_weights: bool, half_sums: bool = False) -> HopperTile:
    """A tile for so many rows that fits in shared memory.

    shared_weights: W through a ring in shared memory, some blocks ahead, or one block ahead in registers;
    half_sums: the sums leave in 16 bits. Raises `ModelError` where nothing fits.
    """
    block_r = next(size for size in (8, 16, 32, 64) if num_rows <= size or size == MAX_BLOCK_R)
    rings = ((3, 64), (2, 64), (3, 32), (2, 32)) if shared_weights else ((0, 64), (0, 32))
    for weight_stages, table_width in rings:
        for x_groups, x_stages in ((4, 4), (4, 3), (4, 2), (2, 4), (2, 3), (2, 2)):
            tile = HopperTile(block_r, weight_stages, x_groups, x_stages, table_width)
            if tile.num_bytes(inner_splits, half_sums=half_sums) <= SHARED_MEMORY:
                return tile
    raise ModelError(
        f"{block_r} rows with {inner_splits} inner splits do not fit in a processor's shared memory: "
        "plan the NF4 product with fewer"
    )
