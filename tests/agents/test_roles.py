"""The library's roles: whole, valid in the gateway's file, and taken over there as they are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from deploy.starter import Starter
from gateway.config import Config, RoleSettings
from tiercel_agents.roles import Role, library, role, settings_like

NAMES = (
    "intent_classifier router summarizer title_writer query_rewriter extractor guard judge planner coder core"
).split()
GIVEN: dict[str, dict[str, Any]] = {
    "intent_classifier": {"labels": ["refund", "status"]},
    "router": {"agents": ["a", "b"]},
    "summarizer": {"sentences": 2},
    "title_writer": {"words": 6},
    "extractor": {"fields": ["name"]},
    "guard": {"policy": "no secrets"},
    "judge": {"best": 5},
    "planner": {"steps": 3, "agents": ["coder"]},
}


def test_all_of_them_are_there() -> None:
    assert list(library()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_is_whole(name: str) -> None:
    one, given = role(name), GIVEN.get(name, {})
    assert one.what
    assert one.runs_on
    assert set(one.fields) == set(given)
    system, user = one.messages("a text", **given)
    assert "{" not in system["content"]
    assert user == {"role": "user", "content": "a text"}
    settings = RoleSettings.model_validate({"like": name})
    assert settings.budget.min_weight_bits == one.settings["budget"].get("min_weight_bits")
    if one.schema is not None:
        wanted = one.response_format(**given)
        assert wanted is not None
        jsonschema.Draft202012Validator.check_schema(wanted["json_schema"]["schema"])
    else:
        assert one.response_format() is None


def test_choices_are_in_the_schema_wherever_it_has_them() -> None:
    wanted = role("intent_classifier").response_format(labels=["refund"])
    assert wanted is not None
    schema = wanted["json_schema"]["schema"]
    jsonschema.validate({"intent": "refund"}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"intent": "status"}, schema)
    wanted = role("planner").response_format(agents=["coder"])
    assert wanted is not None
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"steps": [{"agent": "x", "task": "t"}]}, wanted["json_schema"]["schema"])
    assert "enum" not in str(role("intent_classifier").schema), "the library itself stays as it is"


def test_what_is_missing_or_too_much_is_named() -> None:
    with pytest.raises(ValueError, match="intent_classifier: its prompt needs labels; give labels=…"):
        role("intent_classifier").system()
    with pytest.raises(ValueError, match="its prompt has no label; it has: labels"):
        role("intent_classifier").system(labels=["a"], label="a")
    with pytest.raises(ValueError, match="'clasifier' is not a role of the library; known: intent"):
        role("clasifier")


def test_what_is_written_beside_like_counts_instead() -> None:
    settings = RoleSettings.model_validate(
        {"like": "extractor", "agents": ["fields"], "escalate": False, "budget": {"max_kl": 0.02}}
    )
    assert (settings.like, settings.escalate, settings.grounded) == ("extractor", False, True)
    assert settings.budget.max_kl == 0.02
    assert settings.budget.max_accuracy_drop == 0.02, "the rest of the budget is the library's"
    again = RoleSettings.model_validate(settings.model_dump(mode="json", exclude_unset=True))
    assert again == settings, "a file that is written out means the same"
    assert settings_like("judge", {})["budget"] == {"min_weight_bits": 16}
    with pytest.raises(ValidationError, match="like: 'none' is not a role of the library; known: intent"):
        RoleSettings.model_validate({"like": "none"})
    with pytest.raises(ValidationError, match="like"):
        RoleSettings.model_validate({"like": 7})


def test_ones_own_are_made_of_the_same() -> None:
    mine = Role("triage", "Sorts tickets.", "Sort by urgency: {levels}.", choices={"level": "levels"})
    assert mine.system(levels=("now", "later")) == "Sort by urgency: now, later."


def test_the_starters_core_is_the_librarys(tmp_path: Path) -> None:
    text = Starter("m", str(tmp_path), False, "vllm-cpu-vnni", ("bf16", "int8")).text()
    raw = yaml.safe_load(text)
    assert raw["roles"]["core"]["budget"] == role("core").settings["budget"]
    for name in NAMES:
        assert re.search(rf"\b{name}\b", text), name
    raw["roles"]["triage"] = {"like": "intent_classifier"}
    assert Config.model_validate(raw).roles["triage"].budget.max_kl == 0.2
