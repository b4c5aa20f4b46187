"""Bounds of a KL divergence between distributions of which some tokens' probabilities are known.

Let K be the tokens that both sides tell, P and Q the probability that each leaves to all others. Then

- KL >= sum over K of p ln(p/q) + P ln(P/Q), by the log-sum inequality: the others taken as one token.
- KL <= sum over K of p ln(p/q) + sum over the others of p ln p - P ln f, where f bounds the variant's
  probability of any token from below. The sum of p ln p is at most P ln c, where c bounds the reference's
  probability of a token that it did not tell (its likeliest ones were told, so the least of these does).

Nothing that a server tells of its likeliest tokens gives f: a token that is not among them may have any
small probability, and the divergence is then without bound. It takes knowledge of the model. Where its logits
are capped, |logit| <= s (Gemma 2 has s = 30), ln q of any token is at least ln(largest q) - 2 s: the largest
is at most s, so the normalizer is at most s - ln(largest q), and the least is at least -s. With P small
enough, that is a useful bound. Otherwise the upper bound is infinite, and such a measurement passes no gate
on KL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

_FLOOR = 1e-12
"""Smallest probability that a leftover mass is taken for, against rounding below zero."""


def kl_bounds(
    reference: Mapping[int, float],
    variant: Mapping[int, float],
    cap: float = 0.0,
    vocabulary: int | None = None,
    softcap: float | None = None,
) -> tuple[float, float]:
    """Lower and upper bound of KL(reference || variant), nats, from log-probabilities by token id.

    ``cap`` is the largest log-probability that the reference may give a token that it did not tell;
    ``vocabulary`` the number of tokens there are, where it is known; ``softcap`` the largest magnitude of the
    variant's logits. The bounds are as good as the values: float32 ones move them by about 1e-6, and where
    one is no number neither are they.
    """
    shared = reference.keys() & variant.keys()
    known = math.fsum(math.exp(reference[t]) * _gap(reference[t], variant[t]) for t in shared)
    if math.isnan(known):
        return known, known
    if len(shared) == vocabulary:
        return max(0.0, known), max(0.0, known)
    p_left = max(1 - math.fsum(math.exp(reference[t]) for t in shared), _FLOOR)
    q_left = max(1 - math.fsum(math.exp(variant[t]) for t in shared), _FLOOR)
    lower = max(0.0, known + p_left * math.log(p_left / q_left))
    if softcap is None:
        return lower, math.inf
    floor = max(variant.values()) - 2 * softcap
    alone = [reference[token] for token in reference.keys() - shared]
    told = math.fsum(math.exp(value) * (value - floor) for value in alone)
    rest = max(p_left - math.fsum(map(math.exp, alone)), _FLOOR)
    return lower, max(lower, known + told + rest * (min(cap, math.log(rest)) - floor))


def _gap(p: float, q: float) -> float:
    return 0.0 if p == -math.inf else p - q
