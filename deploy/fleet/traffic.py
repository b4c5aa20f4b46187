"""What agents ask for: per role, how many requests a session makes and how long they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.config.yaml_text import YamlError, read_yaml

DEFAULT_PROMPT_TOKENS, DEFAULT_ANSWER_TOKENS = 512, 64
"""Of roles that nothing is known of."""


class TrafficError(ValueError):
    """Traffic cannot be read. The text names where, the value and the fix."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RoleTraffic(_Strict):
    """The requests of one role in one session; tokens are means per request."""

    requests: float = Field(default=1.0, gt=0, description="per session")
    prompt_tokens: float = Field(default=DEFAULT_PROMPT_TOKENS, ge=1)
    cached_tokens: float = Field(
        default=0.0, ge=0, description="of the prompt's, that come out of the prefix cache"
    )
    answer_tokens: float = Field(default=DEFAULT_ANSWER_TOKENS, ge=1)

    @property
    def new_tokens(self) -> float:
        """Prompt tokens that an engine has to compute."""
        return max(1.0, self.prompt_tokens - self.cached_tokens)

    @property
    def context(self) -> float:
        """Tokens in the cache while it is answered, the mean."""
        return self.prompt_tokens + self.answer_tokens / 2


class Traffic(_Strict):
    """Sessions that run at the same time, each making the requests of ``roles`` one after the other."""

    roles: dict[str, RoleTraffic] = Field(min_length=1)
    sessions: int = Field(default=8, ge=1, le=4096, description="at the same time")
    pause_s: float = Field(default=0.0, ge=0, description="per session, in which nothing is asked")


def read_traffic(path: Path, roles: Iterable[str]) -> Traffic:
    """Traffic from a YAML file. Raises TrafficError."""
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
        traffic = Traffic.model_validate(raw)
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise TrafficError(f"traffic {path} cannot be read: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise TrafficError(f"traffic {path}: {where}: {first['msg']}, got {first['input']!r}") from None
    return _of_known_roles(traffic, roles, str(path))


def default_traffic(roles: Iterable[str], sessions: int) -> Traffic:
    """One request of every role in a session, of a usual length."""
    return Traffic(roles={role: RoleTraffic() for role in roles}, sessions=sessions)


def traffic_from_metrics(text: str, roles: Iterable[str], sessions: int) -> Traffic:
    """Traffic from a gateway's ``/metrics``: the mean request of every role, as often as each came.

    A "session" is then one request of that mixture. Raises TrafficError when there were no requests.
    """
    requests: dict[str, float] = {}
    tokens: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            role = sample.labels.get("role", "")
            if sample.name == "tiercel_requests_total" and sample.labels.get("outcome") == "200":
                requests[role] = requests.get(role, 0.0) + sample.value
            elif sample.name == "tiercel_tokens_total":
                kind = sample.labels["kind"]
                tokens[role, kind] = tokens.get((role, kind), 0.0) + sample.value
            elif sample.name == "tiercel_cached_tokens_total":
                tokens[role, "cached"] = tokens.get((role, "cached"), 0.0) + sample.value
    seen = {role: requests[role] for role in roles if requests.get(role)}
    if not seen:
        raise TrafficError(
            "the gateway has answered no request yet, so its metrics say nothing of the traffic; give "
            "--traffic FILE"
        )
    return Traffic(roles=_means(seen, tokens), sessions=sessions)


def _means(seen: Mapping[str, float], tokens: Mapping[tuple[str, str], float]) -> dict[str, RoleTraffic]:
    total = sum(seen.values())
    found = {}
    for role, count in seen.items():
        prompt = tokens.get((role, "prompt"), 0.0) / count
        found[role] = RoleTraffic(
            requests=count / total,
            prompt_tokens=max(1.0, prompt),
            cached_tokens=min(prompt, tokens.get((role, "cached"), 0.0) / count),
            answer_tokens=max(1.0, tokens.get((role, "completion"), 0.0) / count),
        )
    return found


def _of_known_roles(traffic: Traffic, roles: Iterable[str], source: str) -> Traffic:
    known = sorted(roles)
    for role in traffic.roles:
        if role not in known:
            raise TrafficError(f"{source}: roles.{role}: is not a role; known: {', '.join(known)}")
    return traffic
