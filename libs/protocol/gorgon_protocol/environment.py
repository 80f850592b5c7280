"""What the services do alike with the variables of their environment: refuse unknown ones, say in one line what does
not fit, read secrets out of files."""

import os
import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from gorgon_protocol.errors import BadRequestError

_MAX_SECRET_BYTES: Final = 4096


def refuse_unknown(names: Iterable[str], *, prefix: str, fields: Collection[str], service: str) -> None:
    """names: of variables, those with another prefix count for nothing; fields: of the service's settings. Raises
    `BadRequestError` that names the first unknown variable and what may have been meant."""
    known = {prefix + field.upper() for field in fields}
    unknown = sorted(name for name in names if name.upper().startswith(prefix) and name.upper() not in known)
    if not unknown:
        return
    name = unknown[0]
    if re.search(r"_(SERVICE_(HOST|PORT)|PORT_\d+_TCP)", name):
        hint = "Kubernetes sets it for a service of that name: use `enableServiceLinks: false`"
    else:
        close = get_close_matches(name.upper(), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see the settings table of the {service}"
    raise BadRequestError(f"{name} is not a setting of the {service}: {hint}")


def one_line(error: ValidationError, *, prefix: str) -> str:
    """The first thing that is wrong, behind the name of its variable."""
    first = error.errors(include_url=False)[0]
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    if not first["loc"]:
        return message
    name = prefix + str(first["loc"][0]).upper()
    # Kubernetes gives every container such a variable for each service of the namespace, named after it.
    if os.environ.get(name, "").startswith("tcp://"):
        message += " (set by Kubernetes for a service of that name: use `enableServiceLinks: false`)"
    return f"{name}: {message}"


def read_secret(variable: str, path: Path | None) -> str | None:
    """What the file holds, without white space around it; None without a file. Raises `BadRequestError` where it cannot
    be read or holds no secret."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_SECRET_BYTES + 1).strip()
    except OSError as error:
        raise BadRequestError(f"{variable}: {path}: cannot be read: {error.strerror}") from None
    if not content or len(content) > _MAX_SECRET_BYTES or not re.fullmatch(rb"[\x21-\x7e]+", content):
        raise BadRequestError(
            f"{variable}: {path}: must hold one line of 1 to {_MAX_SECRET_BYTES} printable characters"
        )
    return content.decode("ascii")
