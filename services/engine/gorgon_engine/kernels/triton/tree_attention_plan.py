"""How a tree attention call is cut into programs: everything about it that is fixed before a CUDA graph is captured.

The prefix of a sequence is cut into *units* by absolute position, whatever the tree, the batch or the length: eight
units of `unit` positions, four of twice as many, then units of four times as many. A unit is summed block by block,
units are folded in order. Because the cut is the same for every row, so is the order of every sum.

Letters: B sequences, N nodes, H query heads, G KV heads, D head dimension, U units, W words a node.
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from gorgon_protocol.errors import BadRequestError, ModelError

HEAD_DIMS = (64, 128)
MAX_NODES = 128  # two 64-bit words
BLOCK_COLUMNS = 64  # positions of one product
_DTYPES = (torch.bfloat16, torch.float16)
_FULL_GPU = 192  # programs that keep 100 to 140 multiprocessors busy, two on each where there are enough


@dataclass(frozen=True, slots=True)
class TreeAttentionPlan:
    """The static part of a call. Made by `exact` or `fast`; `dataclasses.replace` varies it.

    A row's bits depend on `unit`, `growing` and `tail` (and on the shape of the model), on nothing else here.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int  # B, at most
    num_nodes: int  # N, at most
    max_length: int  # committed positions of a sequence, at most: sizes the grid
    unit: int  # positions, a multiple of 64
    growing: bool  # larger units for later positions; else all of one size
    tail: (
        int  # a row's last positions, which are summed in logical order: a power of two above the deepest node's depth
    )
    whole: bool = False  # one program folds all units of a sequence; else one program a unit, folded behind
    block_rows: int = 64  # rows (nodes x query heads of a KV head) of one product
    num_warps: int = 4
    num_stages: int = 3
    fold_warps: int = 1
    tensor_descriptors: bool = False  # keys and values through TMA: compute capability 9 and above
    early_fold: bool = False  # kernels start before those in front have ended (`early_launch`)

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise ModelError(
                f"tree attention has no kernel for a head dim of {self.head_dim}: use the torch attention, or a model "
                f"with {' or '.join(map(str, HEAD_DIMS))}"
            )
        if not 1 <= self.num_nodes <= MAX_NODES:
            raise BadRequestError(f"a tree has 1 to {MAX_NODES} nodes, not {self.num_nodes}: lower max_nodes")
        assert self.num_heads % self.num_kv_heads == 0, (self.num_heads, self.num_kv_heads)
        assert self.unit > 0, self.unit
        assert self.unit % BLOCK_COLUMNS == 0, self.unit
        assert self.tail >= 16, self.tail
        assert self.tail & (self.tail - 1) == 0, self.tail
        assert self.block_rows in (16, 32, 64, 128), self.block_rows

    @classmethod
    def exact(
        cls, *, num_heads: int, num_kv_heads: int, head_dim: int, batch: int, num_nodes: int, max_length: int,
        max_depth: int, device: torch.device, unit: int = 256,
    ) -> "TreeAttentionPlan":  # fmt: skip
        """Row-invariant: the same bits for a token in a tree of any shape and alone, in any batch, at any `max_length`,
        as long as `max_depth` (of a node below the root) and `unit` are those of every other call.

        What it costs: 64 rows a product even for one node (whose step waits for memory anyway), and sums of each unit
        (4 (D + 2) bytes for every row, head and unit) instead of few large ones.
        """
        base = cls(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, batch=batch, num_nodes=num_nodes,
            max_length=max_length, unit=unit, growing=True, tail=tail_length(max_depth), **_device_features(device),
        )  # fmt: skip
        # Bits do not depend on it: fold at once where there is work enough without cutting sequences.
        return replace(base, whole=base.num_tiles * num_kv_heads * batch >= _FULL_GPU)

    @classmethod
    def fast(
        cls, *, num_heads: int, num_kv_heads: int, head_dim: int, batch: int, num_nodes: int, max_length: int,
        max_depth: int, device: torch.device,
    ) -> "TreeAttentionPlan":  # fmt: skip
        """Cut for this batch and tree size alone: the last bits depend on both."""
        rows = num_nodes * (num_heads // num_kv_heads)
        block_rows = 16 if rows <= 16 else 64
        groups = triton.cdiv(rows, block_rows) * num_kv_heads * batch
        parts = max(1, round(264 / groups))
        unit = max(BLOCK_COLUMNS, triton.cdiv(triton.cdiv(max_length, parts), BLOCK_COLUMNS) * BLOCK_COLUMNS)
        return cls(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, batch=batch, num_nodes=num_nodes,
            max_length=max_length, unit=unit, growing=False, block_rows=block_rows,
            tail=tail_length(max_depth), **_device_features(device),
        )  # fmt: skip

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_tiles(self) -> int:
        """Row blocks of a sequence and KV head."""
        return triton.cdiv(self.num_nodes * self.group, self.block_rows)

    @property
    def num_units(self) -> int:
        """Of a sequence of `max_length` committed positions, at least one."""
        last = max(self.max_length - 1, 0)
        if not self.growing or last < 8 * self.unit:
            return last // self.unit + 1
        if last < 16 * self.unit:
            return 8 + (last - 8 * self.unit) // (2 * self.unit) + 1
        return 12 + (last - 16 * self.unit) // (4 * self.unit) + 1

    @property
    def num_parts(self) -> int:
        """Partial sums of a row that lie in the workspace."""
        return 1 if self.whole else self.num_units

    @property
    def num_partial_rows(self) -> int:
        return self.batch * self.num_nodes * self.num_heads * self.num_parts

    def workspace(self, device: torch.device) -> "TreeAttentionWorkspace":
        return TreeAttentionWorkspace.of([self], device)


@dataclass(frozen=True, slots=True)
class TreeAttentionWorkspace:
    """Partial sums between the two kernels. One serves all layers and plans, one call at a time."""

    outs: Tensor  # [rows * D] float32, weighted by 2^(score - best), not normalised
    bests: Tensor  # [rows] float32, base-2 scores
    totals: Tensor  # [rows] float32

    @classmethod
    def of(cls, plans: list[TreeAttentionPlan], device: torch.device) -> "TreeAttentionWorkspace":
        """Room for any of the plans, allocated once."""
        rows = max(plan.num_partial_rows for plan in plans)
        values = max(plan.num_partial_rows * plan.head_dim for plan in plans)
        return cls(
            outs=torch.empty(values, dtype=torch.float32, device=device),
            bests=torch.empty(rows, dtype=torch.float32, device=device),
            totals=torch.empty(rows, dtype=torch.float32, device=device),
        )


def tail_length(max_depth: int) -> int:
    """Positions of a row's tail where no node stands deeper than `max_depth` below the root."""
    return max(16, triton.next_power_of_2(max_depth + 1))


def check_dtype(dtype: torch.dtype) -> None:
    """Raises `ModelError` for what the kernels do not multiply; float32 is for Triton's interpreter alone."""
    if dtype in _DTYPES or (dtype == torch.float32 and triton.knobs.runtime.interpret):
        return
    raise ModelError(f"tree attention runs in bfloat16 or float16, not {dtype}: choose another --dtype")


def pack_tree_mask(mask: Tensor, batch: int) -> Tensor:
    """The boolean TreeMask [B N, B N] of a flattened batch as ancestor words [B, N, W] int64.

    Bit j % 64 of word j // 64 = node j of the same sequence is seen. Raises `BadRequestError` where a node sees another
    sequence's; that looks at values on the host, so it does not belong into a CUDA graph.
    """
    rows = mask.shape[0]
    if mask.shape != (rows, rows) or mask.dtype != torch.bool or rows % batch:
        raise BadRequestError(f"a TreeMask of {batch} sequences is boolean [B N, B N], not {tuple(mask.shape)}")
    nodes = rows // batch
    blocks = mask.view(batch, nodes, batch, nodes)
    own = torch.eye(batch, dtype=torch.bool, device=mask.device)[:, None, :, None]
    if bool((blocks & ~own).any()):
        raise BadRequestError("a TreeMask row sees another sequence's nodes: only its own block may be set")
    diagonal = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [B, N, N]
    words = triton.cdiv(nodes, 64)
    padded = torch.nn.functional.pad(diagonal, (0, words * 64 - nodes)).view(batch, nodes, words, 64)
    bits = torch.ones((), dtype=torch.int64, device=mask.device) << torch.arange(64, device=mask.device)
    return (padded * bits).sum(dim=3)


def _device_features(device: torch.device) -> dict[str, bool]:
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"tensor_descriptors": hopper, "early_fold": hopper}
