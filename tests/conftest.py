"""Test configuration: `ucm` is the installed package; the root folders are not importable."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import settings

ROOT = str(Path(__file__).resolve().parents[1])
sys.path[:] = [entry for entry in sys.path if entry not in (ROOT, "")]

settings.register_profile("fast", deadline=None, print_blob=True)
settings.register_profile("deep", deadline=None, print_blob=True, max_examples=2000)
settings.load_profile(os.environ.get("UCM_HYPOTHESIS_PROFILE", "fast"))
