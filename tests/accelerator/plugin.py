"""Lets torch have an accelerator, which all that is tested here takes for a GPU.

    python -m pytest -p tests.accelerator.plugin tests/quantize/train/test_qat.py

Needs a C++ compiler. What is built lies under ``var/tests``.
"""

from __future__ import annotations

from types import ModuleType

import torch

from tests.accelerator.build import NAME, built


def begin() -> None:
    """From now on torch has it."""
    torch.ops.load_library(str(built()))
    torch.utils.rename_privateuse1_backend(NAME)
    module = ModuleType(f"torch.{NAME}")
    vars(module).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        manual_seed_all=lambda _seed: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
        _is_in_bad_fork=lambda: False,
    )
    torch._register_device_module(NAME, module)


begin()
