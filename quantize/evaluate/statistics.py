"""Token statistics of a variant against its reference, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quantize.card import TextEvaluation
from quantize.evaluate.scores import Scored
from quantize.gate.limit import MOST_NATS, NOT_FINITE
from quantize.gate.means import positive_mean
from quantize.gate.paired import ALPHA


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
    """Perplexity, KL and top-1 agreement over the tokens of sequences that both have scored, the variant
    against the reference.

    Standard errors and the interval of the mean KL treat sequences as clusters of tokens. Where the KL is not
    known exactly, ``kl_mean`` and what belongs to it are of the lower bound, ``kl_upper`` of the upper one.
    Where scores are not finite, losses are :data:`NOT_FINITE`, by which a gate knows them.
    """
    if not all(one.finite for one in (*reference, *variant)):
        return _not_finite(reference, variant)
    kls = [known_kl(one) for one in variant]
    lengths = [len(one) for one in variant]
    log_p = [float(one.came.sum()) for one in reference]
    log_q = [float(one.came.sum()) for one in variant]
    count, clusters = sum(lengths), len(lengths)
    losses = [p - q for p, q in zip(log_p, log_q, strict=True)]
    delta, delta_se = clustered_mean(losses, lengths)
    kl, kl_se = clustered_mean([float(lower.sum()) for lower, _ in kls], lengths)
    above = [float(upper.sum()) for _, upper in kls]
    bounded = all(map(math.isfinite, above))
    kl_upper, kl_upper_se = clustered_mean(above, lengths) if bounded else (math.inf, math.inf)
    others = np.array([np.mean(one.reference_top1 != one.top1) for one in variant])
    same = sum(np.count_nonzero(one.reference_top1 == one.top1) for one in variant)
    return TextEvaluation(
        tokens=count,
        sequences=clusters,
        perplexity=_perplexity(log_q, count),
        reference_perplexity=_perplexity(log_p, count),
        delta_log_perplexity=delta,
        delta_log_perplexity_se=delta_se,
        delta_log_perplexity_skewness=clustered_skewness(losses, lengths),
        kl_mean=kl,
        kl_se=kl_se,
        kl_interval=kl_interval(kl, kl_se, clusters),
        kl_p99=percentile(np.concatenate([lower for lower, _ in kls]).tolist(), 0.99),
        kl_vocabulary=min(one.vocabulary for one in variant),
        kl_exact=all(one.exact for one in variant),
        kl_upper=kl_upper,
        kl_upper_se=kl_upper_se,
        top1_agreement=same / count,
        other_choices=float(others.mean()),
        other_choices_se=float(others.std(ddof=1)) / math.sqrt(clusters) if clusters > 1 else 0.0,
    )


def _perplexity(log_p: Sequence[float], count: int) -> float:
    return math.exp(min(MOST_NATS, -math.fsum(log_p) / count))


def _not_finite(reference: Sequence[Scored], variant: Sequence[Scored]) -> TextEvaluation:
    """What is left to say where a log-probability or a KL is no number."""
    ours = all(np.isfinite(one.came).all() for one in reference)
    count, log_p = sum(map(len, variant)), [float(one.came.sum()) for one in reference]
    same = sum(np.count_nonzero(one.reference_top1 == one.top1) for one in variant)
    return TextEvaluation(
        tokens=count,
        sequences=len(variant),
        perplexity=math.exp(MOST_NATS),
        reference_perplexity=_perplexity(log_p, count) if ours else math.exp(MOST_NATS),
        delta_log_perplexity=NOT_FINITE if ours else -NOT_FINITE,
        delta_log_perplexity_se=0.0,
        kl_mean=NOT_FINITE,
        kl_p99=NOT_FINITE,
        kl_vocabulary=min(one.vocabulary for one in variant),
        kl_exact=all(one.exact for one in variant),
        kl_upper=NOT_FINITE,
        kl_upper_se=0.0,
        top1_agreement=same / count,
    )


def known_kl(scored: Scored) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper bound of each token's KL, nats; the same array twice where it is exact."""
    if scored.kl is None or scored.kl_upper is None:
        raise ValueError("these tokens were scored without a reference; score them with score_against")
    return scored.kl, scored.kl_upper
