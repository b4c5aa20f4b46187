"""The file that a model begins with: what suits the target is in it, what does not is in a comment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy.starter import ROLES, Choice, Starter, candidates, choose, model_name
from gateway.config import ConfigError, parse_config
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.recipes import RECIPES, unasked
from quantize.core.targets import TARGETS, target
from tests.deploy.test_supervisor import ROOT
from tests.quantize.tiny import make_checkpoint

DEMO = ROOT / "deploy/assistant/model"


@pytest.mark.parametrize(
    ("where", "suited", "left_out"),
    [
        ("vllm-cpu-vnni", ["int8", "int4"], {"fp8": "unusable"}),
        ("vllm-cpu-amx", ["int8", "int4"], {"fp8": "unusable"}),
        ("vllm-cpu-avx2", ["int8"], {"fp8": "unusable", "int4": "the int4 kernel is not in"}),
        ("vllm-cuda-ampere", ["int8", "int4"], {"fp8": "computed otherwise there: W8A16"}),
        ("vllm-cuda-ada", ["int8", "fp8", "int4"], {}),
        ("vllm-cuda-hopper", ["int8", "fp8", "int4"], {}),
        ("vllm-cuda-blackwell", ["fp8", "int4"], {"int8": "compute capability 10"}),
    ],
)
def test_what_a_target_does_not_take_is_left_out_with_a_sentence(
    where: str, suited: list[str], left_out: dict[str, str]
) -> None:
    checkpoint = open_checkpoint(DEMO)
    found, why = candidates(read_modules(checkpoint), checkpoint.head_dim, target(where))
    assert found == suited
    assert why.keys() == left_out.keys()
    assert all(left_out[name] in why[name] for name in why)
    text = Starter("mine", str(DEMO), False, where, ("bf16", *found), why).text()
    assert all(f"# Not {name}: " in text for name in why)
    assert parse_config(text, "tiercel.yaml", Path("/tmp")).served == tuple(
        f"mine:{name}" for name in ("bf16", *suited)
    )


def test_shapes_that_do_not_divide_leave_four_bits_out(tmp_path: Path) -> None:
    odd = make_checkpoint(tmp_path / "odd", hidden_size=80, head_dim=40, intermediate_size=176)
    checkpoint = open_checkpoint(odd)
    found, why = candidates(read_modules(checkpoint), checkpoint.head_dim, target("vllm-cuda-hopper"))
    assert found == ["int8", "fp8"]
    assert "K is 176, but groups of 64 must divide it" in why["int4"]


@pytest.mark.parametrize("where", sorted(TARGETS))
def test_unasked_the_same_variants_are_made(where: str) -> None:
    made = unasked(target(where))
    assert ("fp8" in made) == (where in ("vllm-cuda-ada", "vllm-cuda-hopper", "vllm-cuda-blackwell"))
    assert set(RECIPES) - {"fp8"} <= set(made)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/models/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("/cache/models--Some--Model-8B/snapshots/0123abc", "Model-8B"),
        ("Some/Model-8B", "Model-8B"),
        ("/models/ein Modell: neu", "ein-Modell-neu"),
        ("/model", "my-model"),
        ("/models/core", "my-core"),
        ("/", "my-model"),
        ("/models/_x", "x"),
        ("/models/" + "x" * 300, "x" * 128),
    ],
)
def test_a_model_is_called_by_what_a_person_would(source: str, name: str) -> None:
    assert model_name(Path(source)) == name
    text = Starter(name, "/models/x", False, "vllm-cpu-vnni", ("bf16",)).text()
    assert parse_config(text, "tiercel.yaml", Path("/tmp")).default_model == name


def test_every_role_is_there_and_no_path_breaks_the_file() -> None:
    for source in ("/models/it's", "/models/a: b # c", '/models/"x"', "/models/ümlaut", "/models/1", "/a b"):
        starter = Starter(
            "m", source, False, "vllm-cpu-vnni", ("bf16", "int8"), python=Path("/opt/e n/python")
        )
        config = parse_config(starter.text(), "tiercel.yaml", Path("/tmp"))
        assert config.models["m"].path == Path(source)
        assert config.engine.python == Path("/opt/e n/python")
        assert tuple(config.roles) == ROLES
        assert config.default_role == "default"
    hub = parse_config(Starter("m", "Some/Model", True, "t", ("bf16",)).text(), "x", Path("/tmp"))
    assert hub.models["m"].hub == "Some/Model"


def test_without_the_reference_nothing_is_put_before_it() -> None:
    alone = Starter("m", "/m", False, "t", ("bf16",), watched=False)
    assert "16-bit model alone is served" in alone.text()
    unwatched = Starter("m", "/m", False, "t", ("int8",), watched=False)
    assert "16-bit model is not served" in unwatched.text()
    assert parse_config(unwatched.text(), "x", Path("/tmp")).watch.reference == "none"
    with pytest.raises(ConfigError, match="must contain the reference"):
        parse_config(Starter("m", "/m", False, "t", ("int8",)).text(), "x", Path("/tmp"))


def test_comments_hold_no_more_than_a_line_is_wide() -> None:
    text = Starter("m", "/m", False, "t", ("bf16",)).text()
    assert max(map(len, text.splitlines())) <= 110
    assert not re.search(r"{{|}}", text), "no braces are left of the template"


COSTS = {"bf16": 100.0, "int8": 60.0, "fp8": 61.0, "int4": 40.0}


@pytest.mark.parametrize(
    ("passed", "choice"),
    [
        (  # one for all, though another would be smaller for some
            {"default": ["bf16", "int8", "int4"], "auxiliary": ["int8", "int4"], "core": ["bf16", "int8"]},
            Choice(("int8",), {"default": "int8", "auxiliary": "int8", "core": "int8"}, watched=False),
        ),
        (
            {"default": ["int8", "int4"], "core": ["int8", "int4", "fp8"]},
            Choice(("int4",), {"default": "int4", "core": "int4"}, watched=False),
        ),
        (  # the reference for what nothing passes
            {"default": ["int8"], "auxiliary": ["int4", "int8"], "core": ["bf16"]},
            Choice(
                ("bf16", "int8", "int4"),
                {"default": "int8", "auxiliary": "int4", "core": "bf16"},
                watched=True,
            ),
        ),
        (  # nothing passes anything
            {"default": ["bf16"], "core": []},
            Choice(("bf16",), {"default": "bf16", "core": "bf16"}, watched=False),
        ),
    ],
)
def test_one_variant_for_all_roles_else_the_cheapest_for_each(
    passed: dict[str, list[str]], choice: Choice
) -> None:
    assert choose(passed, COSTS) == choice


def test_a_variant_that_costs_more_than_the_reference_is_not_served() -> None:
    """As four bits on a processor that unpacks them slower than it computes."""
    slow = COSTS | {"int4": 140.0}
    passed = {"default": ["int4"], "auxiliary": ["int4"]}
    assert choose(passed, slow) == Choice(("bf16",), {"default": "bf16", "auxiliary": "bf16"}, watched=False)
    passed = {"default": ["int4", "int8"], "auxiliary": ["int4", "int8"]}
    assert choose(passed, slow).serve == ("int8",)
