"""From logits to tokens, reproducibly.

    logits -> repetition penalty -> temperature -> top-k -> top-p and min-p -> Gumbel-max

The noise of a draw is a pure function of (seed, sample index, position, token id): Philox in
counter mode, keyed by the first two and counted by the third. So a request's output does not
depend on what else is in the batch, on chunking, on preemption, or on how many draws came before.

Sources: Philox, "Parallel Random Numbers: As Easy as 1, 2, 3" (Salmon et al., SC 2011); Gumbel-max,
"A* Sampling" (arXiv:1411.0030); nucleus sampling (arXiv:1904.09751); min-p (arXiv:2407.01082);
repetition penalty, CTRL (arXiv:1909.05858).

Envelope: greedy reads the row twice (200 KB at 49,152 tokens, about 30 us); a random draw costs
about 1.5 ms a row, most of it the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ucm.errors import CorruptionError, InvalidArgumentError

MAX_SAMPLES = 64
"""Parallel samples of one request; each holds a place in the batch."""

MAX_SEED = 2**64 - 1

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen, and when it ends."""

    max_tokens: int = 128
    """Tokens to generate at most, for each sample."""
    temperature: float = 0.0
    """0 is greedy: the most probable token, and the filters below do nothing."""
    top_k: int = 0
    """Keep the `top_k` most probable tokens; 0 keeps all. Of equal ones the lowest id stays."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens that has this much probability."""
    min_p: float = 0.0
    """Keep tokens at least this many times as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen in prompt or output, multiplies negative ones."""
    seed: int = 0
    """Two requests with the same prompt, seed and parameters get the same tokens."""
    n: int = 1
    """Samples that share the prompt; sample i draws with the key (seed, i)."""
    stop_token_ids: tuple[int, ...] = ()
    """End a sample besides the tokenizer's end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token, for benchmarks."""

    def __post_init__(self) -> None:
        checks = (
            (self.max_tokens >= 1, f"max_tokens is {self.max_tokens}, must be >= 1"),
            (
                0.0 <= self.temperature < float("inf"),
                f"temperature is {self.temperature}, must be >= 0 and finite",
            ),
            (self.top_k >= 0, f"top_k is {self.top_k}, must be >= 0 (0 keeps all tokens)"),
            (0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}, must be in (0, 1]"),
            (0.0 <= self.min_p <= 1.0, f"min_p is {self.min_p}, must be in [0, 1]"),
            (
                0.0 < self.repetition_penalty < float("inf"),
                f"repetition_penalty is {self.repetition_penalty}, must be > 0 (1 is none)",
            ),
            (0 <= self.seed <= MAX_SEED, f"seed is {self.seed}, must be in 0..2**64-1"),
            (1 <= self.n <= MAX_SAMPLES, f"n is {self.n}, must be in 1..{MAX_SAMPLES}"),
        )
        for is_valid, message in checks:
            if not is_valid:
                raise InvalidArgumentError(f"sampling: {message}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One token to choose."""

    row: int
    """Row of the logits; several draws may share one."""
    params: SamplingParams
    sample_index: int
    """0 to n - 1."""
    position: int
    """Position of the new token in its sequence."""
    seen: npt.NDArray[np.bool_] | None = None
    """[vocab] tokens of prompt and output; needed for a repetition penalty only."""


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Choose one token a draw.

    Args:
        logits: [n, vocab] fp32, any device; not changed.
        draws: what to choose.

    Raises:
        CorruptionError: a row is NaN, or has no token left: the model or its KV is broken.
    """
    rows: Scores = logits.detach().to("cpu", torch.float32).numpy()
    return [_draw_token(rows[draw.row], draw) for draw in draws]


def _draw_token(row: Scores, draw: Draw) -> int:
    params = draw.params
    if not np.isfinite(row.max()):
        raise CorruptionError(
            f"sampling: the largest logit at position {draw.position} is {row.max()}; "
            "the weights or the KV cache are damaged"
        )
    if params.repetition_penalty != 1.0 and draw.seen is not None:
        row = penalise(row, draw.seen, params.repetition_penalty)
    if params.temperature == 0.0:
        return int(row.argmax())
    with np.errstate(over="ignore"):  # a tiny temperature: all but the largest become -inf
        scores = (row.astype(np.float64) - float(row.max())) / params.temperature
    token_ids = keep(scores, params)
    noise = gumbel_noise(len(row), params.seed, draw.sample_index, draw.position)
    return int(token_ids[(scores[token_ids] + noise[token_ids]).argmax()])


def penalise(row: Scores, seen: npt.NDArray[np.bool_], penalty: float) -> Scores:
    """A copy of `row` with the repetition penalty applied to the tokens of `seen`."""
    token_ids = np.flatnonzero(seen)
    values = row[token_ids].astype(np.float64)
    limit = float(np.finfo(np.float32).max)
    with np.errstate(over="ignore"):
        penalised = np.where(values > 0, values / penalty, values * penalty)
    result = row.copy()
    result[token_ids] = np.clip(penalised, -limit, limit)
    return result


def keep(scores: npt.NDArray[np.float64], params: SamplingParams) -> npt.NDArray[np.int64]:
    """Ids of the tokens that top-k, top-p and min-p leave, ascending; never empty.

    Args:
        scores: [vocab] logits after temperature.
        params: the filters; top-p and min-p see the distribution that top-k left.
    """
    token_ids = _top_k(scores, params.top_k)
    if params.top_p == 1.0 and params.min_p == 0.0:
        return token_ids
    weights = np.exp(scores[token_ids] - scores[token_ids].max())
    kept = weights >= params.min_p
    if params.top_p < 1.0:
        kept &= _nucleus(weights / weights.sum(), params.top_p)
    return np.asarray(token_ids[kept], dtype=np.int64)


def _top_k(scores: npt.NDArray[np.float64], top_k: int) -> npt.NDArray[np.int64]:
    if top_k == 0 or top_k >= len(scores):
        return np.arange(len(scores))
    threshold = np.partition(scores, -top_k)[-top_k]
    above = np.flatnonzero(scores > threshold)
    equal = np.flatnonzero(scores == threshold)[: top_k - len(above)]
    return np.sort(np.concatenate((above, equal)))


def _nucleus(probabilities: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.bool_]:
    """Which tokens are in the nucleus.

    Tokens below (1 - top_p) / n have less than 1 - top_p together, so none of them is in it and
    only the others have to be sorted.
    """
    kept = np.zeros(len(probabilities), dtype=np.bool_)
    candidates = np.flatnonzero(probabilities >= (1.0 - top_p) / len(probabilities))
    order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept[order[before < top_p]] = True
    return kept


def gumbel_noise(
    vocab_size: int, seed: int, sample_index: int, position: int
) -> npt.NDArray[np.float64]:
    """[vocab] Gumbel(0, 1) noise of one draw; a pure function of its arguments.

    Raw Philox output is used, because NumPy promises that only the bit stream never changes.
    """
    key = np.array([seed, sample_index], dtype=np.uint64)
    counter = np.array([0, position, 0, 0], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw(vocab_size)
    uniform = (np.asarray(bits, dtype=np.uint64) >> np.uint64(11)) * 2.0**-53 + 2.0**-54
    return np.asarray(-np.log(-np.log(uniform)), dtype=np.float64)
