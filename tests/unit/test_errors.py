"""Errors: one base, each leaf with a gRPC status that exists."""

from __future__ import annotations

import grpc
import pytest

from ucm import errors
from ucm.errors import LEAVES, CapacityError, TierUnavailableError, UcmError


def test_leaves_are_all_the_leaves() -> None:
    found = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, UcmError) and value is not UcmError
    }
    assert found == set(LEAVES)
    assert len(LEAVES) == len(found)


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_travels_as_a_status_that_grpc_knows(leaf: type[UcmError]) -> None:
    assert leaf.grpc_status in {code.name for code in grpc.StatusCode}
    assert leaf.grpc_status != "OK"
    assert leaf.__doc__


def test_what_may_be_tried_again() -> None:
    assert {leaf for leaf in LEAVES if leaf.retryable} == {CapacityError, TierUnavailableError}
