"""Token statistics of a variant against its reference, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantize.card import TextEvaluation
from quantize.evaluate.client import TokenScores

_FLOOR = 1e-12
"""Smallest probability that a leftover mass is taken for, against rounding below zero."""


def kl_lower_bound(reference: TokenScores, variant: TokenScores) -> float:
    """KL(reference || variant) in nats, with every token that is not in both sets as one bucket.

    Merging tokens can only lower a KL divergence (data-processing inequality), so this is a lower
    bound, exact when both sets are the whole vocabulary.
    """
    shared = reference.keys() & variant.keys()
    divergence, rest_p, rest_q = 0.0, 1.0, 1.0
    for token in shared:
        p, q = math.exp(reference[token]), math.exp(variant[token])
        divergence += p * (reference[token] - variant[token])
        rest_p -= p
        rest_q -= q
    rest_p, rest_q = max(rest_p, _FLOOR), max(rest_q, _FLOOR)
    return max(0.0, divergence + rest_p * math.log(rest_p / rest_q))


def likeliest(scores: TokenScores) -> int:
    return max(scores, key=lambda token: scores[token])


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def compare_tokens(
    sequences: Sequence[Sequence[int]],
    reference: Sequence[Sequence[TokenScores]],
    variant: Sequence[Sequence[TokenScores]],
    vocabulary: int,
) -> TextEvaluation:
    """Perplexity, KL and top-1 agreement over all tokens of ``sequences``.

    ``reference`` and ``variant`` hold, per sequence, the scores of each of its tokens in its context.
    The standard error of the difference in log-perplexity treats sequences as independent and the
    tokens within one as not (cluster-robust).
    """
    log_p, log_q, kls, same = 0.0, 0.0, [], 0
    differences = []
    for tokens, ours, theirs in zip(sequences, reference, variant, strict=True):
        p = [row[token] for token, row in zip(tokens, ours, strict=True)]
        q = [row[token] for token, row in zip(tokens, theirs, strict=True)]
        log_p, log_q = log_p + sum(p), log_q + sum(q)
        differences.append((sum(p) - sum(q), len(p)))
        for before, after in zip(ours, theirs, strict=True):
            kls.append(kl_lower_bound(before, after))
            same += likeliest(before) == likeliest(after)
    count = len(kls)
    delta = (log_p - log_q) / count
    residuals = sum((total - delta * length) ** 2 for total, length in differences)
    clusters = len(differences)
    spread = math.sqrt(residuals * clusters / max(1, clusters - 1)) / count
    return TextEvaluation(
        tokens=count,
        perplexity=math.exp(-log_q / count),
        reference_perplexity=math.exp(-log_p / count),
        delta_log_perplexity=delta,
        delta_log_perplexity_se=spread,
        kl_mean=sum(kls) / count,
        kl_p99=percentile(kls, 0.99),
        kl_vocabulary=vocabulary,
        top1_agreement=same / count,
    )
