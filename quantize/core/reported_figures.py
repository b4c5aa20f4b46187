"""Figures of a card that are reported and gate nothing: how alike texts are, and how distributions differ.

Gates test losses with error rates that are known (:mod:`quantize.gate`); what stands here is what others
report, for comparison with them. Needs pydantic alone.
"""

from __future__ import annotations

from pydantic import Field

from quantize.core.engine_figures import Strict


class Beside(Strict):
    """The mean of a score over items, of the variant and of the reference, and whether they differ."""

    variant: float
    reference: float
    wilcoxon_p: float | None = Field(
        default=None, description="two-sided signed-rank test of the items' differences; None where undefined"
    )
    t_p: float | None = Field(default=None, description="two-sided paired t-test of the same")


class Reported(Strict):
    """Of one role, beside the reference on the same items."""

    texts: dict[str, Beside] = Field(
        default_factory=dict,
        description="rouge1, rouge2, rougeL, f1 (0 to 1) and bleu (0 to 100) to the items' right answers, "
        "where these are texts and the libraries are there",
    )
    scores: Beside = Field(
        description="log-probability of right answers, nats per token, a conversation each"
    )
    js_answers: float = Field(
        ge=0,
        le=1,
        description="Jensen-Shannon distance (base 2) of the distributions of answers, or of words of texts",
    )
    wasserstein_scores: float = Field(ge=0, description="of the tokens' log-probabilities, nats")
    wasserstein_words: float = Field(ge=0, description="of the answers' lengths, words")
