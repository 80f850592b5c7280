"""The gateway keeps to its own OpenAPI description, whatever comes."""

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).with_name("fuzz_openapi.py")


def test_no_request_breaks_the_gateway() -> None:
    """In a process of its own: importing schemathesis changes how hypothesis draws text, for every other test."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FUZZ)]
    done = subprocess.run(command, cwd=FUZZ.parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    assert " passed" in done.stdout
