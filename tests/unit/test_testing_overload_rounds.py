"""What the overload measurement reports of the turns that it has taken."""

from __future__ import annotations

from ucm.testing.load_processes import Turn
from ucm.testing.overload_rounds import report


def test_a_client_that_is_never_served_has_no_load() -> None:
    alone = [Turn(load_s=[0.01], loads=[1], duration_s=1.0)] * 2
    crowd = [
        Turn(load_s=[0.02] * 3, refused_s=[0.001], loads=[3, 0, 0], duration_s=1.0),
        Turn(load_s=[0.02], refused_s=[0.001], loads=[0, 1, 0], duration_s=1.0),
    ]
    found = report({"alone": alone, "few": alone, "crowd": crowd})
    line = found["crowd"]
    assert isinstance(line, dict)
    assert line["loads_of_a_client_min_median_max"] == [0, 1, 3]
    assert line["clients_served"] == 2
    assert found["p99_ratio"] == 2.0
