"""Two models that may serve one role: their answers to the same items are compared.

Engines are scripted ones that run already.
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import deploy.measuring as measuring
from deploy.engine import EngineSpec
from deploy.evaluation import evaluate_models, in_order
from deploy.models import registry_of
from gateway.config import Config, load_config
from quantize.card import Card, Outcome
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import uniform
from tests.deploy.test_measuring import MACHINE, Engine, differing, serving
from tests.quantize.small import write_base

ITEMS = 120
WRONG_OF_SMALL = 3
"""Of the items; its quantized variant gets two more of them wrong."""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_base(tmp_path / "model")
    for role in ("core", "aux"):
        lines = [
            json.dumps({"messages": [{"role": "user", "content": f"{role} {n}"}], "expected": "$5"})
            for n in range(ITEMS)
        ]
        (tmp_path / f"{role}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    place = tmp_path / "tiercel.yaml"
    place.write_text(
        f"""
models:
  large: {{path: {tmp_path}/model, serve: [bf16]}}
  small: {{path: {tmp_path}/model, serve: [bf16, int4], engine: {{max_num_seqs: 8}}}}
variants_dir: variants
roles:
  core: {{tasks: core.jsonl}}
  aux: {{tasks: aux.jsonl, models: [large, small], budget: {{max_accuracy_drop: 0.1, max_kl: null}}}}
default_role: core
""",
        encoding="utf-8",
    )
    monkeypatch.setattr(measuring, "look", lambda: MACHINE)
    monkeypatch.setattr(measuring, "tokenizer_differences", differing())
    return place


def made(config: Config) -> dict[str, list[Card]]:
    """Both references, and the small model's int4."""
    cards: dict[str, list[Card]] = {}
    for model in config.each():
        checkpoint = open_checkpoint(model.path)
        cards[model.name] = [registry_of(model).add_reference(checkpoint)]

    def make(out: Path) -> None:
        for name in ("model.safetensors", "config.json"):
            (out / name).write_bytes((checkpoint.path / name).read_bytes())

    plan = uniform(read_modules(checkpoint), "w4a16-g32")
    cards["small"].append(registry_of(config.of("small")).add(checkpoint, "int4", plan, None, make=make))
    return cards


class Script:
    """Who gets which items wrong, by the item's number; can be changed between measurements."""

    def __init__(self) -> None:
        self.wrong = {"large:bf16": 0, "small:bf16": WRONG_OF_SMALL, "small:int4": WRONG_OF_SMALL + 2}
        self.asked: list[str] = []

    def engine(self, card: Card) -> Engine:
        def answer(text: str) -> str:
            self.asked.append(card.id)
            return "$9" if int(text.split()[1]) < self.wrong[card.id] else "$5"

        return Engine(0.1 if card.variant == "int4" else 0.0, card.weight_bits, [], card.id, answer)


async def running(
    stack: AsyncExitStack, config: Config, cards: dict[str, list[Card]], monkeypatch: pytest.MonkeyPatch
) -> tuple[Script, dict[str, EngineSpec]]:
    script = Script()
    served = [(config.of(name), card, script.engine(card)) for name, of in cards.items() for card in of]
    return script, await stack.enter_async_context(serving(served, monkeypatch))


async def test_a_small_model_is_judged_by_the_first_models_answers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, said = load_config(path), list[str]()
    cards = made(config)
    assert [one.name for one in in_order(config, {"small": 1, "large": 1})] == ["large", "small"]
    async with AsyncExitStack() as stack:
        script, engines = await running(stack, config, cards, monkeypatch)
        backwards = {name: cards[name] for name in ("small", "large")}
        found = {card.id: card for card in await evaluate_models(config, backwards, said.append, engines)}
    order = list(dict.fromkeys(script.asked))
    assert order[0] == "large:bf16"  # which the others are compared with
    for name, wrong in (("small:bf16", 3), ("small:int4", 5)):
        evaluation = found[name].evaluation
        assert evaluation is not None
        assert set(evaluation.roles) == {"aux"}  # core is the first model's alone
        paired = evaluation.roles["aux"].across["large"]
        assert (paired.items, paired.good, paired.reference_good) == (ITEMS, ITEMS - wrong, ITEMS)
        assert (paired.flips_to_bad, paired.flips_to_good) == (wrong, 0)
        verdict = found[name].gate["aux"]
        assert verdict.outcome == Outcome.PASSED, verdict.reasons
        assert any(reason.startswith("against large: ") for reason in verdict.reasons)
    large = found["large:bf16"].evaluation
    assert large is not None
    assert [one.across for one in large.roles.values()] == [{}, {}]
    assert registry_of(config.of("small")).card("int4") == found["small:int4"]
    assert not [line for line in said if "not compared" in line]


async def test_without_the_first_models_answers_nothing_passes_and_why_is_said(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, said = load_config(path), list[str]()
    cards = made(config)
    async with AsyncExitStack() as stack:
        script, engines = await running(stack, config, cards, monkeypatch)
        bf16, int4 = await evaluate_models(config, {"small": cards["small"]}, said.append, engines)
        assert said[0] == (
            "small is not compared with large for aux: large was not measured; "
            "`tiercel quantize measure --model large` makes up for it"
        )
        for card in (bf16, int4):
            assert card.gate["aux"].outcome == Outcome.NOT_ENOUGH_EVIDENCE
            assert "not compared with large" in card.gate["aux"].reasons[0]
        asked = len(script.asked)
        await evaluate_models(config, {"large": cards["large"]}, said.append, engines)
        assert set(script.asked[asked:]) == {"large:bf16"}  # the small model is not asked again
        again = registry_of(config.of("small")).card("int4")
        assert again.gate["aux"].outcome == Outcome.PASSED
        assert again.evaluation is not None
        assert again.evaluation.p_values.keys() == {"bf16/aux", "int4/aux"}

        # Other items: what was known is of no use any more, and gone.
        items = path.parent / "aux.jsonl"
        lines = items.read_text(encoding="utf-8").splitlines()
        items.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
        now = load_config(path)
        _, int4 = await evaluate_models(now, {"small": [bf16, again]}, said.append, engines)
    assert any("large was measured on other items" in line for line in said)
    assert int4.gate["aux"].outcome == Outcome.NOT_ENOUGH_EVIDENCE


async def test_a_model_that_is_much_worse_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(path)
    cards = made(config)
    async with AsyncExitStack() as stack:
        script, engines = await running(stack, config, cards, monkeypatch)
        script.wrong |= {"small:bf16": 40, "small:int4": 40}
        found = {one.id: one for one in await evaluate_models(config, cards, lambda _: None, engines)}
    assert found["small:bf16"].gate["aux"].outcome == Outcome.FAILED
    assert found["small:int4"].gate["aux"].outcome == Outcome.FAILED  # though it equals its own reference
    assert found["large:bf16"].gate["aux"].outcome == Outcome.PASSED
