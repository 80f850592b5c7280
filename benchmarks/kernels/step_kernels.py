"""The kernels around the forward pass on a GPU: are they right, and what do they take beside tensor operations?

    python benchmarks/kernels/step_kernels.py                  # checks and the table, about a minute
    python benchmarks/kernels/step_kernels.py --only draw      # one kernel: lookup, merge, flatten, draw, walk, commit,
                                                               # top

Shapes of Llama-3-8B: vocabulary 128256, 32 layers of 8 KV heads of 128, hidden size 4096, bf16. Every case is checked
first, on fresh random inputs, against the tensor operations that it replaces: equal to the bit, but for drawn tokens
(near-ties of perturbed logits may fall the other way) and log-probabilities (the order of a sum). Times are medians of
CUDA-graph replays of many calls, each of which reads other inputs: logits out of memory, not out of the L2 cache. The
tensor operations stand in a graph too: what they lose is launches and passes, not Python.

The column `expected` was written down before the first measurement on an H100: launches at 1.5 to 2.5 us of latency,
3.0 TB/s, some 25 integer and 50 float32 operations a drawn token.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon_engine.acceptance import Acceptance
from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.kernels import dispatch
from gorgon_engine.kernels.cpu.drafting import reference as top_reference
from gorgon_engine.kernels.triton import accept_walk
from gorgon_engine.kernels.triton.gumbel_argmax import draw_behind_nodes
from gorgon_engine.kernels.triton.top_log_probs import top_log_probs
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.random import gumbel_noise
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_engine.tree.tree import MergedCandidates, flatten, flatten_reference, merge_candidates, merge_reference

VOCAB_SIZE = 128256
HIDDEN_SIZE = 4096
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
MAX_DEPTH = 8
CALLS = 24  # of a graph
COPIES = 4  # of the inputs

Call = Callable[[int], object]  # of a copy of the inputs


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    kernel: str
    size: str
    expected: float  # microseconds
    ours: Call
    theirs: Call
    check: Callable[[], None]  # raises AssertionError


def tensors(value: object) -> list[Tensor]:
    """The tensors of a result, in order."""
    fields = getattr(value, "__slots__", None) or getattr(value, "_fields", ())
    parts = [getattr(value, name) for name in fields] if fields else [value]
    return [part for part in parts if isinstance(part, Tensor)]


def assert_equal(got: object, want: object) -> None:
    for ours, theirs in zip(tensors(got), tensors(want), strict=True):
        assert torch.equal(ours, theirs), f"{ours}\nnot\n{theirs}"


def same(ours: Call, theirs: Call) -> Callable[[], None]:
    """The check of what is equal to the bit."""

    def check() -> None:
        for copy in range(COPIES):
            assert_equal(ours(copy), theirs(copy))

    return check


def lookups(device: torch.device) -> Iterator[Case]:
    for batch, length, expected in ((1, 512, 3.0), (1, 2048, 3.5), (1, 8192, 5.0), (8, 2048, 3.5), (32, 8192, 6.0)):
        # Skewed tokens: short matches everywhere, as in a text.
        shape = (COPIES, batch, length)
        histories = (torch.rand(shape, device=device) ** 4 * 2000).long()
        histories[:, :, length // 2 :][:, :, : length // 4] = histories[:, :, : length // 4]
        lengths = torch.full((batch,), length - 3, device=device)
        drafter = NgramDrafter(device=device)

        def context(copy: int, histories: Tensor = histories, lengths: Tensor = lengths) -> DraftContext:
            history = histories[copy]
            return DraftContext(history[:, 0], history[:, :1], history, lengths, lengths)

        def ours(
            copy: int, context: Callable[[int], DraftContext] = context, drafter: NgramDrafter = drafter
        ) -> object:
            return drafter.propose(context(copy), 48)

        def theirs(
            copy: int, context: Callable[[int], DraftContext] = context, drafter: NgramDrafter = drafter
        ) -> object:
            return drafter.propose_reference(context(copy), 4, 12)

        yield Case("lookup", f"{batch} x {length}", expected, ours, theirs, same(ours, theirs))


def random_forest(batch: int, count: int, device: torch.device) -> CandidateTree:
    """Parents first; half of the tokens are one of three, so that forests share paths."""
    parents = (torch.rand(batch, count) * (torch.arange(count) + 1)).long() - 1
    log_probs = torch.empty(batch, count)
    for node in range(count):
        above = log_probs.gather(1, parents[:, node].clamp(min=0)[:, None])[:, 0] if node else torch.zeros(batch)
        log_probs[:, node] = torch.where(parents[:, node] < 0, 0.0, above) - torch.rand(batch)
    tokens = torch.where(torch.rand(batch, count) < 0.5, torch.randint(3, (batch, count)), torch.randint(99, (count,)))
    ranks = torch.randint(8, (batch, count))
    return CandidateTree(tokens.to(device), parents.to(device), log_probs.to(device), ranks.to(device), source="random")


def merges(device: torch.device) -> Iterator[Case]:
    sizes = ((1, (31, 48), 32, 5.0), (1, (63, 48), 64, 5.5), (1, (63,), 64, 4.0), (8, (63, 48), 64, 5.5),
             (32, (64, 64, 64), 128, 9.0))  # fmt: skip
    for batch, counts, max_nodes, expected in sizes:
        copies = [[random_forest(batch, count, device) for count in counts] for _ in range(COPIES)]

        def ours(copy: int, copies: list[list[CandidateTree]] = copies, max_nodes: int = max_nodes) -> object:
            return merge_candidates(copies[copy], max_nodes=max_nodes, max_depth=MAX_DEPTH)

        def theirs(copy: int, copies: list[list[CandidateTree]] = copies, max_nodes: int = max_nodes) -> object:
            return merge_reference(copies[copy], max_nodes=max_nodes, max_depth=MAX_DEPTH)

        size = f"{batch} x {' + '.join(map(str, counts))}"
        yield Case("merge", size, expected, ours, theirs, same(ours, theirs))


def merged_candidates(batch: int, width: int, device: torch.device) -> MergedCandidates:
    forest = random_forest(batch, max(2 * width, 8), device)
    return merge_reference([forest], max_nodes=max(width, 2), max_depth=MAX_DEPTH)


def flattens(device: torch.device) -> Iterator[Case]:
    for batch, width, expected in ((1, 1, 2.0), (1, 16, 2.5), (1, 32, 2.5), (1, 64, 4.0), (1, 128, 5.0), (32, 32, 2.5)):
        copies = [merged_candidates(batch, width, device) for _ in range(COPIES)]
        root_tokens = torch.arange(batch, device=device)
        num_nodes = torch.full((batch,), max(1, width - 1), device=device)

        def ours(
            copy: int, copies: list[MergedCandidates] = copies, root_tokens: Tensor = root_tokens,
            num_nodes: Tensor = num_nodes, width: int = width,
        ) -> object:  # fmt: skip
            return flatten(root_tokens, copies[copy], num_nodes, width)

        def theirs(
            copy: int, copies: list[MergedCandidates] = copies, root_tokens: Tensor = root_tokens,
            num_nodes: Tensor = num_nodes, width: int = width,
        ) -> object:  # fmt: skip
            return flatten_reference(root_tokens, copies[copy], num_nodes, width)

        yield Case("flatten", f"{batch} x {width} nodes", expected, ours, theirs, same(ours, theirs))


@dataclass(frozen=True, slots=True)
class Draw:
    """Logits behind the nodes of some trees, and how to draw from them."""

    logits: Tensor  # [copies, B * N, V]
    starts: Tensor  # [B]
    depths: Tensor  # [B, N]
    temperatures: Tensor  # [B]
    seeds: Tensor  # [B]
    positions: Tensor  # [B]
    is_greedy: bool

    def ours(self, copy: int) -> Tensor:
        return draw_behind_nodes(
            self.logits[copy], self.starts, self.depths, temperatures=self.temperatures, seeds=self.seeds,
            positions=self.positions, all_greedy=self.is_greedy,
        )  # fmt: skip

    def perturbed(self, copy: int) -> Tensor:
        """[B * N, V] float32: what the token is the largest of."""
        logits = self.logits[copy].float()
        if self.is_greedy:
            return logits
        num_nodes = self.depths.shape[1]
        positions = (self.positions[:, None] + self.depths + 1).flatten()
        scaled = logits / self.temperatures.repeat_interleave(num_nodes)[:, None]
        return scaled + gumbel_noise(self.seeds.repeat_interleave(num_nodes), positions, logits.shape[1])

    def theirs(self, copy: int) -> Tensor:
        return self.perturbed(copy).argmax(dim=1).view(self.depths.shape)

    def check(self) -> None:
        for copy in range(COPIES):
            got, values = self.ours(copy), self.perturbed(copy)
            if self.is_greedy:
                highest = values.amax(dim=1, keepdim=True)
                lowest_id = torch.where(values == highest, torch.arange(values.shape[1], device=values.device), 2**31)
                assert torch.equal(got.flatten(), lowest_id.amin(dim=1))
            else:
                missing = values.amax(dim=1) - values.gather(1, got.view(-1, 1))[:, 0]
                assert float(missing.max()) < 1e-4, f"a token {float(missing.max())} below the best"


def draws(device: torch.device) -> Iterator[Case]:
    greedy = {(1, 1): 4.0, (1, 8): 4.5, (1, 32): 7.0, (1, 64): 10.0, (8, 8): 10.0, (32, 4): 17.0}
    drawn = {(1, 1): 5.0, (1, 8): 7.0, (1, 32): 16.0, (1, 64): 29.0, (8, 8): 29.0, (32, 4): 56.0}
    for name, sizes, temperature in (("greedy", greedy, 0.0), ("T = 0.7", drawn, 0.7)):
        for (batch, num_nodes), expected in sizes.items():
            rows = batch * num_nodes
            case = Draw(
                logits=(torch.randn(COPIES, rows, VOCAB_SIZE, device=device) * 3).bfloat16(),
                starts=torch.arange(batch, device=device) * num_nodes,
                depths=torch.randint(MAX_DEPTH, (batch, num_nodes), device=device),
                temperatures=torch.full((batch,), temperature, device=device),
                seeds=torch.randint(2**62, (batch,), device=device),
                positions=torch.randint(8192, (batch,), device=device),
                is_greedy=temperature == 0.0,
            )
            yield Case("draw", f"{name}, {batch} x {num_nodes}", expected, case.ours, case.theirs, case.check)


def walks(device: torch.device) -> Iterator[Case]:
    for batch, num_nodes, expected in ((1, 1, 1.8), (1, 32, 3.0), (1, 64, 3.0), (32, 32, 3.0)):
        trees = [
            flatten_reference(
                torch.zeros(batch, dtype=torch.int64, device=device), merged_candidates(batch, num_nodes, device),
                torch.full((batch,), num_nodes, device=device), num_nodes,
            )
            for _ in range(COPIES)
        ]  # fmt: skip
        # Right about half of the time: the walks are as long as they are in use.
        drawn = [
            torch.where(torch.rand(tree.tokens.shape, device=device) < 0.5, tree.tokens.roll(-1, 1), 1)
            for tree in trees
        ]
        inputs = [(said, tree.tokens, tree.parents, tree.num_nodes) for said, tree in zip(drawn, trees, strict=True)]

        def ours(copy: int, inputs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = inputs) -> object:
            return accept_walk.accept_walk(*inputs[copy], max_depth=MAX_DEPTH)

        def theirs(copy: int, inputs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = inputs) -> object:
            return accept_walk.reference(*inputs[copy], max_depth=MAX_DEPTH)

        yield Case("walk", f"{batch} x {num_nodes} nodes", expected, ours, theirs, same(ours, theirs))


@dataclass(frozen=True, slots=True)
class Commit:
    """A cache, and branches to keep of it: again and again the same, which changes nothing any more."""

    cache: KVCache
    slots: Tensor  # [B]
    starts: Tensor  # [B]
    accepted: Acceptance
    history: Tensor
    hidden: Tensor

    def run(self, _: int) -> object:
        self.cache.lengths.copy_(self.starts)  # in the time too, some 1.5 us
        kept = self.accepted
        return self.cache.commit_step(
            self.slots, kept.path, kept.num_committed, tokens=kept.tokens, history=self.history, hidden=self.hidden
        )

    def in_tensor_operations(self, copy: int) -> object:
        kernels, dispatch.uses_triton = dispatch.uses_triton, lambda tensor: False
        try:
            return self.run(copy)
        finally:
            dispatch.uses_triton = kernels

    def check(self) -> None:
        state = self.cache.keys, self.cache.values, self.history
        before = [tensor.clone() for tensor in state]
        got = self.run(0)
        ours = [tensor.clone() for tensor in (*state, self.cache.lengths)]
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        want = self.in_tensor_operations(0)
        assert_equal(got, want)
        assert torch.equal(ours[2], self.history)
        assert torch.equal(ours[3], self.cache.lengths)
        for slot, start in zip(self.slots.tolist(), self.cache.lengths[self.slots].tolist(), strict=True):
            for mine, theirs in zip(ours, state[:2], strict=False):
                assert torch.equal(mine[:, slot, :, :start], theirs[:, slot, :, :start])


def commits(device: torch.device) -> Iterator[Case]:
    sizes = ((1, 1, "plain", 4.0), (1, 32, "nothing moves", 4.0), (1, 32, "all move", 6.0), (8, 32, "all move", 7.0),
             (32, 16, "all move", 12.0))  # fmt: skip
    for batch, num_nodes, kind, expected in sizes:
        capacity = 1024
        cache = KVCache(
            num_layers=NUM_LAYERS, num_slots=batch, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, capacity=capacity,
            max_scratch=num_nodes + MAX_DEPTH, dtype=torch.bfloat16, device=device,
        )  # fmt: skip
        cache.keys.normal_()
        cache.values.normal_()
        places = min(MAX_DEPTH + 1, num_nodes)
        path = torch.arange(places, device=device).expand(batch, -1)
        if kind == "all move":
            path = torch.where(path > 0, path + num_nodes - places, 0)
        accepted = Acceptance(
            path=path.contiguous(),
            tokens=torch.randint(VOCAB_SIZE, (batch, places), device=device),
            num_committed=torch.full((batch,), places, device=device),
        )
        case = Commit(
            cache=cache,
            slots=torch.arange(batch, device=device),
            starts=torch.randint(capacity - places, (batch,), device=device),
            accepted=accepted,
            history=torch.zeros(batch, cache.num_positions + 1, dtype=torch.int64, device=device),
            hidden=torch.randn(batch, num_nodes, HIDDEN_SIZE, device=device).bfloat16(),
        )
        yield Case("commit", f"{batch}, {kind}", expected, case.run, case.in_tensor_operations, case.check)


def tops(device: torch.device) -> Iterator[Case]:
    sizes = ((1, 16384, 10, 5.5), (8, 16384, 8, 5.5), (16, 16384, 8, 6.0), (16, 32768, 8, 6.5), (4, 128256, 10, 8.0),
             (16, 128256, 8, 10.0), (128, 16384, 8, 11.0))  # fmt: skip
    for rows, vocab_size, count, expected in sizes:
        logits = (torch.randn(COPIES, rows, vocab_size, device=device) * 3).bfloat16()

        def ours(copy: int, logits: Tensor = logits, count: int = count) -> object:
            return top_log_probs(logits[copy], count)

        def theirs(copy: int, logits: Tensor = logits, count: int = count) -> object:
            return torch.log_softmax(logits[copy].float(), dim=1).topk(count, dim=1)

        def check(logits: Tensor = logits, count: int = count) -> None:
            for copy in range(COPIES):
                got, want = top_log_probs(logits[copy], count), top_reference(logits[copy], count)
                assert torch.equal(got.ids, want.ids)
                torch.testing.assert_close(got.log_probs, want.log_probs, atol=1e-5, rtol=1e-5)

        yield Case("top", f"{count} of {vocab_size}, {rows} rows", expected, ours, theirs, check)


KERNELS = {
    "lookup": lookups, "merge": merges, "flatten": flattens, "draw": draws, "walk": walks, "commit": commits,
    "top": tops,
}  # fmt: skip


def microseconds(call: Call, repeats: int = 9) -> float:
    """Median time of a call among many in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for number in range(CALLS):
            call(number % COPIES)
    began = time.perf_counter()
    while time.perf_counter() - began < 0.01:  # clocks up
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=KERNELS, action="append", help="this kernel; may be given several times")
    chosen = parser.parse_args().only or list(KERNELS)
    if not torch.cuda.is_available():
        sys.exit("this needs a GPU; without one the kernels are checked by tests/engine/kernels/test_triton_steps.py")
    torch.manual_seed(time.time_ns() % 2**31)
    device = torch.device("cuda")
    rows, wrong = [], []
    for kernel in chosen:
        for case in KERNELS[kernel](device):
            try:
                case.check()
            except AssertionError as error:
                wrong.append(f"WRONG: {case.kernel}, {case.size}: {str(error).strip()[:300]}")
                continue
            ours, theirs = microseconds(case.ours), microseconds(case.theirs)
            rows.append(
                f"{case.kernel:8} {case.size:22} {ours:8.1f} {case.expected:9.1f} {theirs:9.1f} {theirs / ours:7.1f}"
            )
    print(torch.cuda.get_device_name())
    print(f"{'kernel':8} {'size':22} {'us':>8} {'expected':>9} {'torch us':>9} {'ratio':>7}")
    print("\n".join(rows))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
