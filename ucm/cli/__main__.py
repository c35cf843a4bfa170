"""`python -m ucm.cli` is `ucm`."""

from __future__ import annotations

from . import main

main()
