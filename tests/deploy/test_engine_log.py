"""The line that says why an engine ended is found in logs of vLLM 0.32 as it wrote them (frames left out)."""

from pathlib import Path

import pytest

from deploy.engine_log import reason

LOGS = Path(__file__).with_name("engine_logs")


@pytest.mark.parametrize(
    ("log", "begins"),
    [
        (
            "missing_weights",
            "ValueError: Following weights were not initialized from checkpoint: {'model.layers.8.",
        ),
        (
            "act_order",
            "VllmConfig: GPTQ group activation ordering (desc_act=True) is no longer supported. Use a",
        ),
        (
            "context_too_long",
            "ModelConfig: User-specified max_model_len (99999999) is greater than the derived",
        ),
        (
            "unknown_architecture",
            "ModelConfig: The checkpoint you are trying to load has model type `nosuch` but",
        ),
        ("unknown_argument", "serve_vllm.py: error: unrecognized arguments: --no-such-flag"),
        ("path_with_brackets", "RuntimeError: Cannot find any model weights with `/models/b[b]`"),
        ("no_directory", "HFValidationError: Repo id must use alphanumeric chars"),
        ("killed", "EngineDeadError: EngineCore encountered an issue."),
    ],
)
def test_the_cause_is_found(log: str, begins: str) -> None:
    found = reason((LOGS / f"{log}.log").read_text(encoding="utf-8"))
    assert found.startswith(begins)
    assert "[type=" not in found


def test_a_field_that_is_wrong_is_named() -> None:
    log = (
        "pydantic_core._pydantic_core.ValidationError: 2 validation errors for CacheConfig\n"
        "cache_dtype\n  Input should be 'auto' [type=literal_error, input_value='nonsense', input_type=str]\n"
    )
    assert reason(log) == "CacheConfig: cache_dtype: Input should be 'auto' (and 1 more)"


def test_warnings_that_quote_an_error_are_none() -> None:
    log = (
        "(APIServer pid=1) WARNING 11-26 07:02:59 [u.py:2] This causes errors like `OSError: [Errno 24]\n"
        "(EngineCore pid=2) ERROR 11-26 07:03:00 [core.py:1] AssertionError\n"
    )
    assert reason(log) == "AssertionError"


def test_a_crash_without_an_exception_is_its_own_cause() -> None:
    log = (
        "(Worker pid=3) Fatal Python error: Illegal instruction\n"
        "(EngineCore pid=2) ERROR 11-26 07:03:00 [m.py:9] Worker proc VllmWorker-0 died unexpectedly\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert reason(log) == "Fatal Python error: Illegal instruction"


def test_what_was_asserted_is_said() -> None:
    log = "Traceback:\n    assert heads % ranks == 0\n           ^^^^^\nAssertionError\n"
    assert reason(log) == "AssertionError: heads % ranks == 0"
