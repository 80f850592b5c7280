"""`report.json`: what a prepared data folder was made of, and what was left out of it."""

from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gorgon_protocol.errors import DataError
from gorgon_protocol.manifest import FileRecord, Sha256
from gorgon_trainer.data.filters import Reason

SCHEMA_VERSION: Final = 1
REPORT_FILE = "report.json"
TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputFile(_Strict):
    """One file that records or rules were taken from."""

    kind: Literal["sharegpt", "jsonl", "text", "never-train"]
    name: str
    sha256: Sha256


class SourceReport(_Strict):
    input: InputFile
    num_read: int = Field(ge=0, description="whole records in the file")
    num_malformed: int = Field(ge=0)
    num_kept: int = Field(ge=0)


class PrepareReport(_Strict):
    schema_version: Literal[1] = SCHEMA_VERSION
    fingerprint: Sha256 = Field(description="of settings and inputs: equal ones give equal files")
    settings: dict[str, bool | int | float | str | None]
    sources: tuple[SourceReport, ...]
    num_train: int = Field(ge=0)
    num_heldout: int = Field(ge=0)
    num_chats: int = Field(ge=0, description="of both splits")
    num_texts: int = Field(ge=0, description="of both splits, openings of chats included")
    dropped: dict[Reason, int] = Field(description="records, by the first reason found")
    shortened: dict[Reason, int] = Field(description="records of which a part was kept")
    malformed: tuple[str, ...] = Field(description="the first of each file, by name and reason")
    files: dict[str, FileRecord]

    @property
    def num_malformed(self) -> int:
        return sum(source.num_malformed for source in self.sources)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises `DataError` in one line."""
        path = folder / REPORT_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read: {error.strerror}: give a folder of `gorgon train data`"
            ) from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
