"""The checks of the benchmark of drafts, at a size that the interpreter can run."""

from pathlib import Path

from support.triton_checks import run_check

PROGRAM = """
import sys

sys.path.insert(0, {folder!r})
import eagle_draft

from gorgon_engine.heads.eagle import EagleShape

setting = eagle_draft.Setting(
    shape=EagleShape(64, 2, 1, 64, 64, num_heads=8), vocab_size=50, num_drafted=20,
    dtype=torch.float16 if device == "cuda" else torch.float32, device=torch.device(device), context=40, positions=70,
)
results = eagle_draft.check(setting, num_depths=2)
assert [name for name, *_ in results] == ["dense", "NF4"]
for name, difference, shared, same_bits in results:
    assert difference < (0.1 if device == "cuda" else 1e-3), (name, difference)
    assert shared > 0.9, (name, shared)
    assert same_bits, name
"""


def test_the_checks_pass() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "kernels"
    run_check(PROGRAM.format(folder=str(folder)))
