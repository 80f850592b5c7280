"""What all tests share: real models, and no silent skips."""

import os
from pathlib import Path

import pytest

from gorgon_engine.models.fetch import fetch_model

_NEEDS_GPU = "needs a Hopper GPU')"  # the end of a skipped test's (file, line, reason)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched once."""
    return fetch_model("smollm2", progress=False)


class _Skips:
    """A skipped test looks like a passed one in a summary: in CI it fails the run. Machines of a CI have no GPU: what
    needs one may be skipped there, and nothing else."""

    def __init__(self) -> None:
        self.reports: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail") and not str(report.longrepr).endswith(_NEEDS_GPU):
            self.reports.append(f"{report.nodeid}: {report.longrepr}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.reports and os.environ.get("CI"):
            print("\nskipped in CI:", *self.reports, sep="\n  ")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Skips(), "skips-fail-in-ci")
