"""The requirements of extras in pyproject.toml, a line each: `python scripts/requirements.py gateway`.

Images install them before the code, in a layer that changes with the requirements alone.
"""

import re
import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str], project: dict[str, object]) -> list[str]:
    """Without torch, which images choose by themselves. Raises `KeyError` for an extra that is not there."""
    dependencies, optional = project["dependencies"], project["optional-dependencies"]
    assert isinstance(dependencies, list)
    assert isinstance(optional, dict)
    found: dict[str, None] = dict.fromkeys(dependencies)
    waiting = list(extras)
    while waiting:
        for requirement in optional[waiting.pop(0)]:
            own = re.fullmatch(r"gorgon\[([a-z,]+)\]", requirement)
            if own:
                waiting += own[1].split(",")
            elif not re.match(r"torch\b", requirement):
                found[requirement] = None
    return list(found)


if __name__ == "__main__":
    source = Path(__file__).parents[1] / "pyproject.toml"
    print(*requirements(sys.argv[1:], tomllib.loads(source.read_text())["project"]), sep="\n")
