"""The benchmark's results as a Markdown table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

Results = Sequence[Mapping[str, Any]]
COLOURS = {
    "uniform": "#4878a8",
    "heuristic": "#c58a2c",
    "random": "#9a9a9a",
    "planned": "#b5303c",
    "tuned": "#6f2f8f",
    "given": "#3f8f5f",
}


def table(results: Results, out: TextIO) -> None:
    for result in results:
        print(f"\n### {result['model']} ({result['target']}, {result['engine']})\n", file=out)
        print(f"{result['conversations']} conversations, {result['tokens']} tokens.\n", file=out)
        print("| plan | bits per weight | bytes | mean KL, 1/1000 nat |", file=out)
        print("|---|---|---|---|", file=out)
        for row in sorted(result["rows"], key=lambda one: (one["bytes"], one["kl"])):
            kl = f"{1000 * row['kl']:.2f} ± {1000 * row['half']:.2f}"
            print(f"| {row['label']} | {row['bits']:.3f} | {row['bytes']:,} | {kl} |", file=out)
        print("\nKL of the planner's plan over the best of each kind within the same bytes:\n", file=out)
        print("| budget, bits | uniform | layers at 8 bits | AutoScheme | random |", file=out)
        print("|---|---|---|---|---|", file=out)
        for one in result["comparisons"]:
            cells = [_ratio(one[kind]) for kind in ("uniform", "layer", "autoscheme", "random")]
            print(f"| {one['bits']} | " + " | ".join(cells) + " |", file=out)


def _ratio(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "none fits"
    return f"{found['ratio']:.2f} ({found['low']:.2f}–{found['high']:.2f}; {found['label']})"


def figure(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown, axes = plt.subplots(1, len(results), figsize=(6.2 * len(results), 4.6), squeeze=False)
    for ax, result in zip(axes[0], results, strict=True):
        for kind, colour in COLOURS.items():
            rows = [row for row in result["rows"] if row["kind"] == kind]
            ax.errorbar(
                [row["bits"] for row in rows],
                [1000 * row["kl"] for row in rows],
                yerr=[1000 * row["half"] for row in rows],
                fmt="D" if kind in ("planned", "tuned") else "o",
                ms=6 if kind in ("planned", "tuned") else 4,
                color=colour,
                elinewidth=0.8,
                label=kind,
            )
        ax.set_yscale("log")
        ax.set_xlim(4.0, 5.6)
        ax.set_xlabel("bits per weight, scales included")
        ax.set_ylabel("mean KL to BF16, 1/1000 nat per token")
        ax.set_title(f"{result['model']} on {result['target']}")
        ax.grid(alpha=0.25, which="both")
        ax.legend(frameon=False)
    shown.tight_layout()
    shown.savefig(path, dpi=130)
    plt.close(shown)


def by_bytes(result: Mapping[str, Any], out: TextIO) -> None:
    """Tables of a real model: KL by bytes, paired ratios, and estimates beside what was measured."""
    print(f"{result['conversations']} conversations, {result['tokens']} tokens.\n", file=out)
    print("| variant | weights, MB | bits per weight | KL, 1/1000 nat per token |", file=out)
    print("|---|---|---|---|", file=out)
    for row in sorted(result["rows"], key=lambda one: (round(one["megabytes"], 2), one["kl"])):
        kl = f"{1000 * row['kl']:.1f} ± {1000 * row['half']:.1f}"
        print(f"| {row['label']} | {row['megabytes']:.1f} | {row['bits']:.3f} | {kl} |", file=out)
    print("\n| variant | over | ratio of KL |\n|---|---|---|", file=out)
    for one in result["ratios"]:
        ratio = f"{one['ratio']:.2f} ({one['low']:.2f}–{one['high']:.2f})"
        print(f"| {one['label']} | {one['over']} | {ratio} |", file=out)
    if "rank_correlation" in result:
        count, rho, p = len(result["groups"]), result["rank_correlation"], result["p"]
        what = f"Estimates and {count} single groups on the engine"
        print(f"\n{what}: rank correlation {rho:.2f} (p {p:.2g}).", file=out)


def loss_by_bytes(result: Mapping[str, Any], path: Path) -> None:
    """KL against bytes of weights, with 95 % intervals; plans are joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown, ax = plt.subplots(figsize=(9.6, 5.6))
    smallest = min(row["megabytes"] for row in result["rows"])
    for kind, colour in COLOURS.items():
        rows = sorted(
            (row for row in result["rows"] if row["kind"] == kind), key=lambda one: one["megabytes"]
        )
        if not rows:
            continue
        ax.errorbar(
            [row["megabytes"] for row in rows],
            [1000 * row["kl"] for row in rows],
            yerr=[1000 * row["half"] for row in rows],
            fmt="D-" if kind == "planned" else "o",
            ms=6 if kind == "planned" else 4,
            color=colour,
            elinewidth=0.8,
            linewidth=1.2,
            label=kind,
        )
        for row in rows if kind != "random" else ():
            left = row["megabytes"] < smallest + 0.1  # others' labels would lie on it
            ax.annotate(
                row["label"].partition(", else")[0],
                (row["megabytes"], 1000 * row["kl"]),
                xytext=(-6 if left else 6, 2),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=6.5,
                color=colour,
            )
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.margins(x=0.2)
    ax.set_xlabel("weights, MB")
    ax.set_ylabel("mean KL to BF16, 1/1000 nat per token")
    ax.grid(alpha=0.25, which="both")
    ax.legend(frameon=False)
    shown.tight_layout()
    shown.savefig(path, dpi=130)
    plt.close(shown)
