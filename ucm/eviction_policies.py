"""The eviction policies by the names that configuration gives them."""

from __future__ import annotations

from collections.abc import Callable

from .config import POLICY_NAMES, Config
from .errors import ConfigError
from .eviction import EvictionPolicy, LruPolicy
from .eviction_gdsf import CostModel, TreeGdsfPolicy
from .eviction_s3fifo import S3FifoPolicy
from .layout import KvLayout

PolicyFactory = Callable[[KvLayout], tuple[EvictionPolicy, EvictionPolicy]]
"""Fresh policies for the memory and the NVMe tier of one namespace."""


def make_policy(name: str, *, cost: CostModel, capacity: int) -> EvictionPolicy:
    """A policy for one empty tier of one namespace.

    Args:
        name: one of `POLICY_NAMES`.
        cost: what a hit saves, for the policy that asks.
        capacity: blocks that the tier can hold.

    Raises:
        ConfigError: no policy has that name.
    """
    if name == "tree-gdsf":
        return TreeGdsfPolicy(cost, capacity)
    if name == "s3-fifo":
        return S3FifoPolicy(capacity)
    if name == "lru":
        return LruPolicy()
    raise ConfigError(f"no eviction policy {name!r}: one of {', '.join(POLICY_NAMES)} is expected")


def policies_of(config: Config) -> PolicyFactory:
    """What makes the policies that `config` names."""

    def make(layout: KvLayout) -> tuple[EvictionPolicy, EvictionPolicy]:
        tiers = (
            (config.memory.policy, config.memory.capacity_bytes, 0.0),
            (config.nvme.policy, config.nvme.capacity_bytes, config.eviction.nvme_load_share),
        )
        memory, nvme = (
            make_policy(
                policy,
                cost=CostModel(
                    attention_tokens=config.eviction.attention_tokens,
                    block_tokens=layout.block_tokens,
                    load_share=load_share,
                ),
                capacity=capacity_bytes // layout.block_bytes,
            )
            for policy, capacity_bytes, load_share in tiers
        )
        return memory, nvme

    return make
