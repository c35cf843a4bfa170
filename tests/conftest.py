"""Test configuration: `ucm` is the installed package; the root folders are not importable."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = str(Path(__file__).resolve().parents[1])
sys.path[:] = [entry for entry in sys.path if entry not in (ROOT, "")]

# As the command line does: threads that spin at barriers starve the processes of other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Whatever was measured on this machine: tests choose kernels by estimates.
os.environ.setdefault("UCM_KERNEL_TABLE", "none")

settings.register_profile("fast", deadline=None, print_blob=True)
settings.register_profile("deep", deadline=None, print_blob=True, max_examples=2000)
settings.load_profile(os.environ.get("UCM_HYPOTHESIS_PROFILE", "fast"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI nothing may be skipped: what a test needs, `.ci/run` provides."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    skipped = reporter.stats.get("skipped", [])
    if skipped and os.environ.get("CI", "").lower() in {"1", "true"}:
        names = ", ".join(report.nodeid for report in skipped)
        reporter.write_line(f"skipped, which is a failure where CI=true: {names}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
