"""`gorgon train` as it is typed: stage after stage on a tiny model, and what it says when it is typed wrongly."""

import json
from pathlib import Path

import pytest
from cli.conftest import Gorgon

from gorgon_cli import train
from gorgon_trainer.feature_cache import Features
from gorgon_trainer.objective import Loss
from gorgon_trainer.presets import PRESETS


def test_the_choices_are_the_trainers_own() -> None:
    assert tuple(PRESETS) == train.PRESETS
    assert tuple(Loss) == train.LOSSES
    assert tuple(Features) == train.FEATURES


def test_from_prompts_to_published_heads(gorgon: Gorgon, tiny: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        status, out, err = gorgon(*arguments)
        assert status == 0, err
        return out

    model = ("--model", tiny, "--device", "cpu")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the cat number {n} sat"}) + "\n" for n in range(60)))
    data, shards, out, report = (tmp_path / name for name in ("data", "shards", "run", "report"))
    run("train", "data", "--jsonl", prompts, "--out", data, "--heldout-share", 0.2, "--completion-share", 0, "--quiet")
    limits = ("--max-new-tokens", 16, "--context", 64, "--passes", 1, "--shard-size", 32)
    assert "answers" in run("train", "distill", "--data", data, "--out", shards, *limits, *model)
    assert ": 0 shards written" in run("train", "distill", "--data", data, "--out", shards, *limits, *model)
    settings = ("--num-heads", 2, "--num-blocks", 1, "--pack-length", 64, "--packs-per-batch", 2, "--max-steps", 4)
    steps = ("--warmup-steps", 1, "--eval-every", 2, "--save-every", 2, "--name", "tiny", "--features", "memory")
    checkpoint = Path(run("train", "heads", "--shards", shards, "--out", out, *settings, *steps, *model).strip())
    assert checkpoint == out / "tiny@1"
    measured = run("train", "evaluate", "--heads", checkpoint, "--prompts", prompts, "--limit", 2, "--out", report,
                   "--run", out, "--nodes", "4", "--max-tokens", 8, "--seeds", "0", "--complete", *model)  # fmt: skip
    assert [line.split()[0] for line in measured.splitlines()] == ["heads"] * 4
    for number, stage in enumerate((
        ("distill", "--data", data),
        ("heads", "--shards", shards),
        ("evaluate", "--heads", checkpoint, "--prompts", prompts),
    )):  # fmt: skip
        refused = tmp_path / f"refused-{number}"
        words = "the Triton kernels cannot be used: they need a GPU, and the device is cpu: choose `auto`"
        assert gorgon("train", *stage, "--out", refused, "--kernels", "triton", *model) == (1, "", f"gorgon: {words}\n")
        assert not refused.exists() or not list(refused.iterdir())
    assert (report / "report.md").is_file()
    assert (checkpoint / "README.md").is_file()
    assert run("heads", "publish", checkpoint, "--store", tmp_path / "store").strip().endswith("tiny@1")
    probed = json.loads(run("probe", "the cat", "--heads", checkpoint, "--json", "--model", tiny))
    assert [head["offset"] for head in probed["heads"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preset", "smoke"], "--preset needs --out DIR"),
        (["--preset", "smoke", "--out", "x", "data"], "give a stage or a --preset, not both"),
        (["--preset", "gpt5"], "'gpt5' is not one of"),
        (["distill", "--data", "x", "--out", "y", "--temperatures", "hot"], "numbers with commas between: got 'hot'"),
        (["heads", "--shards", "x", "--out", "y", "--family", "llama"], "'llama' is not one of"),
    ],
)
def test_usage(gorgon: Gorgon, arguments: list[str], expected: str) -> None:
    status, _, err = gorgon("train", *arguments)
    assert status == 2
    assert expected in err
    assert len(err.splitlines()) == 1


def test_alone_it_says_what_there_is(gorgon: Gorgon) -> None:
    status, out, _ = gorgon("train")
    assert status == 0
    assert all(stage in out for stage in ("data", "distill", "heads", "evaluate", "--preset"))


@pytest.mark.parametrize(
    ("device", "asked", "kernels"),
    [("cuda", "auto", "torch"), ("cuda:1", "triton", "triton"), ("cpu", "auto", "auto"), ("cpu", "native", "native")],
)
def test_which_kernels_train(monkeypatch: pytest.MonkeyPatch, device: str, asked: str, kernels: str) -> None:
    monkeypatch.setattr(train, "set_threads", lambda *arguments, **options: None)  # of this process
    options = train._options(None, None, device, asked, None)
    assert (options.device, options.kernels) == (device, kernels)
