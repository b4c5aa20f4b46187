"""``tiercel keys`` and ``tiercel route``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from deploy.cli import main
from gateway.config import ApiKey
from gateway.identity import hash_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gateway"))

from gateway_stack import settings, write_variants


def test_a_new_key_fits_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    main(["keys", "new", "team-a", "--tenant", "acme", "--role", "core", "--admin"])
    text = capsys.readouterr().out
    secret = text.splitlines()[0].removeprefix("# ")
    (entry,) = yaml.safe_load(text)
    key = ApiKey.model_validate(entry)
    assert key.sha256 == hash_of(secret)
    assert (key.name, key.tenant, key.role, key.admin) == ("team-a", "acme", "core", True)
    assert len(secret) > 40
    with pytest.raises(SystemExit) as ended:
        main(["keys", "new", "team a"])
    assert ended.value.code == 2
    assert "'team a' cannot be used" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["keys", "new", "team-a", "--role", ""])
    assert "--role: '' names no role" in capsys.readouterr().err


def test_a_route_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_variants(tmp_path / "variants")
    path = tmp_path / "tiercel.yaml"
    path.write_text(settings(tmp_path / "variants", {}))
    config = ["--config", str(path)]
    main(["route", "--role", "intent_classifier", *config])
    assert (
        "assistant:int4-kv8 → assistant:int8 → assistant:bf16 (cheapest_in_budget)" in capsys.readouterr().out
    )
    main(["route", "--role", "summarizer", "--json", *config])
    found = json.loads(capsys.readouterr().out)
    assert found["ladder"] == ["assistant:int8", "assistant:bf16"]
    assert [step["variant"] for step in found["considered"]] == [
        f"assistant:{one}" for one in ("int4-kv8", "int8", "bf16")
    ]
    for arguments, says in (
        (["--role", "boss"], "'boss' is not a role"),
        (["--model", "assistant:int8"], "is less precise than role core allows"),
        (["--model", "gpt"], "does not exist"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["route", *arguments, *config])
        assert ended.value.code == 2
        assert says in capsys.readouterr().err
