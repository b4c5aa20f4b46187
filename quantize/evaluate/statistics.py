"""Token statistics of a variant against its reference, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from quantize.card import TextEvaluation
from quantize.evaluate.scores import Scored
from quantize.gate.means import positive_mean
from quantize.gate.paired import ALPHA

_FLOOR = 1e-12
"""Smallest probability that a leftover mass is taken for, against rounding below zero."""


def kl_lower_bound(reference: Mapping[int, float], variant: Mapping[int, float]) -> float:
    """KL(reference || variant) in nats, with every token that is not in both sets as one bucket.

    Merging tokens can only lower a KL divergence (data-processing inequality), so this is a lower
    bound, exact when both sets are the whole vocabulary.
    """
    shared = reference.keys() & variant.keys()
    divergence, rest_p, rest_q = 0.0, 1.0, 1.0
    for token in shared:
        p, q = math.exp(reference[token]), math.exp(variant[token])
        if p > 0:
            divergence += p * (reference[token] - variant[token])
        rest_p -= p
        rest_q -= q
    rest_p, rest_q = max(rest_p, _FLOOR), max(rest_q, _FLOOR)
    return max(0.0, divergence + rest_p * math.log(rest_p / rest_q))


def kl_per_token(reference: Scored, variant: Scored) -> NDArray[np.float64]:
    """(n,): KL(reference || variant), nats. Exact where both know the whole vocabulary, else a bound."""
    if reference.whole and variant.whole:
        p, q = reference.values.astype(np.float64), variant.values.astype(np.float64)
        # float32 rows sum to one only to 1e-6, which would be larger than a small divergence.
        p -= np.log(np.exp(p).sum(axis=1, keepdims=True))
        q -= np.log(np.exp(q).sum(axis=1, keepdims=True))
        difference = np.subtract(p, q, out=np.zeros_like(p), where=np.isfinite(p))
        kl: NDArray[np.float64] = np.maximum(0.0, (np.exp(p) * difference).sum(axis=1))
        return kl
    return np.array([kl_lower_bound(reference.row(i), variant.row(i)) for i in range(len(reference))])


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def clustered_mean(totals: Sequence[float], lengths: Sequence[int]) -> tuple[float, float]:
    """Mean per token and its standard error, from the sum and number of tokens of each sequence.

    Sequences are independent and the tokens within one are not: the ratio estimator's linearized
    variance with the factor c / (c - 1) for c sequences (Cochran, Sampling Techniques, 3rd ed., 6.4).
    The standard error of a single sequence is 0, which says nothing.
    """
    count, clusters = sum(lengths), len(lengths)
    mean = math.fsum(totals) / count
    residuals = math.fsum((total - mean * length) ** 2 for total, length in zip(totals, lengths, strict=True))
    return mean, math.sqrt(residuals * clusters / max(1, clusters - 1)) / count


def clustered_skewness(totals: Sequence[float], lengths: Sequence[int]) -> float:
    """Sample skewness of the residuals of sequences, those whose squares :func:`clustered_mean` sums.

    Fisher and Pearson's, adjusted for the sample's size (Joanes and Gill, The Statistician 1998;47:183).
    0 for fewer than three sequences, or where all are alike.
    """
    clusters = len(lengths)
    mean = math.fsum(totals) / sum(lengths)
    residuals = np.array(totals, dtype=np.float64) - mean * np.array(lengths, dtype=np.float64)
    residuals -= residuals.mean()
    spread = float(np.mean(residuals**2))
    if clusters < 3 or spread <= 0:
        return 0.0
    adjusted = math.sqrt(clusters * (clusters - 1)) / (clusters - 2)
    return float(np.mean(residuals**3)) / float(spread**1.5) * adjusted


def kl_interval(mean: float, error: float, sequences: int) -> tuple[float, float] | None:
    """95 % of a mean KL, by the quantiles that the gate tests it with. None for a single sequence."""
    if sequences < 2:
        return None
    estimate = positive_mean(mean, error, sequences)
    return max(0.0, estimate.lower_bound(ALPHA / 2)), estimate.upper_bound(ALPHA / 2)


def compare_tokens(reference: Sequence[Scored], variant: Sequence[Scored]) -> TextEvaluation:
    """Perplexity, KL and top-1 agreement over the tokens of sequences that both have scored.

    Standard errors and the interval of the mean KL treat sequences as clusters of tokens.
    """
    lengths = [len(one) for one in reference]
    kls = [kl_per_token(p, q) for p, q in zip(reference, variant, strict=True)]
    log_p = [float(one.came.sum(dtype=np.float64)) for one in reference]
    log_q = [float(one.came.sum(dtype=np.float64)) for one in variant]
    count, clusters = sum(lengths), len(lengths)
    losses = [p - q for p, q in zip(log_p, log_q, strict=True)]
    delta, delta_se = clustered_mean(losses, lengths)
    kl, kl_se = clustered_mean([float(one.sum()) for one in kls], lengths)
    same = sum(int((p.top1() == q.top1()).sum()) for p, q in zip(reference, variant, strict=True))
    both = [*reference, *variant]
    return TextEvaluation(
        tokens=count,
        sequences=clusters,
        perplexity=math.exp(-math.fsum(log_q) / count),
        reference_perplexity=math.exp(-math.fsum(log_p) / count),
        delta_log_perplexity=delta,
        delta_log_perplexity_se=delta_se,
        delta_log_perplexity_skewness=clustered_skewness(losses, lengths),
        kl_mean=kl,
        kl_se=kl_se,
        kl_interval=kl_interval(kl, kl_se, clusters),
        kl_p99=percentile(np.concatenate(kls).tolist(), 0.99),
        kl_vocabulary=min(one.values.shape[1] for one in both),
        kl_exact=all(one.whole for one in both),
        top1_agreement=same / count,
    )
