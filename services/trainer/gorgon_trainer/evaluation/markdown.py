"""Markdown out of plain data."""

from collections.abc import Iterable, Sequence

Cell = str | int | float | None


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table whose columns of numbers stand to the right; None is a dash."""
    body = [list(row) for row in rows]
    marks = ["---:" if all(_is_number(row[i]) for row in body) else "---" for i in range(len(header))]
    return "\n".join([_line(header), _line(marks), *(_line([cell(value) for value in row]) for row in body)])


def cell(value: Cell) -> str:
    """Counts with separators, figures with two decimals or three digits, whichever says more."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if abs(value) >= 1000 or (abs(value) >= 10 and float(value).is_integer()):
        return f"{value:,.0f}"
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0.0 else f"{value:.3g}"


def percent(share: float) -> str:
    return f"{share:.1%}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as far as there are any."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def code(lines: Iterable[str]) -> str:
    return "\n".join(["```sh", *lines, "```"])


def section(title: str, *parts: str) -> str:
    """A heading with what is not empty below it, nothing where all is."""
    filled = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *filled]) if filled else ""


def document(*parts: str) -> bytes:
    return ("\n\n".join(part for part in parts if part) + "\n").encode()


def _is_number(value: Cell) -> bool:
    return not isinstance(value, str) or value.endswith("%")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in cells) + " |"
