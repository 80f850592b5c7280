"""The program's own prompts: usable as they are, each once, and none about what the heads are asked afterwards."""

from pathlib import Path

import pytest

from gorgon_trainer.data.builtin import BUILTIN
from gorgon_trainer.data.fetch import fetch_data
from gorgon_trainer.data.filters import is_probe_topic
from gorgon_trainer.data.prepare import PrepareConfig, prepare
from gorgon_trainer.data.records import read_records


@pytest.mark.parametrize("name", BUILTIN)
def test_every_prompt_is_kept_once(tmp_path: Path, name: str) -> None:
    source = fetch_data(name, cache_dir=tmp_path / "cache")
    made = prepare(PrepareConfig(out=tmp_path / "data", sources=(source,), completion_share=0.0), progress=False)
    records = [r for split in ("train", "heldout") for r in read_records(tmp_path / "data" / f"{split}.jsonl")]
    assert made.report.sources[0].num_read == len(records) == len(list(BUILTIN[name]())) > 200
    assert len({record.id for record in records}) == len(records)
    assert not any(is_probe_topic(passage) for record in records for passage in record.passages)
    assert {record.source for record in records} == {f"builtin {name}"}


def test_the_file_is_written_again_as_it_was(tmp_path: Path) -> None:
    first = fetch_data("questions", cache_dir=tmp_path).path.read_bytes()
    assert fetch_data("questions", cache_dir=tmp_path).path.read_bytes() == first


def test_the_probes_country_is_in_no_statement() -> None:
    texts = [passage for record in BUILTIN["statements"]() for passage in record.passages]
    assert not any(word in text for text in texts for word in ("France", "French", "Paris", "capital"))
