"""A configuration for a model that comes alone: what suits the target, and the file that says so. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gateway.config.model import LONGEST_NAME
from quantize.core.legality import Target
from quantize.core.modules import Modules
from quantize.core.recipes import RECIPES

REFERENCE = "bf16"
FILE = Path("tiercel.yaml")
ROLES = ("default", "auxiliary", "core")
_SNAPSHOT = re.compile(r"models--(?:.*--)?(.+)")
_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")
_GENERIC = ("", "model", "snapshots", *ROLES)


@dataclass(frozen=True)
class Starter:
    """What the file says."""

    name: str
    source: str
    """A directory, or a hub id."""
    is_hub: bool
    target: str
    serve: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Recipe to the reason why it is not among those that are made."""
    watched: bool = True
    """Quantized answers are compared with the reference's while they are served."""
    python: Path | None = None
    """The engine environment's interpreter, where it is not beside the file."""

    @property
    def served(self) -> str:
        """The line that says what is served."""
        return f"    serve: [{', '.join(self.serve)}]\n"

    @property
    def watch(self) -> str:
        """The lines that say whether the reference is asked."""
        if self.watched:
            return _WATCHED
        return _ALONE if REFERENCE in self.serve else _UNWATCHED

    def in_place_of(self, other: Starter, text: str) -> str | None:
        """``text`` with what this one serves where it says what ``other`` does; None where somebody has
        changed that."""
        if text.count(other.served) != 1 or text.count(other.watch) != 1:
            return None
        return text.replace(other.served, self.served).replace(other.watch, self.watch)

    def text(self) -> str:
        """The whole file."""
        left_out = "".join(f"    # Not {name}: {why}\n" for name, why in self.left_out.items())
        python = f"\nengine:\n  python: {_quoted(str(self.python))}\n" if self.python else ""
        return _FILE.format(
            name=_quoted(self.name),
            target=self.target,
            key="hub" if self.is_hub else "path",
            source=_quoted(self.source),
            served=self.served,
            left_out=left_out,
            watch=self.watch,
            python=python,
        )


_FILE = """\
# Tiercel's configuration, begun by `tiercel init` for {target}. Change what you like.
models:
  {name}:
    {key}: {source}
    # Of these `tiercel up MODEL` makes and judges all, and then leaves those that the roles need:
{served}{left_out}\
    # Conversations of yours, as varied as what is served, calibrate in place of those that ship with Tiercel:
    # calibration: calibration.jsonl
variants_dir: var/variants

# A request names its role by the header x-agent-role, or as its model. The cheapest variant that is proven to
# stay within the role's budget serves it. Without tasks it is judged by the model's own answers in 16 bits to
# conversations that ship with Tiercel; items of yours, with right answers, judge better:
#   tasks: default.jsonl    # {{"messages": [{{"role": "user", "content": "…"}}], "expected": "…"}}
roles:
  default: {{}}
  # Classifiers, summarizers, routers: agents whose answers other agents read. More may change.
  auxiliary:
    budget: {{ max_kl: 0.2, min_first_choice_agreement: 0.82, max_changed_answers: 0.75 }}
  # What users read: closer to the 16-bit model, and never below 8 bits.
  core:
    budget: {{ max_kl: 0.05, min_weight_bits: 8 }}
  # More in a line each: `triage: {{ like: intent_classifier }}`, or like router, summarizer, title_writer,
  # query_rewriter, extractor, guard, judge, planner, coder, core; what stands beside `like` counts instead.
default_role: default

# Cheap is what takes few bytes, with a busy KV cache, for a short time per token, as its engine was measured.
gateway: {{ cost: memory_time }}

{watch}
{python}"""
_WATCHED = """\
# Of quantized answers that are listened to, a quarter by default, a tenth is put before the 16-bit model.
watch: { reference: live }"""
_UNWATCHED = """\
# The 16-bit model is not served, since no role needs it. With live, and bf16 in serve, quantized answers
# would be compared with it while they are served.
watch: { reference: none }"""

_ALONE = """\
# The 16-bit model alone is served: there are no quantized answers to be compared with its own.
watch: { reference: none }"""


def _quoted(text: str) -> str:
    """A YAML scalar, with quotes where it needs them."""
    return text if re.fullmatch(r"[A-Za-z/][A-Za-z0-9._/-]*", text) else json.dumps(text)


def model_name(source: Path | str) -> str:
    """What clients will call the model: the directory's name, or the hub's without its owner."""
    parts = [part for part in reversed(Path(source).parts) if part != "/"]
    cached = next((found[1] for part in parts if (found := _SNAPSHOT.fullmatch(part))), None)
    name = _UNFIT.sub("-", cached or next(iter(parts), "")).strip("-._")[:LONGEST_NAME]
    return f"my-{name or 'model'}" if name in _GENERIC else name


def candidates(modules: Modules, head_dim: int, where: Target) -> tuple[list[str], dict[str, str]]:
    """Variants to make for a target, 16-bit KV caches alone; and, of recipes that it does not serve, why."""
    suited, left_out = [], dict[str, str]()
    for name, recipe in RECIPES.items():
        if recipe.kv != "auto":
            continue
        found = where.check_plan(recipe.plan(modules, where), modules, head_dim)
        if why := recipe.unsuited(where):
            left_out[name] = why
        elif found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            left_out[name] = f"{where.name} does not serve it: {found[0]}{more}"
        else:
            suited.append(name)
    return suited, left_out


@dataclass(frozen=True)
class Choice:
    """What is served of what was judged."""

    serve: tuple[str, ...]
    by_role: Mapping[str, str]
    """Role to the variant that serves it."""
    watched: bool


def choose(
    passed: Mapping[str, Sequence[str]], costs: Mapping[str, float], reference: str = REFERENCE
) -> Choice:
    """From the variants that pass, by role, and what serving with each costs.

    One variant for all roles where one passes all, since engines beside each other share the hardware; else
    for each role the cheapest, and the reference for those that none passes. A variant that costs as much as
    the reference is never better than that.
    """
    roles = list(passed)
    cheaper = [name for name in costs if costs[name] < costs[reference]]
    for_all = [name for name in cheaper if all(name in passed[role] for role in roles)]
    if for_all:
        best = min(for_all, key=lambda name: costs[name])
        return Choice((best,), dict.fromkeys(roles, best), watched=False)
    by_role = {}
    for role in roles:
        suited = [name for name in cheaper if name in passed[role]]
        by_role[role] = min(suited, key=costs.__getitem__, default=reference)
    others = sorted({*by_role.values()} - {reference}, key=lambda name: -costs[name])
    return Choice((reference, *others), by_role, watched=bool(others))
