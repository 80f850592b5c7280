"""Token shards: round trips, killed writers, and every way in which a folder may not be what it should."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gorgon_protocol.errors import DataError
from gorgon_protocol.manifest import BackboneReference
from gorgon_trainer.shards import INDEX_FILE, ShardIndex, ShardSet, ShardWriter, TokenSequence

VOCAB = 50


def make_index(**changes: Any) -> ShardIndex:
    values: dict[str, Any] = {
        "backbone": BackboneReference(identity="ab" * 32, name="tiny"),
        "quantization": "int8",
        "vocab_size": VOCAB,
        "data_sha256": "cd" * 32,
        "settings": {"temperature": 0.7, "max_tokens": 64},
    }
    return ShardIndex(**(values | changes))


def sequence(*tokens: int, prompt: int = 1) -> TokenSequence:
    return TokenSequence.from_lists(tokens, [position >= prompt for position in range(len(tokens))])


def as_lists(sequences: Any) -> list[tuple[list[int], list[int]]]:
    return [(s.tokens.tolist(), s.loss_mask.tolist()) for s in sequences]


A, B, C, D = sequence(1, 2, 3), sequence(4, 5, prompt=0), sequence(6), sequence(49, 0, 7, 8, prompt=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards to train on and one held out."""
    folder = tmp_path / "runs" / "shards"
    writer = ShardWriter(folder, make_index())
    writer.write("train", 0, [A, B])
    writer.write("train", 1, [C])
    writer.write("heldout", 0, [D])
    return folder


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        ShardSet.open(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """The same shard with other contents, still a safetensors file of the same run."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in ("tokens", "loss_mask", "offsets")}
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def test_what_is_written_is_read(folder: Path) -> None:
    shards = ShardSet.open(folder)
    assert shards.index == make_index()
    assert as_lists(shards.sequences("train")) == as_lists([A, B, C])
    assert as_lists(shards.sequences("heldout")) == as_lists([D])
    assert (shards.num_sequences("train"), shards.num_tokens("train"), shards.num_targets("train")) == (3, 6, 4)
    assert (shards.num_sequences("heldout"), shards.num_tokens("heldout"), shards.num_targets("heldout")) == (1, 4, 2)
    assert [(s.split, s.number) for s in shards.shards] == [("train", 0), ("train", 1), ("heldout", 0)]
    assert sorted(path.name for path in folder.iterdir()) == [
        "heldout-00000.safetensors",
        "shards.json",
        "train-00000.safetensors",
        "train-00001.safetensors",
    ]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_a_resumed_writer_knows_what_is_there_and_may_replace_it(folder: Path) -> None:
    writer = ShardWriter(folder, make_index())
    assert writer.finished("train") == {0, 1}
    assert writer.finished("heldout") == {0}
    writer.write("train", 1, [D, C])
    assert as_lists(ShardSet.open(folder).sequences("train")) == as_lists([A, B, D, C])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"quantization": "nf4"}, "quantization was int8, is now nf4"),
        ({"settings": {"temperature": 1.0, "max_tokens": 64}}, "settings.temperature was 0.7, is now 1.0"),
        ({"settings": {"temperature": 0.7}}, "settings.max_tokens was 64, is now None"),
        ({"data_sha256": "ef" * 32}, "data_sha256 was "),
    ],
)
def test_a_folder_of_another_run_is_not_gone_on_with(folder: Path, changes: dict[str, Any], expected: str) -> None:
    before = (folder / INDEX_FILE).read_bytes()
    with pytest.raises(DataError, match="of another run: ") as caught:
        ShardWriter(folder, make_index(**changes))
    assert expected in str(caught.value)
    assert (folder / INDEX_FILE).read_bytes() == before


def test_shards_without_their_index_are_not_taken_over(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()
    with pytest.raises(DataError, match=r"holds shards without their shards.json"):
        ShardWriter(folder, make_index())


def test_a_writer_killed_in_the_middle_leaves_what_was_there(folder: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from gorgon_trainer.files import written_whole\n"
        f"with written_whole(Path({str(folder / 'train-00001.safetensors')!r})) as file:\n"
        "    file.write(b'half a shard')\n"
        "    file.flush()\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(list(folder.glob(".*.tmp"))) == 1
    assert as_lists(ShardSet.open(folder).sequences("train")) == as_lists([A, B, C])
    ShardWriter(folder, make_index()).write("train", 1, [D])
    assert list(folder.glob(".*.tmp")) == []
    assert as_lists(ShardSet.open(folder).sequences("train")) == as_lists([A, B, D])


def test_a_write_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "train-00001.safetensors").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"train-00001.safetensors: cannot be written: No space left on device"):
        ShardWriter(folder, make_index()).write("train", 1, [D])
    assert (folder / "train-00001.safetensors").read_bytes() == before
    assert list(folder.glob(".*.tmp")) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        ShardWriter(tmp_path / "file" / "shards", make_index())


@pytest.mark.parametrize(
    "sequences",
    [
        [],
        [TokenSequence.from_lists([], [])],
        [TokenSequence.from_lists([1, 2], [1])],
        [TokenSequence.from_lists([VOCAB], [1])],
        [TokenSequence.from_lists([-1], [1])],
        [TokenSequence.from_lists([1], [2])],
        [TokenSequence(torch.tensor([1]), torch.tensor([1], dtype=torch.uint8))],
    ],
)
def test_what_is_no_shard_is_not_written(tmp_path: Path, sequences: list[TokenSequence]) -> None:
    writer = ShardWriter(tmp_path, make_index())
    with pytest.raises(AssertionError):
        writer.write("train", 0, sequences)
    assert writer.finished("train") == frozenset()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def foreign(path: Path) -> None:
    ShardWriter(path.parent.parent / "other", make_index(vocab_size=VOCAB + 1)).write("train", 1, [A]).replace(path)


def plain_file(path: Path) -> None:
    save_file({"tokens": torch.tensor([1])}, path)


def replaced(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda tensors: tensors.update({name: tensor}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut, "not a readable shard"),
        (foreign, "not a shard of the run in shards.json"),
        (plain_file, "not a shard of the run in shards.json"),
        (replaced("tokens", torch.tensor([VOCAB], dtype=torch.int32)), "token ids from 50 to 50 in a vocabulary of 50"),
        (replaced("tokens", torch.tensor([-2], dtype=torch.int32)), "token ids from -2 to -2"),
        (replaced("tokens", torch.tensor([1])), "torch.int64"),
        (replaced("tokens", torch.tensor([[1]], dtype=torch.int32)), "(1, 1)"),
        (replaced("loss_mask", torch.tensor([1, 1], dtype=torch.uint8)), "1 tokens and a loss mask of 2"),
        (replaced("loss_mask", torch.tensor([7], dtype=torch.uint8)), "the loss mask holds 7"),
        (replaced("offsets", torch.tensor([0, 2])), "the offsets do not rise from 0 to 1"),
        (replaced("offsets", torch.tensor([1, 1])), "the offsets do not rise"),
        (replaced("offsets", torch.tensor([0, 0, 1])), "the offsets do not rise"),
        (replaced("offsets", torch.tensor([0])), "the offsets do not rise"),
        (replaced("extra", torch.tensor([0])), "holds"),
    ],
)
def test_a_damaged_shard_is_named(folder: Path, damage: Callable[[Path], None], expected: str) -> None:
    path = folder / "train-00001.safetensors"
    damage(path)
    message = refusal(folder)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "run the distillation again" in message


def test_a_shard_damaged_after_opening_is_named_when_it_is_read(folder: Path) -> None:
    shards = ShardSet.open(folder)
    cut(folder / "train-00001.safetensors")
    read = shards.sequences("train")
    assert as_lists([next(read), next(read)]) == as_lists([A, B])
    with pytest.raises(DataError, match=r"train-00001.safetensors: not a readable shard"):
        next(read)


def test_missing_shards_are_counted(folder: Path) -> None:
    (folder / "train-00000.safetensors").unlink()
    assert "1 of 2 train shards are missing, 00000 the first" in refusal(folder)
    assert as_lists(ShardSet.open(folder, partial=True).sequences("train")) == as_lists([C])


def test_the_planned_number_of_shards_tells_an_unfinished_run(tmp_path: Path) -> None:
    index = make_index(num_shards={"train": 3, "heldout": 0})
    writer = ShardWriter(tmp_path, index)
    assert "3 of 3 train shards are missing" in refusal(tmp_path)
    assert "no shard is written yet" in refusal(tmp_path, partial=True)
    for number in range(4):
        writer.write("train", number, [A])
        if number == 1:
            assert "1 of 3 train shards are missing, 00002 the first" in refusal(tmp_path)
        if number == 2:
            assert ShardSet.open(tmp_path).num_sequences("train") == 3
    assert "train shard 00003 is beyond the 3 of shards.json" in refusal(tmp_path)


def test_folders_that_hold_no_shards(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "holds no shards.json" in refusal(tmp_path)
    (tmp_path / INDEX_FILE).mkdir()
    assert "shards.json: cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("schema_version", 2, "schema_version"),
        ("vocab_size", 0, "vocab_size"),
        ("quantization", "int3", "quantization"),
        ("surprise", 1, "surprise"),
        ("num_shards", {"validation": 1}, "num_shards.validation"),
        ("backbone", {"identity": "xyz", "name": "tiny"}, "backbone.identity"),
    ],
)
def test_an_index_that_does_not_fit_is_named_by_field(folder: Path, field: str, value: Any, expected: str) -> None:
    path = folder / INDEX_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert refusal(folder).startswith(f"{path}: {expected}")


def test_an_index_that_is_no_json(folder: Path) -> None:
    (folder / INDEX_FILE).write_text('{"schema_version": 1,')
    assert "Invalid JSON" in refusal(folder)


def test_a_sequence_that_goes_on_from_another_takes_its_targets() -> None:
    first = TokenSequence.from_lists([5, 6, 7], [0, 1, 1])
    second = TokenSequence.from_lists([5, 6, 7, 8, 9], [0, 0, 0, 0, 1])
    assert second.goes_on_from(first)
    assert not first.goes_on_from(second)
    assert not TokenSequence.from_lists([5, 6, 8, 8], [0, 0, 0, 1]).goes_on_from(first)
    joined = second.with_targets_of(first)
    assert (joined.tokens.tolist(), joined.loss_mask.tolist()) == ([5, 6, 7, 8, 9], [0, 1, 1, 0, 1])
    assert second.loss_mask.tolist() == [0, 0, 0, 0, 1], "the sequence itself is unchanged"
