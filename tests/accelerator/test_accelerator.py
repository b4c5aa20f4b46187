"""What is for GPUs runs to its end on an accelerator that refuses a tensor left on the processor.

The tests of making, training and looking into models run once more in a process of their own, in which torch
has one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.accelerator.build import compiler

ROOT = Path(__file__).parents[2]
AGAIN = (
    "tests/quantize/test_asymmetric.py::test_the_first_group_is_gptqs_and_a_killed_run_ends_with_the_same_bytes",
    "tests/quantize/test_asymmetric.py::test_experts_are_made_as_parts_are",
    "tests/quantize/test_sensitivity.py::test_estimates_agree_with_the_divergence_in_torch",
    "tests/quantize/test_tune.py::test_tuning_takes_off_some_of_the_loss_and_leaves_the_model_as_it_was",
    "tests/quantize/test_massive.py::test_the_block_that_writes_it_is_found_and_no_other",
    "tests/quantize/test_explore.py::test_experts_are_rounded_and_restored_as_well",
    "tests/quantize/test_compact.py::test_masks_leave_zeros_and_everything_else_as_it_was",
    "tests/quantize/test_compensate.py::test_more_rank_brings_a_model_nearer_to_what_it_was",
    "tests/quantize/train/test_qat.py::test_a_mixed_plan_trains_every_group_at_its_own_bits",
    "tests/quantize/train/test_run.py::test_training_learns_what_it_is_shown",
    "tests/quantize/train/test_distill.py::test_a_student_comes_nearer_to_its_teacher_in_what_it_learns",
)
MIXED = """
import torch
import tests.accelerator.plugin

there = torch.ones(2, 2, device=torch.accelerator.current_accelerator())
assert float((there @ there).sum()) == 8.0
for wrong in (lambda: there + torch.ones(2, 2), lambda: there.copy_(there) @ torch.ones(2, 2),
              lambda: torch.linalg.cholesky_ex(torch.cat([there, torch.ones(2, 2)]))):
    try:
        wrong()
    except RuntimeError as error:
        assert "same device" in str(error), error
    else:
        raise AssertionError("a tensor of the processor was taken")
"""

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler: the accelerator cannot be built")


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_it_refuses_tensors_of_the_processor() -> None:
    python("-c", MIXED)


def test_what_is_for_gpus_runs_on_it() -> None:
    said = python("-m", "pytest", "-q", "-p", "tests.accelerator.plugin", "-p", "no:cacheprovider", *AGAIN)
    (count,) = re.findall(r"^(\d+) passed in", said, re.MULTILINE)  # and nothing failed or was skipped
    assert int(count) >= len(AGAIN)
