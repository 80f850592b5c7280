"""From files of prompts to records to train on: sources -> filters -> split -> files.

Whether a record is held out, becomes a text to continue, or stays under a limit, is decided by a hash of its prompt's
words alone: the same prompt has the same fate in every run, file and order.
"""

import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from gorgon_protocol.errors import DataError, TrainingError
from gorgon_protocol.manifest import FileRecord
from gorgon_trainer.data.filters import FilterConfig, NeverTrain, Reason, RecordFilter
from gorgon_trainer.data.records import ChatRecord, Record, TextRecord, normalized, to_line
from gorgon_trainer.data.report import (
    HELDOUT_FILE,
    REPORT_FILE,
    TRAIN_FILE,
    InputFile,
    PrepareReport,
    SourceReport,
)
from gorgon_trainer.data.sources import Malformed, Source
from gorgon_trainer.files import folder_written_whole, restore_replaced

_MIN_OPENING_WORDS, _MAX_OPENING_WORDS = 3, 12
_NUM_NAMED = 5  # malformed pieces of a file that the report names
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class PrepareConfig:
    out: Path
    sources: tuple[Source, ...]
    never_train: tuple[Path, ...] = ()
    filters: FilterConfig = field(default_factory=FilterConfig)
    heldout_share: float = 0.05
    completion_share: float = 0.1  # of the chats, that become openings to be continued
    limit: int | None = None  # records, held-out ones included
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    report: PrepareReport
    is_new: bool  # False: the folder was there already, of the same inputs and settings


@dataclass(slots=True)
class _Tally:
    read: Counter[Source] = field(default_factory=Counter)
    malformed: Counter[Source] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)  # by the source's name, train or heldout, chat or text
    dropped: Counter[Reason] = field(default_factory=Counter)
    shortened: Counter[Reason] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)


def prepare(config: PrepareConfig, *, progress: bool = True) -> Prepared:
    """Write `config.out`: train.jsonl, heldout.jsonl and report.json; the folder appears whole or not at all.

    A folder that is there already, made with the same settings of the same inputs, is kept. progress: draw a bar on a
    terminal's stderr. Raises `DataError`: an input that cannot be read or holds nothing usable, a folder of other
    data, nothing kept; `TrainingError` for settings that cannot be.
    """
    _check(config)
    config = replace(config, out=config.out.resolve(), sources=_told_apart(config.sources))
    never_train = NeverTrain.from_files(config.never_train)
    inputs = [InputFile(kind=s.kind, name=s.name, sha256=_sha256(s.path)) for s in config.sources]
    rules = [InputFile(kind="never-train", name=path.name, sha256=_sha256(path)) for path in config.never_train]
    settings = _settings(config)
    fingerprint = _fingerprint(settings, [*inputs, *rules])
    if (existing := _existing(config, fingerprint)) is not None:
        return Prepared(existing, is_new=False)

    tally = _Tally()
    records = _records(config, never_train, tally, progress=progress)
    if config.limit is not None:
        records = iter(heapq.nsmallest(config.limit, records, key=lambda record: _hash("limit", record.prompt)))
    try:
        with folder_written_whole(config.out, replace=config.overwrite) as folder:
            files = _write(folder, records, config.heldout_share, tally)
            report = _report(config, fingerprint, settings, inputs, tally, files)
            (folder / REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{config.out}: cannot be written: {error.strerror or error}") from error
    return Prepared(report, is_new=True)


def is_heldout(prompt: str, share: float) -> bool:
    """Whether a prompt belongs to the held-out split of that share; a smaller share's prompts are in a larger one's."""
    return _hash("heldout", prompt) < share


def _records(config: PrepareConfig, never_train: NeverTrain, tally: _Tally, *, progress: bool) -> Iterator[Record]:
    record_filter = RecordFilter(config.filters, never_train)
    with tqdm(desc="reading", unit=" records", disable=None if progress else True, leave=False) as bar:
        for source in config.sources:
            for item in source.read():
                bar.update()
                if isinstance(item, Malformed):
                    tally.malformed[source] += 1
                    if tally.malformed[source] <= _NUM_NAMED:
                        tally.named.append(str(item))
                    continue
                tally.read[source] += 1
                filtered = record_filter.apply(item)
                if filtered.record is None:
                    assert filtered.reason is not None
                    tally.dropped[filtered.reason] += 1
                    continue
                record = _as_asked(filtered.record, config.completion_share)
                if record is not filtered.record and not record_filter.is_new(record.prompt):
                    tally.dropped[Reason.DUPLICATE] += 1
                    continue
                if filtered.reason is not None:
                    tally.shortened[filtered.reason] += 1
                yield record
            if not tally.read[source]:
                why = f": {tally.named[-1]}" if tally.malformed[source] else ": the file is empty"
                raise DataError(f"{source.path}: nothing usable in it{why}")


def _as_asked(record: Record, completion_share: float) -> Record:
    """The record, or for a share of the chats the opening words of their prompt, as a text to be continued.

    People complete raw prompts as well as they chat; heads that have only seen a chat template guess badly there.
    """
    if not isinstance(record, ChatRecord) or _hash("completion", record.prompt) >= completion_share:
        return record
    words = list(_WORD.finditer(record.prompt))
    span = _MAX_OPENING_WORDS - _MIN_OPENING_WORDS + 1
    num_words = _MIN_OPENING_WORDS + int(_hash("opening", record.prompt) * span)
    if len(words) < _MIN_OPENING_WORDS:
        return record
    start, end = words[0].start(), words[min(num_words, len(words)) - 1].end()
    return TextRecord.of(record.prompt[start:end], record.source)


def _write(folder: Path, records: Iterator[Record], heldout_share: float, tally: _Tally) -> dict[str, FileRecord]:
    with (folder / TRAIN_FILE).open("xb") as train, (folder / HELDOUT_FILE).open("xb") as heldout:
        for record in records:
            split, file = ("heldout", heldout) if is_heldout(record.prompt, heldout_share) else ("train", train)
            file.write(to_line(record))
            tally.kept.update([split, record.kind, f"from {record.source}"])
    paths = (folder / TRAIN_FILE, folder / HELDOUT_FILE)
    return {path.name: FileRecord(sha256=_sha256(path), size=path.stat().st_size) for path in paths}


def _report(
    config: PrepareConfig,
    fingerprint: str,
    settings: dict[str, bool | int | float | str | None],
    inputs: list[InputFile],
    tally: _Tally,
    files: dict[str, FileRecord],
) -> PrepareReport:
    num_kept = tally.kept["train"] + tally.kept["heldout"]
    if not tally.kept["train"]:
        reasons = ", ".join(f"{number} {reason}" for reason, number in tally.dropped.most_common())
        raise DataError(
            f"no record is left to train on: {sum(tally.read.values())} read, {tally.kept['heldout']} held out, "
            f"dropped: {reasons or 'none'}: give more data or other limits"
        )
    if beyond := sum(tally.read.values()) - sum(tally.dropped.values()) - num_kept:
        tally.dropped[Reason.LIMIT] = beyond
    return PrepareReport(
        fingerprint=fingerprint,
        settings=settings,
        sources=tuple(
            SourceReport(
                input=file,
                num_read=tally.read[source],
                num_malformed=tally.malformed[source],
                num_kept=tally.kept[f"from {source.name}"],
            )
            for source, file in zip(config.sources, inputs, strict=True)
        ),
        num_train=tally.kept["train"],
        num_heldout=tally.kept["heldout"],
        num_chats=tally.kept["chat"],
        num_texts=tally.kept["text"],
        dropped=dict(tally.dropped.most_common()),
        shortened=dict(tally.shortened.most_common()),
        malformed=tuple(tally.named),
        files=files,
    )


def _check(config: PrepareConfig) -> None:
    if not config.sources:
        raise TrainingError("no data is given: name a file or a packaged data set")
    paths = Counter(source.path.resolve() for source in config.sources)
    if twice := [path for path, number in paths.items() if number > 1]:
        raise TrainingError(f"{twice[0]}: given twice")
    for name in ("heldout_share", "completion_share"):
        if not 0 <= getattr(config, name) < 1:
            raise TrainingError(f"{name} must be from 0 to below 1: got {getattr(config, name)}")
    if config.filters.min_chars > config.filters.max_chars:
        raise TrainingError(f"min_chars {config.filters.min_chars} is above max_chars {config.filters.max_chars}")


def _told_apart(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """Files of the same name in different folders are called by their paths."""
    names = Counter(source.name for source in sources)
    return tuple(replace(s, title=str(s.path)) if names[s.name] > 1 else s for s in sources)


def _existing(config: PrepareConfig, fingerprint: str) -> PrepareReport | None:
    """The report of a folder that is already what is asked for."""
    out = config.out
    try:
        restore_replaced(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror}") from error
    if not out.exists():
        return None
    if not out.is_dir():
        raise DataError(f"{out}: not a folder: give another --out")
    if not any(out.iterdir()):
        return None
    if not (out / REPORT_FILE).is_file():
        raise DataError(f"{out}: holds other files than prepared data: give another folder")
    if config.overwrite:
        return None
    remedy = "give another folder, or --overwrite to replace it"
    report = PrepareReport.read(out)
    if report.fingerprint != fingerprint:
        raise DataError(f"{out}: holds data of other inputs or settings: {remedy}")
    for name, record in report.files.items():
        if _sha256(out / name) != record.sha256:
            raise DataError(f"{out / name}: changed since it was made: {remedy}")
    return report


def _settings(config: PrepareConfig) -> dict[str, bool | int | float | str | None]:
    return {
        **asdict(config.filters),
        "heldout_share": config.heldout_share,
        "completion_share": config.completion_share,
        "limit": config.limit,
    }


def _fingerprint(settings: dict[str, bool | int | float | str | None], inputs: list[InputFile]) -> str:
    content = [settings, [file.model_dump() for file in inputs]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash(purpose: str, prompt: str) -> float:
    """From 0 to below 1, evenly spread, another one for each purpose."""
    digest = hashlib.sha256(f"{purpose}:{normalized(prompt)}".encode()).digest()
    return int.from_bytes(digest[:6]) / (1 << 48)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
