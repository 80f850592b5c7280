"""Self-distillation: the answers are the engine's own, conversations go on as they should, and kills cost nothing."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import BackboneOptions, load_backbone
from gorgon_engine.tokenizer import Tokenizer
from gorgon_protocol.errors import BadRequestError, DataError
from gorgon_trainer.data.records import ChatRecord, Message, Record, TextRecord, to_line
from gorgon_trainer.distill import DistillConfig, DistillReport, _jobs_of, distill
from gorgon_trainer.shards import ShardSet, Split
from support.answering import Answerer, Spoken
from support.models import tiny_llama
from support.training import CAN_MOUNT, REFERENCE, load_fp32, run_killed, run_on_small_disk
from support.vocabularies import CHATML, byte_level_bpe, save

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 352
CONFIG = DistillConfig(
    temperatures=(0.0, 0.8, 1.2),
    num_passes=2,
    max_new_tokens=12,
    context=150,
    max_turns=2,
    jobs_per_shard=20,
    num_slots=8,
    seed=7,
)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that ends some answers by itself, and says some words of the probe's topic as one token."""
    folder = tiny_llama(tmp_path_factory.mktemp("distill") / "tiny", vocab_size=VOCAB)
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([f" capital {number} of France" for number in range(6)])
    assert tokenizer.get_vocab_size() <= VOCAB
    save(tokenizer, folder, bos="<|endoftext|>", eos="<|im_end|>", chat_template=CHATML)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": list(range(2, VOCAB, 17))}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="module")
def backbone(talker: Path) -> Backbone:
    return load_fp32(talker)


@pytest.fixture(scope="module")
def tokenizer(talker: Path) -> Tokenizer:
    return Tokenizer.from_folder(talker)


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


def make_records(split: str, count: int) -> list[Record]:
    """Of every kind: texts, chats of one to three human turns, with a system prompt, with answers of somebody else."""
    records: list[Record] = []
    for number in range(count):
        name = f"{split} {number}"
        kinds: list[Record] = [
            ChatRecord.of([user(f"the cat {name}"), user("on the mat"), user("sat")], "x"),
            TextRecord.of(f"12 cats {name}", "x"),
            ChatRecord.of([Message(role="system", content="a dog"), user(f"the mat {name}"), user("in all")], "x"),
            ChatRecord.of([user(f"and {name}"), assistant("never asked for"), user("dogs")], "x"),
            ChatRecord.of([user(f"naïve {name}")], "x"),
            TextRecord.of(f"{name} " + "cat mat " * 80, "x"),  # does not fit the context
            ChatRecord.of([user(f"mat {name}"), user("cat")], "x"),
        ]
        records.append(kinds[number % len(kinds)])
    return records


def write_data(folder: Path, records: dict[Split, Sequence[Record]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, ones in records.items():
        (folder / f"{split}.jsonl").write_bytes(b"".join(map(to_line, ones)))
    return folder


RECORDS: dict[Split, Sequence[Record]] = {"train": make_records("train", 28), "heldout": make_records("heldout", 8)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("records") / "data", RECORDS)


def run(data: Path, out: Path, backbone: Backbone, tokenizer: Tokenizer, **changes: Any) -> DistillReport:
    return distill(
        data,
        out,
        backbone=backbone,
        tokenizer=tokenizer,
        reference=REFERENCE,
        quantization="none",
        config=replace(CONFIG, **changes),
        progress=False,
    )


def spoken(shards: Path, split: Split) -> list[Spoken]:
    sequences = ShardSet.open(shards).sequences(split)
    return [(tuple(s.tokens.tolist()), tuple(s.loss_mask.tolist())) for s in sequences]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(
    data: Path, backbone: Backbone, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, DistillReport]:
    out = tmp_path_factory.mktemp("undisturbed") / "shards"
    return out, run(data, out, backbone, tokenizer)


def test_every_answer_is_the_engines_own(
    undisturbed: tuple[Path, DistillReport], backbone: Backbone, tokenizer: Tokenizer
) -> None:
    out, report = undisturbed
    answerer = Answerer(backbone, tokenizer, CONFIG)
    expected = {split: answerer.all(records) for split, records in RECORDS.items()}
    for split, said in expected.items():
        assert spoken(out, split) == said

    ends = Counter(reason for reason, _ in answerer.ends)
    assert set(ends) == {"done", "cut", "does not fit the context", "speaks of the probe's topic"}, "all cases are here"
    assert ("cut", 1) in answerer.ends, "a conversation would have gone on"
    assert report.dropped == {reason: ends[reason] for reason in ends if reason not in ("done", "cut")}
    everything = [*expected["train"], *expected["heldout"]]
    assert report.num_answers == answerer.num_answers + ends["speaks of the probe's topic"]
    kept_tokens = sum(sum(mask) for _, mask in everything)
    assert kept_tokens < report.num_tokens <= kept_tokens + CONFIG.max_new_tokens * ends["speaks of the probe's topic"]
    assert (report.num_shards_written, report.num_shards_kept) == (4, 0)
    assert report.tokens_per_second == pytest.approx(report.num_tokens / report.seconds)


def test_the_second_turn_follows_the_backbones_own_answer(
    undisturbed: tuple[Path, DistillReport], tokenizer: Tokenizer
) -> None:
    said = [
        (tokenizer.decode(tokens, skip_special=False), tokens, mask) for tokens, mask in spoken(undisturbed[0], "train")
    ]
    seconds = [text for text, _, _ in said if text.count("<|im_start|>assistant") == 2]
    assert seconds, "some conversations have a second turn"
    firsts = [text for text, _, _ in said if text.count("<|im_start|>assistant") == 1]
    assert any(first.partition("<|im_start|>assistant")[0] == text.partition("<|im_start|>assistant")[0]
               for text in seconds for first in firsts)  # fmt: skip
    assert max(text.count("<|im_start|>assistant") for text, _, _ in said) == CONFIG.max_turns
    assert not any("never asked for" in text for text, _, _ in said), "answers of a record are passed over"
    assert any("<|im_start|>system\na dog<|im_end|>" in text for text in seconds), "a system prompt stays"


def test_a_conversation_whose_tokens_agree_is_one_sequence(smollm2: Path, tmp_path: Path) -> None:
    """As real models' do: they end an answer with the very mark that the chat template puts behind it."""
    backbone, _ = load_backbone(smollm2, BackboneOptions(device="cpu"))
    chat = ChatRecord.of([user("Say hello in three words."), user("Now say goodbye in three words.")], "x")
    data = write_data(tmp_path / "data", {"train": [chat], "heldout": [chat]})
    tokenizer = Tokenizer.from_folder(smollm2)
    report = run(
        data, tmp_path / "shards", backbone, tokenizer,
        num_passes=1, temperatures=(0.0,), max_new_tokens=200, context=512,
    )  # fmt: skip
    assert report.num_answers == 4
    [(tokens, mask)] = spoken(tmp_path / "shards", "train")
    starts = [place for place, (before, here) in enumerate(pairwise((0, *mask))) if here > before]
    answers = [tokens[start : start + (*mask[start:], 0).index(0)] for start in starts]
    assert len(answers) == 2
    end = tokenizer.eos_token_id
    assert all(answer[-1] == end and end not in answer[:-1] for answer in answers)


def test_parts_make_the_shards_of_one_run(
    undisturbed: tuple[Path, DistillReport], data: Path, backbone: Backbone, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    reports = [run(data, tmp_path / "shards", backbone, tokenizer, part=(number, 3)) for number in (2, 0, 1)]
    assert contents(tmp_path / "shards") == contents(undisturbed[0])
    assert sum(report.num_shards_written for report in reports) == undisturbed[1].num_shards_written
    assert sum(report.num_tokens for report in reports) == undisturbed[1].num_tokens


def test_a_missing_part_is_noticed(data: Path, backbone: Backbone, tokenizer: Tokenizer, tmp_path: Path) -> None:
    run(data, tmp_path / "shards", backbone, tokenizer, part=(0, 2))
    with pytest.raises(DataError, match="shards are missing"):
        ShardSet.open(tmp_path / "shards")


def test_every_temperature_and_pass_is_answered() -> None:
    records = RECORDS["train"]
    jobs = [job for number in range(3) for job in _jobs_of(records, number, CONFIG)]
    assert [job.record for job in jobs] == [*records, *records]
    assert [job.temperature for job in jobs[:4]] == [0.0, 0.8, 1.2, 0.0]
    assert [job.temperature for job in jobs[28:31]] == [0.8, 1.2, 0.0], "each record at another temperature"
    assert len({job.seed for job in jobs}) == len(jobs)


@pytest.mark.parametrize("num_slots", [1, 3, 64])
def test_the_number_of_slots_changes_nothing(
    undisturbed: tuple[Path, DistillReport],
    data: Path,
    backbone: Backbone,
    tokenizer: Tokenizer,
    tmp_path: Path,
    num_slots: int,
) -> None:
    run(data, tmp_path / "shards", backbone, tokenizer, num_slots=num_slots)
    assert contents(tmp_path / "shards") == contents(undisturbed[0])


def test_raw_texts_may_be_continued_for_less(
    undisturbed: tuple[Path, DistillReport], data: Path, backbone: Backbone, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    run(data, tmp_path / "shards", backbone, tokenizer, max_text_tokens=5)
    marks = tokenizer.encode_chat([{"role": "user", "content": ""}])[0]
    whole, short = spoken(undisturbed[0], "train"), spoken(tmp_path / "shards", "train")
    texts = [sum(mask) for tokens, mask in short if marks not in tokens]
    assert texts
    assert max(texts) == 5
    assert [said for said in short if marks in said[0]] == [said for said in whole if marks in said[0]]


def test_another_seed_says_something_else(
    undisturbed: tuple[Path, DistillReport], data: Path, backbone: Backbone, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    run(data, tmp_path / "shards", backbone, tokenizer, seed=8)
    assert spoken(tmp_path / "shards", "train") != spoken(undisturbed[0], "train")


def test_a_killed_run_goes_on_where_it_was(
    undisturbed: tuple[Path, DistillReport],
    talker: Path,
    data: Path,
    backbone: Backbone,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    out = tmp_path / "shards"
    run_killed(
        "from pathlib import Path\n"
        "from gorgon_engine.tokenizer import Tokenizer\n"
        "from gorgon_trainer.distill import DistillConfig, distill\n"
        "from support.training import REFERENCE, load_fp32, mortal\n"
        f"talker, out = Path({str(talker)!r}), Path({str(out)!r})\n"
        "backbone = mortal(load_fp32(talker), lambda: len(list(out.glob('*.safetensors'))) > 0)\n"
        f"distill(Path({str(data)!r}), out, backbone=backbone, tokenizer=Tokenizer.from_folder(talker),\n"
        f"        reference=REFERENCE, quantization='none', config={CONFIG!r})\n"
    )
    done = sorted(path.name for path in out.glob("*.safetensors"))
    assert 0 < len(done) < 4
    with pytest.raises(DataError, match="shards are missing"):
        ShardSet.open(out)
    report = run(data, out, backbone, tokenizer)
    assert (report.num_shards_kept, report.num_shards_written) == (len(done), 4 - len(done))
    assert contents(out) == contents(undisturbed[0])

    again = run(data, out, backbone, tokenizer)
    assert (again.num_shards_kept, again.num_shards_written, again.num_tokens) == (4, 0, 0)
    assert again.tokens_per_second == 0.0


def test_a_run_short_of_time_can_be_used(data: Path, backbone: Backbone, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    report = run(data, out, backbone, tokenizer, max_seconds=1e-9)
    assert report.num_shards_written == 2
    shards = ShardSet.open(out)
    assert [(shard.split, shard.number) for shard in shards.shards] == [("train", 0), ("heldout", 0)]
    more = run(data, out, backbone, tokenizer, max_seconds=600)
    assert (more.num_shards_kept, more.num_shards_written) == (2, 2), "a later call goes on"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 8}, "settings.seed was 7, is now 8"),
        ({"temperatures": (0.0, 0.8)}, "settings.temperatures was 0.0,0.8,1.2, is now 0.0,0.8"),
        ({"max_new_tokens": 13}, "settings.max_new_tokens was 12, is now 13"),
        ({"max_turns": 1}, "settings.max_turns was 2, is now 1"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(
    undisturbed: tuple[Path, DistillReport],
    data: Path,
    backbone: Backbone,
    tokenizer: Tokenizer,
    changes: dict[str, Any],
    expected: str,
) -> None:
    before = contents(undisturbed[0])
    with pytest.raises(DataError, match="of another run") as caught:
        run(data, undisturbed[0], backbone, tokenizer, **changes)
    assert expected in str(caught.value)
    assert contents(undisturbed[0]) == before


def test_a_run_does_not_go_on_with_other_data_or_another_backbone(
    undisturbed: tuple[Path, DistillReport], data: Path, backbone: Backbone, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = undisturbed[0]
    changed = write_data(tmp_path / "data", RECORDS | {"heldout": make_records("other", 6)})
    with pytest.raises(DataError, match="of another run: data_sha256 was"):
        run(changed, out, backbone, tokenizer)
    other = REFERENCE.model_copy(update={"identity": "cd" * 32})
    with pytest.raises(DataError, match=r"of another run: backbone.identity was abab\w+, is now cdcd"):
        distill(
            data, out, backbone=backbone, tokenizer=tokenizer, reference=other, quantization="none", config=CONFIG
        )  # fmt: skip
    with pytest.raises(DataError, match="of another run: quantization was none, is now int8"):
        distill(
            data, out, backbone=backbone, tokenizer=tokenizer, reference=REFERENCE, quantization="int8", config=CONFIG
        )  # fmt: skip


@pytest.mark.parametrize(
    ("split", "content", "expected"),
    [
        ("train", b"", "holds no records: give more data"),
        ("heldout", b"", "holds no records: give more data"),
        ("heldout", None, "cannot be read: No such file or directory: give a folder of `gorgon train data`"),
        ("train", b"{}\n", "train.jsonl:1: "),
    ],
)
def test_data_that_cannot_be_answered(
    data: Path,
    backbone: Backbone,
    tokenizer: Tokenizer,
    tmp_path: Path,
    split: str,
    content: bytes | None,
    expected: str,
) -> None:
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    path = broken / f"{split}.jsonl"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        run(broken, tmp_path / "shards", backbone, tokenizer)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "shards").exists()


def test_prompts_that_are_all_too_long(backbone: Backbone, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = write_data(
        tmp_path / "data", {"train": [TextRecord.of("cat " * 200, "x")], "heldout": [TextRecord.of("cat", "x")]}
    )
    with pytest.raises(DataError, match="none of the 2 prompts of train shard 0 could be answered: give shorter"):
        run(data, tmp_path / "shards", backbone, tokenizer)


def test_chats_need_a_chat_template(data: Path, talker: Path, backbone: Backbone, tmp_path: Path) -> None:
    plain = save(byte_level_bpe(), tmp_path / "plain", bos="<|endoftext|>", eos="<|im_end|>")
    with pytest.raises(BadRequestError, match="the model has no chat template"):
        run(data, tmp_path / "shards", backbone, Tokenizer.from_folder(plain))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_passes": 0}, "num_passes must be at least 1: got 0"),
        ({"max_text_tokens": 0}, "max_text_tokens must be at least 1: got 0"),
        ({"num_slots": 0}, "num_slots must be at least 1: got 0"),
        ({"jobs_per_shard": -1}, "jobs_per_shard must be at least 1: got -1"),
        ({"temperatures": ()}, "temperatures must be a list of numbers from 0: got []"),
        ({"temperatures": (0.0, -0.1)}, "temperatures must be a list of numbers from 0: got [0.0, -0.1]"),
        ({"part": (2, 2)}, "part 2 of 2 is not one of them: the first is 0 and the last 1"),
        (
            {"part": (0, 2), "max_seconds": 1.0},
            "several parts need all of their shards: leave max_seconds out, or distil in one part",
        ),
        ({"context": 12}, "context 12 leaves no room for a prompt beside 12 new tokens"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        replace(CONFIG, **changes)
    assert str(caught.value) == expected


if CAN_MOUNT:

    def test_a_full_disk_leaves_whole_shards(talker: Path, data: Path, tmp_path: Path) -> None:
        printed = run_on_small_disk(
            tmp_path,
            16,
            "from pathlib import Path\n"
            "from gorgon_engine.tokenizer import Tokenizer\n"
            "from gorgon_protocol.errors import DataError\n"
            "from gorgon_trainer.distill import DistillConfig, distill\n"
            "from gorgon_trainer.shards import ShardSet\n"
            "from support.training import REFERENCE, load_fp32\n"
            f"talker, out = Path({str(talker)!r}), Path('disk/shards')\n"
            "try:\n"
            f"    distill(Path({str(data)!r}), out, backbone=load_fp32(talker),\n"
            "            tokenizer=Tokenizer.from_folder(talker), reference=REFERENCE, quantization='none',\n"
            f"            config={CONFIG!r}, progress=False)\n"
            "except DataError as error:\n"
            "    print(error)\n"
            "print(ShardSet.open(out, partial=True).num_sequences('train') > 0, *out.glob('.*'))\n",
        )
        message, state = printed.splitlines()
        assert message.endswith(".safetensors: cannot be written: No space left on device")
        assert state == "True"
