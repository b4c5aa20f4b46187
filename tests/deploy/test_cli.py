"""Bad input at the command line: one sentence with the fix, status 2, no traceback."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.cli import main
from deploy.commands.variants import stale_variants
from quantize.core.gpus import GpuError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    def write(extra: str = "", model: str = str(ROOT / "deploy/assistant/model"), roles: str = "") -> Path:
        path = tmp_path / "tiercel.yaml"
        text = f"""
            models:
              assistant:
                path: {model}
                serve: [bf16, int8]
                calibration: {ROOT}/deploy/assistant/data/calibration.jsonl
            variants_dir: {tmp_path}/variants
            roles: {{core: {{}}{roles}}}
            default_role: core
            run_dir: {tmp_path}/run
        """
        path.write_text(textwrap.dedent(text) + extra + "\n", encoding="utf-8")
        return path

    return write


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("engin: {}", "engin: unknown key; did you mean 'engine'?"),
        ("engine: {base_prt: 1}", "engine.base_prt: unknown key; did you mean 'base_port'?"),
        (
            "engine: {base_port: 80}",
            "engine.base_port: Input should be greater than or equal to 1024, got 80",
        ),
        (
            "pools: {fp4: ['http://127.0.0.1:1']}",
            "pools.fp4: 'fp4' is not a served variant; known: assistant:bf16",
        ),
        ("gateway: {host: 0.0.0.0}", "0.0.0.0"),
        (
            "pools: {bf16: ['http://127.0.0.1:8080']}",
            "pools.assistant:bf16: http://127.0.0.1:8080 is the gateway's own; change that or gateway.port",
        ),
        ("pools: {bf16: ['http://a:1', 'http://a:1/']}", "an engine is listed twice; list each once"),
        (
            "gateway: {port: 8101}",
            "engine.base_port: 8101 gives assistant:bf16 the port 8101, which is the gateway's own; change",
        ),
        (
            "engine: {extra_args: ['--port=9']}",
            "engine.extra_args: --port is set by Tiercel; set engine.base_port instead",
        ),
        ("model: /models/x", "write models: { NAME: { path: /models/x } }"),
        ("reference: fp32", "write models: { NAME: { path: …, reference: fp32 } }"),
        ("engine: [", "is not valid YAML: line "),
        ("watch: {}\nwatch: {}", "the key 'watch' is in line "),
    ],
)
def test_configuration_errors(capsys, write_config, extra: str, sentence: str) -> None:
    assert sentence in run(capsys, "up", "--config", str(write_config(extra)))


def test_unknown_default_role(capsys, write_config, tmp_path: Path) -> None:
    path = write_config()
    path.write_text(path.read_text().replace("default_role: core", "default_role: cor"), encoding="utf-8")
    assert "default_role: 'cor' is not a role; known: core" in run(capsys, "up", "--config", str(path))


def test_missing_configuration(capsys, tmp_path: Path) -> None:
    assert "does not exist; give the configuration" in run(
        capsys, "up", "--config", str(tmp_path / "no.yaml")
    )


def test_missing_model_directory(capsys, write_config) -> None:
    path = write_config(model="/nonexistent/model")
    assert "model directory /nonexistent/model does not exist" in run(
        capsys, "quantize", "--config", str(path)
    )


def test_model_without_tokenizer(capsys, write_config, tmp_path: Path) -> None:
    model = tmp_path / "bare"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 1}', encoding="utf-8")
    assert "has no tokenizer" in run(capsys, "quantize", "--config", str(write_config(model=str(model))))


def test_unknown_variant(capsys, write_config) -> None:
    error = run(capsys, "quantize", "--config", str(write_config()), "int3")
    assert "unknown variant 'int3'; known: bf16, int8, fp8, int4, int4-kv8" in error


def test_up_before_quantize(capsys, write_config) -> None:
    assert "make the variant with `tiercel quantize`" in run(capsys, "up", "--config", str(write_config()))


def test_card_that_does_not_match_its_files(capsys, write_config, tmp_path: Path) -> None:
    path = write_config()
    main(["quantize", "--config", str(path), "--no-evaluate", "bf16"])
    weights = tmp_path / "variants/assistant/bf16/current/model.safetensors"
    spoiled = bytearray(weights.read_bytes())
    spoiled[-1] ^= 1
    weights.unlink()  # it is a hard link to the shipped model
    weights.write_bytes(spoiled)
    assert "does not match card.json" in run(capsys, "up", "--config", str(path))


def test_gateway_port_in_use(capsys, write_config, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = write_config(f"gateway: {{port: {port}}}")
        path.write_text(path.read_text().replace("serve: [bf16, int8]", "serve: [bf16]"), encoding="utf-8")
        main(["quantize", "--config", str(path), "--no-evaluate", "bf16"])
        assert f"port {port} on 127.0.0.1 is in use" in run(capsys, "up", "--config", str(path))


MODEL = ROOT / "deploy/assistant/model"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("make", "--scheme", "int4"), "unknown scheme 'int4'; known: bf16, w8a8"),
        (("make", "--scheme", "w4a16-g64", "--method", "gtpq"), "unknown method 'gtpq'"),
        (("make", "--scheme", "w4a16-g64", "--kv", "fp4"), "unknown KV-cache scheme 'fp4'"),
        (("make", "--scheme", "w4a16-g64", "--target", "vllm-tpu"), "unknown target 'vllm-tpu'; known:"),
        (
            ("make", "--scheme", "nvfp4", "--target", "vllm-cpu-avx512"),
            "nvfp4-rtn: model.layers.0.mlp.down_proj: scheme nvfp4, but vLLM 0.32 has no kernel",
        ),
        (("plan", "--methods", "magic"), "unknown method 'magic'"),
        (("plan", "--schemes", "w4"), "unknown scheme 'w4'"),
        (("plan", "--loss", "0.01", "--kv", "fp8"), "--kv fp8 has no meaning with --loss"),
        (
            ("plan", "--bits", "4.5", "--concurrency", "8", "--context", "1024"),
            "--concurrency and --context count in a budget of bytes",
        ),
        (("register", "/nowhere", "theirs", "--no-evaluate"), "/nowhere"),
    ],
)
def test_what_cannot_be_quantized_is_said_before_any_work(
    capsys, write_config, arguments: tuple[str, ...], sentence: str
) -> None:
    assert sentence in run(capsys, "quantize", *arguments, "--config", str(write_config()))


def test_check_explains_a_model_on_a_target(capsys) -> None:
    main(["quantize", "check", str(MODEL), "--target", "vllm-cuda-hopper"])
    text = capsys.readouterr().out
    assert "LlamaForCausalLM, 16 module groups" in text
    assert "fp8-dynamic" in text
    main(["quantize", "check", str(MODEL), "--target", "vllm-cpu-avx512", "--json"])
    report = json.loads(capsys.readouterr().out)
    rows = {row["scheme"]: row for row in report["schemes"]}
    assert rows["w4a16-g128"]["legal"] == 16
    assert "w8a8-r7" in rows["w8a8"]["computes"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("variants",), "holds no variants; make them with `tiercel quantize`"),
        (("variants", "show", "int3"), "int3"),
        (("variants", "use", "int8", "abc"), "int8"),
        (("variants", "delete", "int8"), "int8"),
    ],
)
def test_a_variant_that_is_not_there(capsys, write_config, arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in run(capsys, *arguments, "--config", str(write_config()))


@pytest.mark.parametrize("out", ["", "DIRECTORY"])
def test_an_out_that_is_no_file_is_refused_before_work(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = out.replace("DIRECTORY", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["advise", "--parameters", "7B", "--out", given])
    assert ended.value.code == 2
    assert f"argument --out: {given!r} is a directory; name a file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_terminal_of_another_character_set_is_shown_what_it_can_show() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "advise", "--parameters", "7B", "--brief"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert said.stdout.decode("ascii")


def test_variants_are_listed_where_gpus_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sick() -> None:
        raise GpuError("nvidia-smi ended with status 15")

    monkeypatch.setattr("deploy.machine.look", sick)
    found = stale_variants(None, [SimpleNamespace(variant="int8")])  # type: ignore[arg-type, list-item]
    assert found == {"int8": ()}
    assert "whether measurements are stale is not known: nvidia-smi" in capsys.readouterr().err
