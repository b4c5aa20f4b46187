"""Do the variants still answer as the reference does?"""

from __future__ import annotations

from deploy.dashboards.model import BOTH, RATE, VARIANT, Dashboard, Panel, Row, mean, quantile, small

_CHECKS = "tiercel_quality_checks_total"
_SHADOW = "tiercel_shadow_compared_total"

QUALITY = Dashboard(
    "quality",
    "Tiercel / Quality",
    "Do the quantized agents still tell the truth?",
    [
        Row(
            "Now",
            [
                small(
                    "Demoted",
                    "Variants that are out of a role's choice.",
                    f"sum(max by (model, variant, role) (tiercel_variant_demoted{{{BOTH}}}))",
                    limits=(1, 2),
                ),
                small(
                    "Made up, 1 h",
                    "Of the sentences that claim something. The worst role and variant.",
                    f"max(role_model_variant:tiercel_sentences_made_up:ratio_rate1h{{{BOTH}}})",
                    "percentunit",
                    limits=(0.05, 0.1),
                ),
                small(
                    "Disputed, 1 h",
                    "Of the answers put before the reference. The worst role and variant.",
                    f"max(role_model_variant:tiercel_shadow_disputed:ratio_rate1h{{{BOTH}}})",
                    "percentunit",
                    limits=(0.05, 0.2),
                ),
                small(
                    "Evidence",
                    "The highest of all checks, nats. With the default settings 15.4 are an alarm.",
                    f"max(tiercel_quality_cusum{{{BOTH}}})",
                    limits=(5.1, 15.4),
                ),
                small(
                    "Compared, 1 h",
                    "Of the answers meant for the reference, those that it has judged.",
                    f'sum(rate({_SHADOW}{{{BOTH}, result=~"agreed|disputed"}}[1h])) '
                    f"/ (sum(rate({_SHADOW}{{{BOTH}}}[1h])) > 0)",
                    "percentunit",
                    limits=(0.1, 0.5),
                    good_is_high=True,
                ),
                small(
                    "Outcomes lost, 1 h",
                    "While the watch's store did not answer.",
                    "sum(increase(tiercel_watch_outcomes_dropped_total[1h])) or vector(0)",
                    limits=(1, 1000),
                ),
            ],
        ),
        Row(
            "The watch",
            [
                Panel(
                    "In and out of service",
                    "Whether a variant may serve a role.",
                    [
                        (
                            f"max by (model, variant, role) (tiercel_variant_demoted{{{BOTH}}})",
                            "{{model}}:{{variant}} as {{role}}",
                        )
                    ],
                    kind="state-timeline",
                    width=12,
                    words={"0": ("serves", "green"), "1": ("demoted", "red")},
                ),
                Panel(
                    "Evidence",
                    "That a check has changed for the worse, nats. 15.4 are an alarm.",
                    [
                        (
                            f"max by (role, model, variant, check) (tiercel_quality_cusum{{{BOTH}}})",
                            "{{model}}:{{variant}} as {{role}}: {{check}}",
                        )
                    ],
                    width=12,
                    limits=(5.1, 15.4),
                ),
                Panel(
                    "Disputed by the reference",
                    "Share of the compared answers, over an hour.",
                    [
                        (
                            f"role_model_variant:tiercel_shadow_disputed:ratio_rate1h{{{BOTH}}}",
                            "{{model}}:{{variant}} as {{role}}",
                        )
                    ],
                    "percentunit",
                    limits=(0.05, 0.2),
                ),
                Panel(
                    "What came of asking the reference",
                    "shed: given up for users' requests. no_logprobs, incomparable: nothing to compare.",
                    [(f"sum by (result) (rate({_SHADOW}{{{BOTH}}}[{RATE}]))", "{{result}}")],
                    "ops",
                    stacked=True,
                ),
                Panel(
                    "Events",
                    "What the watch did and said, per hour.",
                    [
                        (
                            "sum by (kind) (increase(tiercel_watch_events_total"
                            f'{{role=~"$role|\\\\(engine\\\\)", {VARIANT}}}[1h]))',
                            "{{kind}}",
                        )
                    ],
                ),
                Panel(
                    "Divergence from the reference",
                    "Log-ratio per token of the median answer, nats: at temperature 1 the KL divergence.",
                    [
                        (
                            quantile(0.5, "tiercel_shadow_divergence_nats", "role, model, variant"),
                            "{{model}}:{{variant}} as {{role}}",
                        )
                    ],
                ),
                Panel(
                    "Other favourites",
                    "Share of an answer's tokens that are not the reference's first choice, mean.",
                    [
                        (
                            mean("tiercel_shadow_token_disagreement_ratio", "role, model, variant"),
                            "{{model}}:{{variant}} as {{role}}",
                        )
                    ],
                    "percentunit",
                ),
                Panel(
                    "Asked again",
                    "Answers that failed a check before the client saw them, and went to a higher precision.",
                    [
                        (
                            f"sum by (role, check) (rate(tiercel_escalations_total{{{BOTH}}}[{RATE}]))",
                            "{{role}}: {{check}}",
                        )
                    ],
                    "ops",
                ),
            ],
        ),
        Row(
            "Answers",
            [
                Panel(
                    "Made up",
                    "Share of the sentences that claim something, over an hour.",
                    [
                        (
                            f"role_model_variant:tiercel_sentences_made_up:ratio_rate1h{{{BOTH}}}",
                            "{{model}}:{{variant}} as {{role}}",
                        )
                    ],
                    "percentunit",
                    limits=(0.05, 0.1),
                ),
                Panel(
                    "Sentences",
                    "By label.",
                    [
                        (
                            f"sum by (label) (rate(tiercel_quality_sentences_total{{{BOTH}}}[{RATE}]))",
                            "{{label}}",
                        )
                    ],
                    "ops",
                    stacked=True,
                ),
                Panel(
                    "Failed checks",
                    "Share of the answers that a check has looked at.",
                    [
                        (
                            f'(sum by (check) (rate({_CHECKS}{{{BOTH}, outcome="failed"}}[{RATE}])) '
                            f"or 0 * sum by (check) (rate({_CHECKS}{{{BOTH}}}[{RATE}]))) / "
                            f'sum by (check) (rate({_CHECKS}{{{BOTH}, outcome=~"passed|failed"}}[{RATE}]))',
                            "{{check}}",
                        )
                    ],
                    "percentunit",
                ),
                Panel(
                    "Scores",
                    "Mean of an answer's score, 1 is best.",
                    [
                        (
                            mean("tiercel_quality_score", "model, variant, check"),
                            "{{model}}:{{variant}}: {{check}}",
                        )
                    ],
                    "percentunit",
                ),
                Panel(
                    "Surprise",
                    "Mean -log p of an answer's tokens, nats: the median answer.",
                    [
                        (
                            quantile(0.5, "tiercel_token_nll_mean", "role, model, variant"),
                            "{{model}}:{{variant}} as {{role}}",
                        )
                    ],
                ),
                Panel(
                    "Highest entropy",
                    "Of an answer's tokens, nats: 95 % of the answers stay below.",
                    [
                        (
                            quantile(0.95, "tiercel_token_entropy_max", "role, model, variant"),
                            "{{model}}:{{variant}} as {{role}}",
                        )
                    ],
                ),
                Panel(
                    "Checks that broke",
                    "Errors of the checks themselves, the judge's among them.",
                    [(f'sum by (check) (rate({_CHECKS}{{{BOTH}, outcome="error"}}[{RATE}]))', "{{check}}")],
                    "ops",
                ),
                Panel(
                    "Kept by consent",
                    "Requests and answers in a sample that is kept, by what became of them, per hour.",
                    [
                        (
                            "sum by (kind, outcome) (increase(tiercel_kept_conversations_total"
                            '{role=~"$role"}[1h]))',
                            "{{kind}}: {{outcome}}",
                        )
                    ],
                ),
            ],
        ),
    ],
)
