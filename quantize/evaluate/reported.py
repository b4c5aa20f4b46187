"""What is reported beside the gates: ROUGE, BLEU and F1 of texts, distances of distributions, and the
signed-rank and t-tests. None of it passes or fails a variant.

Texts are compared with an item's right answer, where that is one (:data:`WORDS` words or more on average);
of labels the exact check says all there is. rouge-score and sacrebleu come with the extra ``quantize``;
without them F1 stands alone. Distances and tests are SciPy's.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from unicodedata import category

from quantize.core.reported_figures import Beside, Reported
from quantize.evaluate.grounding import words
from quantize.evaluate.scores import Scored
from quantize.evaluate.tasks import Item
from quantize.gate.limit import NOT_FINITE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WORDS = 4
"""Of a right answer on average, from which on it is a text and not a label."""
ROUGE = ("rouge1", "rouge2", "rougeL")
Score = Callable[[str, str], float]
"""Right answer and given answer to a figure from 0 to 1."""


def reported(
    items: Mapping[int, Item],
    before: Mapping[int, str],
    after: Mapping[int, str],
    scored: Sequence[tuple[Scored, Scored]],
) -> Reported:
    """Of a role's ``items``, answers of the reference ``before`` and of the variant ``after``, and the scores
    of right answers, (reference's, variant's) a conversation each."""
    import numpy as np

    texts = are_texts(items.values())
    pairs = [(_numbers(reference.came), _numbers(variant.came)) for reference, variant in scored]
    ours = [float(np.mean(variant)) for _, variant in pairs]
    theirs = [float(np.mean(reference)) for reference, _ in pairs]
    split: Callable[[str], list[str]] = words if texts else lambda text: [text.strip()]
    return Reported(
        texts=_texts(items, before, after) if texts else {},
        scores=beside(ours, theirs),
        js_answers=js_distance(
            Counter(word for index in items for word in split(before[index])),
            Counter(word for index in items for word in split(after[index])),
        ),
        wasserstein_scores=wasserstein(
            np.concatenate([reference for reference, _ in pairs]),
            np.concatenate([variant for _, variant in pairs]),
        ),
        wasserstein_words=wasserstein(
            np.array([len(words(before[index])) for index in items], dtype=np.float64),
            np.array([len(words(after[index])) for index in items], dtype=np.float64),
        ),
    )


def _numbers(came: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-probabilities, with the worst of all in the place of what is not finite."""
    import numpy as np

    return np.where(np.isfinite(came), came, -NOT_FINITE)


def are_texts(items: Any) -> bool:
    """Whether right answers are texts, by their mean length. JSON is compared as such."""
    lengths = [len(words(item.expected)) for item in items if item.check != "json"]
    return bool(lengths) and sum(lengths) / len(lengths) >= WORDS


def _texts(
    items: Mapping[int, Item], before: Mapping[int, str], after: Mapping[int, str]
) -> dict[str, Beside]:
    shown = {index: item for index, item in items.items() if item.check != "json"}
    found = {}
    for name, score in text_scores().items():
        ours = [score(item.expected, after[index]) for index, item in shown.items()]
        found[name] = beside(ours, [score(item.expected, before[index]) for index, item in shown.items()])
    if (corpus := _bleu()) is not None:
        right = [item.expected for item in shown.values()]
        of = {
            which: corpus([given[i] for i in shown], [right]).score
            for which, given in (("a", after), ("b", before))
        }
        found["bleu"] = Beside(variant=of["a"], reference=of["b"])
    return found


def text_scores() -> dict[str, Score]:
    """ROUGE as F-measure (Lin, 2004), where rouge-score is there, and token F1 (Rajpurkar et al., 2016)."""
    found: dict[str, Score] = {"f1": token_f1}
    if importlib.util.find_spec("rouge_score") is not None:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(ROUGE), tokenizer=_Letters())

        def rouge(right: str, given: str, kind: str) -> float:
            return float(scorer.score(right, given)[kind].fmeasure)

        found = {kind: functools.partial(rouge, kind=kind) for kind in ROUGE} | found
    return found


class _Letters:
    """rouge-score's way of parting text, for letters of every script: its own knows a to z alone, and finds
    nothing in common between a Russian text and itself."""

    def tokenize(self, text: str) -> list[str]:
        kept = (sign if sign.isalnum() or category(sign)[0] == "M" else " " for sign in text.lower())
        return "".join(kept).split()


def _bleu() -> Callable[..., Any] | None:
    """sacrebleu's corpus BLEU (Post, 2018); None where it is not there."""
    if importlib.util.find_spec("sacrebleu") is None:
        return None
    from sacrebleu import corpus_bleu

    corpus: Callable[..., Any] = corpus_bleu
    return corpus


def token_f1(right: str, given: str) -> float:
    """Harmonic mean of precision and recall of words, each counted as often as it stands there; 1 for two
    empty texts."""
    ours, theirs = Counter(words(given)), Counter(words(right))
    if not ours or not theirs:
        return float(ours == theirs)
    same = (ours & theirs).total()
    return 2 * same / (ours.total() + theirs.total())


def beside(ours: Sequence[float], theirs: Sequence[float]) -> Beside:
    """Means, and both tests of the paired differences. Without any difference p is 1; of fewer than two
    items, or where all differ alike, t has none."""
    import numpy as np
    from scipy import stats

    first, second = np.array(ours, dtype=np.float64), np.array(theirs, dtype=np.float64)
    difference = first - second
    wilcoxon = t = None
    if not difference.any():
        wilcoxon = t = 1.0
    else:
        wilcoxon = float(stats.wilcoxon(difference).pvalue)
        spread = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
        # Differences that are equal but for rounding have no spread to test with.
        if spread > 1e-12 * float(np.abs(difference).max()):
            t = float(stats.ttest_rel(first, second).pvalue)
    return Beside(variant=float(first.mean()), reference=float(second.mean()), wilcoxon_p=wilcoxon, t_p=t)


def js_distance(before: Mapping[str, int], after: Mapping[str, int]) -> float:
    """Jensen-Shannon distance, base 2 (Lin, 1991; Endres and Schindelin, 2003), of two counts: 0 where they
    are alike, 1 where they have nothing in common."""
    import numpy as np
    from scipy.spatial.distance import jensenshannon

    if not before or not after:
        return float(bool(before) != bool(after))
    keys = sorted({*before, *after})
    p, q = (np.array([counts.get(key, 0) for key in keys], dtype=np.float64) for counts in (before, after))
    if np.array_equal(p * q.sum(), q * p.sum()):
        return 0.0
    return min(1.0, float(jensenshannon(p, q, base=2)))


def wasserstein(before: NDArray[np.float64], after: NDArray[np.float64]) -> float:
    """First Wasserstein distance of two samples, in their own unit."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(before, after))
