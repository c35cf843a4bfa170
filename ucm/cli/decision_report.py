"""What was decided about the cache's blocks, and on what grounds: `ucm generate --explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ucm.connectors.session import CacheSession

_ESTIMATES_LEGEND: Final = """\
  priors      assumed, because too little of it was seen yet
  mapped      read through memory that the daemon fills; direct: from its files
  contention  what computing loses to each MB that is loaded meanwhile"""


def decision_figures(session: CacheSession | None) -> dict[str, object] | None:
    """What was decided, for programs; None where there was nothing to decide."""
    if session is None or not session.loads.decisions:
        return None
    decision = session.loads.decisions[-1]
    return {
        "kind": decision.kind.value,
        "num_blocks": decision.num_blocks,
        "mode": decision.mode.value,
        "order": decision.order.value,
        "read_ahead_layers": decision.read_ahead_layers,
        "predicted_ttft_s": decision.predicted_ttft_s,
        "alternatives_s": decision.alternatives,
        "estimates": decision.estimates.source,
    }


def explanation(session: CacheSession | None) -> str:
    """The last decision in words, what the model has learnt since, and what the words mean."""
    if session is None:
        return "no cache, nothing to decide: everything is computed (--cache names one)"
    learnt = str(session.loads.model.snapshot())
    if not session.loads.decisions:
        return "\n".join(
            ["nothing was loaded: the cache had none of it", learnt, "legend:", _ESTIMATES_LEGEND]
        )
    decided = session.loads.decisions[-1].explain()
    count = len(session.loads.decisions)
    if count > 1:
        decided = f"the last of {count} loads, each decided by itself:\n{decided}"
    return "\n".join([decided, "afterwards:", learnt, "legend:", _ways_legend(), _ESTIMATES_LEGEND])


def _ways_legend() -> str:
    from ucm.load_decision import SLACK

    return f"""\
  *           taken: the soonest way, or a simpler one at most {SLACK:.0%} later
  load_all    read every block that the cache has
  load_part   read the first of them, compute the others meanwhile
  hybrid      read from the last one back, compute from the front, until both meet
  compute     read nothing"""
