"""What an engine needs of a GPU's memory, before it takes it: sums from shapes, and a clear line where they do not fit.

The KV cache is counted to the byte, and so are weights. What the passes and the graphs need is bounded from above: the
widest pass of each kind, and as many graphs as there are sizes of steps.

Letters: L layers, S slots, R rows of a pass, H query heads, G KV heads, D head dimension, C hidden size, I intermediate
size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from gorgon_engine.buckets import Buckets
from gorgon_engine.models.config import BackboneConfig
from gorgon_protocol.errors import BadRequestError, ModelError

GIB = 1 << 30
# That an engine keeps: one of a large model holds a few hundred kernels in some megabytes of the device's memory.
MAX_GRAPHS = 256
_MAX_SLOTS = 4096
_NF4_BYTES = 0.5 + 4 / 64  # a weight as it is saved, with its float32 scale
_PACKED_NF4_BYTES = 0.5 + 2 / 64  # as the kernels read it
_MAX_PARTIALS = 4  # sums that a product for few rows leaves; 8 are allowed, of small matrices
_GRAPH_NODES_A_LAYER, _OTHER_GRAPH_NODES = 10, 150
_GRAPH_NODE_BYTES = 8 << 10
_SAMPLING_BYTES = 24  # a token of the vocabulary, where one filters: float32 logits, sorted ones, their order
_RESERVE_BYTES = 256 << 20  # what the library allocates for itself, and pieces too small to use
_CUT_ROWS = 192 * 64  # rows x query heads up to which a pass cuts sequences between programs


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What a GPU's memory is taken by, beside the weights."""

    config: BackboneConfig
    num_slots: int  # sequences at once
    context: int  # positions of each
    max_scratch: int  # rows behind them
    max_nodes: int  # of a tree
    chunk_size: int  # rows of prompts in one pass
    element_size: int  # bytes of an activation, a key, a value
    graphs: bool

    @property
    def num_positions(self) -> int:
        return self.context + self.max_scratch

    @property
    def buckets(self) -> Buckets:
        return Buckets.of(num_slots=self.num_slots, max_nodes=self.max_nodes, num_positions=self.num_positions)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes."""

    kv_cache: int
    workspaces: int
    graphs: int

    @property
    def total(self) -> int:
        return self.kv_cache + self.workspaces + self.graphs


def plan_memory(shape: EngineShape) -> MemoryPlan:
    return MemoryPlan(kv_cache=_kv_bytes(shape), workspaces=_workspace_bytes(shape), graphs=_graph_bytes(shape))


def check_engine_fits(shape: EngineShape, free_bytes: int) -> MemoryPlan:
    """The plan of an engine that fits into so many bytes. Raises `BadRequestError` that says what needs how much, and
    what lowers it."""
    plan = plan_memory(shape)
    if plan.total <= free_bytes:
        return plan
    slots = largest_num_slots(shape, free_bytes)
    if slots:
        remedy = f"{slots} slots fit"
    elif context := _largest(
        lambda size: plan_memory(replace(shape, num_slots=1, context=size)).total <= free_bytes, shape.context
    ):
        remedy = f"one slot of {context} positions fits: lower the context"
    else:
        remedy = "not even one slot does: lower chunk_size and max_nodes, or take a larger GPU"
    raise BadRequestError(
        f"{shape.num_slots} slots of {shape.context} positions do not fit on the GPU: the KV cache needs "
        f"{_gib(plan.kv_cache)}, the passes {_gib(plan.workspaces)}, the graphs {_gib(plan.graphs)}, and "
        f"{_gib(free_bytes)} are free beside the weights; {remedy}"
    )


def largest_num_slots(shape: EngineShape, free_bytes: int) -> int:
    """The most slots, of the shape's context, that fit into so many bytes; 0 where not even one does."""
    return _largest(lambda count: plan_memory(replace(shape, num_slots=count)).total <= free_bytes, _MAX_SLOTS)


def weight_bytes(config: BackboneConfig, *, nf4: bool, element_size: int) -> int:
    """Of a backbone as it is while it loads: in NF4 as saved and as packed, both at once."""
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim  # of q, k and v
    matrices = (  # [out, in]
        (width, config.hidden_size),
        (config.hidden_size, config.num_heads * config.head_dim),
        (2 * config.intermediate_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
    )
    if nf4:
        a_layer = sum(
            out * size * _NF4_BYTES + _padded(out) * _padded(size) * _PACKED_NF4_BYTES for out, size in matrices
        )
    else:
        a_layer = sum(out * size for out, size in matrices) * element_size
    ends = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return int(config.num_layers * a_layer) + ends * element_size


def _padded(size: int) -> int:
    """As `nf4_packing` fills matrices up."""
    return -(-size // 256) * 256


def check_weights_fit(config: BackboneConfig, *, nf4: bool, element_size: int, free_bytes: int) -> None:
    """Raises `ModelError` where a backbone does not even load."""
    needed = weight_bytes(config, nf4=nf4, element_size=element_size)
    if needed > free_bytes:
        remedy = "take a smaller model or a larger GPU"
        if not nf4:
            remedy = f"load it in NF4, or {remedy}"
        raise ModelError(
            f"the model needs {_gib(needed)} while it loads, and {_gib(free_bytes)} are free on the GPU: {remedy}"
        )


def free_bytes(device: torch.device) -> int:
    """What a process may still take of a GPU's memory: what is free there, and what torch holds without using it; less
    where torch was told to keep below a share of it."""
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())  # one of torch's calls asks for a number
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - torch.cuda.memory_allocated(device)
    return int(min(free + held, allowed))


def _kv_bytes(shape: EngineShape) -> int:
    config = shape.config
    # The rows that fill up the batches of graphs have a slot of their own.
    slots = shape.num_slots + (1 if shape.graphs and shape.num_slots > 1 else 0)
    # Heads may remember as much as one layer more.
    a_position = 2 * (config.num_layers + 1) * config.num_kv_heads * config.head_dim * shape.element_size
    tokens = 8  # of the history
    return slots * shape.num_positions * (a_position + tokens)


def _workspace_bytes(shape: EngineShape) -> int:
    config = shape.config
    trees = shape.buckets.batch(shape.num_slots) * shape.buckets.width(shape.max_nodes)
    rows = max(trees, shape.chunk_size)
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    # Of a product and of the one behind it.
    sums = 4 * _MAX_PARTIALS * (width + 2 * config.intermediate_size)
    between = config.hidden_size + 3 * config.num_heads * config.head_dim + config.intermediate_size
    activations = rows * (sums + between * shape.element_size + 4 * config.hidden_size)
    logits = trees * config.vocab_size * shape.element_size + shape.num_slots * config.vocab_size * _SAMPLING_BYTES
    # Rows of a prompt by the hundred are multiplied by weights that are written out.
    written_out = 2 * config.intermediate_size * config.hidden_size * shape.element_size
    tables = 4 * shape.num_positions * config.head_dim
    return activations + _attention_bytes(shape, rows) + logits + written_out + tables + _RESERVE_BYTES


def _attention_bytes(shape: EngineShape, rows: int) -> int:
    """Partial sums of tree attention: one for each unit of the prefix, or one at all in passes of many rows."""
    config = shape.config
    a_sum = 4 * (config.head_dim + 2)
    units = 12 + shape.context // 1024
    row_heads = rows * config.num_heads
    return max(row_heads, min(row_heads, _CUT_ROWS) * units) * a_sum


def _graph_bytes(shape: EngineShape) -> int:
    if not shape.graphs:
        return 0
    buckets = shape.buckets
    sizes = 2 * len(buckets.batches) * len(buckets.widths) * len(buckets.lengths)  # greedy and drawn
    nodes = shape.config.num_layers * _GRAPH_NODES_A_LAYER + _OTHER_GRAPH_NODES
    return min(sizes, MAX_GRAPHS) * nodes * _GRAPH_NODE_BYTES


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 1..most that fits, given that all smaller ones do; 0 for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _gib(num_bytes: int) -> str:
    return f"{max(num_bytes, 0) / GIB:.2f} GiB"
