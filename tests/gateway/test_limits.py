"""What attempts may take comes from the configuration; and how many answers are asked again."""

from __future__ import annotations

from gateway_stack import make_config

from gateway.proxy.escalations import Escalations
from gateway.proxy.limits import limits_of


def test_every_limit_is_a_setting() -> None:
    times = {
        "first_byte_timeout_s": 11.0,
        "answer_timeout_s": 12.0,
        "idle_timeout_s": 13.0,
        "total_timeout_s": 14.0,
    }
    roles = {"core": {"wait_s": 3.0}, "summarizer": {"escalate": True}}
    found = limits_of(make_config(gateway=times, roles=roles, watch={"escalated_share": 0.5}))
    assert (found.first_byte_s, found.answer_s, found.idle_s, found.total_s) == (11.0, 12.0, 13.0, 14.0)
    assert found.wait_s == {"core": 3.0, "summarizer": 0.0}
    assert (found.escalates, found.escalated_share) == ({"summarizer"}, 0.5)
    assert (found.listened_share, found.paced) == (1.0, False)


def test_answers_are_listened_to_only_where_something_can_be_heard() -> None:
    assert limits_of(make_config(quality={"logprobs": False})).listened_share == 0.0


def test_targets_have_it_learned_how_fast_pools_are() -> None:
    roles = {"core": {"target": {"ttft_s": 1.0}}}
    assert limits_of(make_config(roles=roles)).paced


def test_no_more_than_a_share_is_asked_again() -> None:
    """Whatever a variant answers: the next one's load is bounded."""
    escalations = Escalations(0.2)
    assert sum(escalations.allows("core", wanted=True) for _ in range(1000)) <= 0.2 * 1020
    assert escalations.allows("summarizer", wanted=True), "roles have their own"


def test_good_answers_leave_room_for_bad_ones_and_not_for_ever() -> None:
    escalations = Escalations(0.1)
    for _ in range(20_000):
        assert not escalations.allows("core", wanted=False)
    asked = sum(escalations.allows("core", wanted=True) for _ in range(2000))
    assert 100 < asked < 600, "what was long ago has faded"
