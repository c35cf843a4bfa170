"""Policies by name, from a configuration."""

from __future__ import annotations

import pytest

from ucm.config import POLICY_NAMES, Config, EvictionConfig, MemoryConfig, NvmeConfig
from ucm.errors import ConfigError
from ucm.eviction import LruPolicy
from ucm.eviction_gdsf import CostModel, TreeGdsfPolicy
from ucm.eviction_policies import make_policy, policies_of
from ucm.eviction_s3fifo import S3FifoPolicy
from ucm.layout import KvDtype, KvLayout

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=64, block_tokens=16, dtype=KvDtype.FLOAT16)


def test_every_name_makes_its_policy() -> None:
    kinds = [type(make_policy(name, cost=CostModel(), capacity=8)) for name in POLICY_NAMES]
    assert kinds == [TreeGdsfPolicy, LruPolicy, S3FifoPolicy]
    with pytest.raises(ConfigError, match="tree-gdsf, lru, s3-fifo"):
        make_policy("fifo", cost=CostModel(), capacity=8)


def test_each_tier_has_the_policy_that_is_configured() -> None:
    config = Config(memory=MemoryConfig(policy="lru"), nvme=NvmeConfig(policy="s3-fifo"))
    memory, nvme = policies_of(config)(LAYOUT)
    assert isinstance(memory, LruPolicy)
    assert isinstance(nvme, S3FifoPolicy)


def test_the_default_is_tree_gdsf_with_the_namespace_s_blocks() -> None:
    config = Config(eviction=EvictionConfig(attention_tokens=100.0, nvme_load_share=0.5))
    make = policies_of(config)
    memory, nvme = make(LAYOUT)
    assert isinstance(memory, TreeGdsfPolicy)
    assert isinstance(nvme, TreeGdsfPolicy)
    assert memory._cost == CostModel(attention_tokens=100.0, block_tokens=16)
    assert nvme._cost == CostModel(attention_tokens=100.0, block_tokens=16, load_share=0.5)
    assert make(LAYOUT)[0] is not memory
