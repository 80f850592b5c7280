"""Files of prompts: every format that is read, and one clear error for what is none."""

import json
from pathlib import Path
from typing import Any

import pytest

from gorgon_engine.tokenizer import Tokenizer
from gorgon_protocol.errors import BadRequestError, DataError
from gorgon_trainer.evaluation.prompts import encode_prompts, read_prompts

MT_BENCH = Path(__file__).parents[3] / "benchmarks/data/mt_bench.jsonl"


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_mt_bench_is_asked_by_its_first_turns() -> None:
    prompts = read_prompts(MT_BENCH)
    assert len(prompts) == 80
    first = json.loads(MT_BENCH.read_text().partition("\n")[0])["turns"][0]
    assert prompts[0].content == ({"role": "user", "content": first},)
    assert prompts[79].where == f"{MT_BENCH}, line 80"


def test_records_stop_at_the_first_message_of_the_user(tmp_path: Path) -> None:
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "be brief"}
    later = [{"role": "assistant", "content": "ho"}, {"role": "user", "content": "more"}]
    path = write(
        tmp_path,
        {"id": "0" * 32, "kind": "chat", "messages": [system, user, *later], "source": "x"},
        "",
        {"id": "1" * 32, "kind": "text", "text": "Once upon", "source": "x"},
        {"prompt": "a time", "response": "there"},
    )
    prompts = read_prompts(path)
    assert [prompt.content for prompt in prompts] == [(system, user), "Once upon", "a time"]
    assert [prompt.where for prompt in prompts] == [f"{path}, line {number}" for number in (1, 3, 4)]


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "a"}, "", {"text": "b"}, "broken")
    assert [prompt.content for prompt in read_prompts(path, limit=2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: has none of"),
        ({"turns": []}, "line 2: has none of"),
        ({"turns": [3]}, "line 2: has none of"),
        ({"text": 3}, "line 2: has none of"),
        ({"messages": [{"role": "user"}]}, "line 2: message 0 needs a role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "line 2: no message of the user"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(write(tmp_path, {"text": "fine"}, line))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_prompts(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompts(write(tmp_path, "", ""))
    (tmp_path / "latin").write_bytes('{"text": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_prompts(tmp_path / "latin")


def test_long_prompts_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prompts = read_prompts(write(tmp_path, {"text": "the cat"}, {"text": "the cat sat on the mat"}))
    (_, short), (_, long) = encode_prompts(tokenizer, prompts)
    assert encode_prompts(tokenizer, prompts, max_tokens=len(short)) == [(prompts[0].where, short)]
    assert encode_prompts(tokenizer, prompts, max_tokens=len(long))[1] == (prompts[1].where, long)
    with pytest.raises(BadRequestError, match="none of 2 prompts has at most 1 tokens"):
        encode_prompts(tokenizer, prompts, max_tokens=1)


def test_what_the_template_refuses_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (prompt,) = read_prompts(write(tmp_path, '{"messages": [{"role": "user", "content": "\\ud800"}]}'))
    with pytest.raises(BadRequestError, match="line 1: the text holds half a surrogate"):
        prompt.encode(tokenizer)
