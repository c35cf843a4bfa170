"""Generate from a context larger than the KV pool: `python beyond_the_pool.py [MODEL]`."""

import sys

from ucm import model_hub
from ucm.engine.engine import Engine, EngineOptions
from ucm.engine.loading import load_model
from ucm.engine.sampling import SamplingParams
from ucm.kernels.block_scores import Budget
from ucm.sparse.options import SparseOptions
from ucm.sparse.slab_source import HostSlabSource

loaded = load_model(model_hub.resolve(sys.argv[1] if sys.argv[1:] else "smollm2-135m"))
prompt = [3 + (i * i + 7 * i) % 90 for i in range(1600)]  # 50 blocks of 32 tokens
sparse = SparseOptions(budget=Budget(ratio=0.3), resident_blocks=24)
options = EngineOptions(num_blocks=24, sparse=sparse)
source = HostSlabSource(1 << 30)  # bytes of host memory for what the pool cannot hold
with Engine(loaded.model, loaded.tokenizer, options, source=source) as engine:
    (result,) = engine.generate_all([prompt], SamplingParams(max_tokens=8, ignore_eos=True))
    stats = engine.sparse_stats
source.close()  # after the engine
print(f"{len(result.outputs[0].token_ids)} tokens, {stats.sparse_steps} sparse steps")
print(f"read {stats.blocks_read} of {stats.blocks_dense} blocks")
