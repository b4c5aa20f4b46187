"""ADK's own evaluation with the gateway as judge. The judge is scripted: what is tested is that both
understand each other, since the demo model is far too small to judge."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_stack import Stack
from google.adk.evaluation.eval_case import Invocation
from google.adk.evaluation.eval_metrics import (
    EvalMetric,
    EvalStatus,
    HallucinationsCriterion,
    JudgeModelOptions,
    LlmAsAJudgeCriterion,
)
from google.adk.evaluation.final_response_match_v2 import FinalResponseMatchV2Evaluator
from google.adk.evaluation.hallucinations_v1 import HallucinationsV1Evaluator
from google.genai import types

import tiercel_agents.adk.judge  # noqa: F401  # registers the name

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*using the `ReadOnly` qualifier:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the .* attribute on the instance:DeprecationWarning"),
]

JUDGE = JudgeModelOptions(judge_model="tiercel/assistant:bf16", num_samples=1)
ANSWER = "The order costs $277. It left on Monday."
SEGMENTS = "<sentence>The order costs $277.</sentence>\n<sentence>It left on Monday.</sentence>"


def content(text: str, role: str = "user") -> types.Content:
    return types.Content(role=role, parts=[types.Part(text=text)])


def invocation(answer: str = ANSWER) -> Invocation:
    asked = content("Order C2390, total: $277. What does it cost, and when did it leave?")
    return Invocation(invocation_id="1", user_content=asked, final_response=content(answer, "model"))


def block(sentence: str, label: str) -> str:
    return (
        f"sentence: {sentence}\nlabel: {label}\nrationale: so\nsupporting_excerpt: null\n"
        "contradicting_excerpt: null"
    )


@pytest.fixture
async def judge(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TIERCEL_URL", stack.url)
    return stack.engines["bf16"]


async def test_hallucinations_v1(judge: Any) -> None:
    judge.script.replies = [
        SEGMENTS,
        block("The order costs $277.", "supported") + "\n" + block("It left on Monday.", "unsupported"),
    ]
    criterion = HallucinationsCriterion(threshold=0.8, judge_model_options=JUDGE)
    metric = EvalMetric(metric_name="hallucinations_v1", threshold=0.8, criterion=criterion)
    result = await HallucinationsV1Evaluator(metric).evaluate_invocations([invocation()])
    assert result.overall_score == 0.5
    assert result.overall_eval_status is EvalStatus.FAILED
    segmenter, validator = judge.requests
    assert ANSWER in json.dumps(segmenter["messages"])
    assert "Order C2390" in json.dumps(validator["messages"])


@pytest.mark.parametrize(("verdict", "score"), [("valid", 1.0), ("invalid", 0.0)])
async def test_final_response_match_v2(judge: Any, verdict: str, score: float) -> None:
    judge.script.replies = [json.dumps({"reasoning": "so", "is_the_agent_response_valid": verdict}, indent=1)]
    criterion = LlmAsAJudgeCriterion(threshold=0.5, judge_model_options=JUDGE)
    metric = EvalMetric(metric_name="final_response_match_v2", threshold=0.5, criterion=criterion)
    evaluator = FinalResponseMatchV2Evaluator(metric)
    result = await evaluator.evaluate_invocations([invocation()], [invocation("It costs $277.")])
    assert result.overall_score == score
