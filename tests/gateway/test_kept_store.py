"""What is kept lies sealed, within bounds, and opens with its key alone."""

from __future__ import annotations

import base64
import os
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gateway_stack import make_config
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Config, ConfigError
from gateway.kept.cipher import KEY_FILE, Cipher, SealError, cipher_of
from gateway.kept.conversation import Asked, Kind
from gateway.kept.store import About, Given, KeptStore, Limits, Row, limits_of, store_url
from gateway.store.database import StoreError

KEY = bytes(range(32))
NOW = 1_000_000.0
LIMITS = Limits(days=30, max_bytes=1 << 20, most={("request", "core"): 3, ("answer", "core"): 2})


def asked(text: str) -> bytes:
    return msgspec.msgpack.encode(Asked([{"role": "user", "content": text}]))


def row(text: str, kind: Kind = "request", role: str = "core", at: float = NOW, **more: Any) -> Row:
    return Row(About(kind, role, more.pop("variant", "a:int4"), "1", at, **more), asked(text))


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'kept.db'}"
    empty: str = request.getfixturevalue("empty_postgresql")
    return empty


def texts(store: KeptStore, role: str = "core") -> list[str]:
    found = [store.question(number) for number in store.ids("request", role)]
    return [one.asked.messages[0]["content"] for one in found if one is not None]


def test_the_newest_stay_equal_ones_are_one_and_old_ones_go(url: str) -> None:
    store = KeptStore(url, Cipher(KEY))
    assert store.keep([row("a"), row("b"), row("a")], LIMITS, NOW) == [True, True, False]
    assert store.keep([row("a"), row("c"), row("d")], LIMITS, NOW) == [False, True, True]
    assert texts(store) == ["b", "c", "d"]
    store.keep([row("e", role="other", at=NOW + 86_400)], LIMITS, NOW)
    store.prune(LIMITS, NOW + 30.5 * 86_400)
    assert (texts(store), texts(store, "other")) == ([], ["e"])
    store.close()


def test_answers_are_bounded_by_variant_and_each_counts(url: str) -> None:
    store = KeptStore(url, Cipher(KEY))
    rows = [row("same", "answer", variant=variant) for variant in ("a:int4", "a:int8") for _ in range(3)]
    assert store.keep(rows, LIMITS, NOW) == [True] * 6
    assert [(one.variant, one.number) for one in store.counts()] == [("a:int4", 2), ("a:int8", 2)]
    (first, *_) = store.ids("answer")
    assert store.answer(first) == rows[1]
    assert store.take(first)
    assert not store.take(first), "of two processes one alone has it"
    assert store.answer(first) is None
    store.close()


def test_bytes_are_bounded_in_all(url: str) -> None:
    store = KeptStore(url, Cipher(KEY))
    limits = Limits(30, 3000, {("request", "core"): 100})
    store.keep([row(f"{number} " + "x" * 400) for number in range(20)], limits, NOW)
    counts = store.counts()
    assert sum(one.bytes for one in counts) <= 3000
    assert texts(store)[-1].startswith("19 ")
    assert sum(one.number for one in counts) >= 5
    store.close()


def test_nothing_of_the_content_lies_open(tmp_path: Path) -> None:
    path = tmp_path / "kept.db"
    store = KeptStore(f"sqlite:///{path}", Cipher(KEY))
    store.keep([row("a very particular sentence")], LIMITS, NOW)
    (number,) = store.ids("request")
    store.give(number, Given("v1", "another particular sentence"))
    question = store.question(number)
    assert question is not None
    assert question.given == Given("v1", "another particular sentence")
    for shown in (repr(question), repr(row("particular")), repr(Cipher(KEY))):
        assert "particular" not in shown
    store.close()
    assert b"particular" not in b"".join(one.read_bytes() for one in tmp_path.iterdir())
    assert path.stat().st_mode & 0o077 == 0


def test_another_key_opens_nothing_and_is_said(url: str) -> None:
    store = KeptStore(url, Cipher(KEY))
    store.keep([row("a")], LIMITS, NOW)
    store.close()
    with pytest.raises(StoreError, match=r"written with another key .*tiercel tasks forget --all"):
        KeptStore(url, Cipher(bytes(32)))
    # Without any key it is counted and deleted; then another key may begin.
    sealed = KeptStore(url, None)
    assert [one.number for one in sealed.counts()] == [1]
    assert sealed.forget() == 1
    sealed.close()
    KeptStore(url, Cipher(bytes(32))).close()


def test_a_role_is_forgotten_alone(url: str) -> None:
    store = KeptStore(url, Cipher(KEY))
    store.keep([row("a"), row("b", role="other"), row("c", "answer")], LIMITS, NOW)
    assert store.forget("core") == 2
    assert (texts(store), texts(store, "other")) == ([], ["b"])
    store.close()


@pytest.mark.parametrize(
    "change",
    [
        "update tiercel_kept set data = substr(data, 1, length(data) - 3)",
        "update tiercel_kept set data = x'00'",
        "update tiercel_kept set role = 'other'",
        "update tiercel_kept set variant = 'a:bf16'",
        "update tiercel_kept set data = (select data from tiercel_kept order by id desc limit 1)",
    ],
)
def test_a_row_that_was_cut_off_or_changed_does_not_open(tmp_path: Path, change: str) -> None:
    path = tmp_path / "kept.db"
    store = KeptStore(f"sqlite:///{path}", Cipher(KEY))
    store.keep([row("a"), row("b", at=NOW + 1)], LIMITS, NOW)
    with sqlite3.connect(path) as connection:
        connection.execute(change + ("" if "where" in change else " where id = 1"))
    connection.close()
    assert store.question(1) is None
    assert store.question(2) is not None
    store.close()


@given(st.binary(max_size=100), st.binary(max_size=20), st.integers(0, 200), st.integers(1, 255))
def test_a_seal_holds(data: bytes, about: bytes, at: int, change: int) -> None:
    cipher = Cipher(KEY)
    sealed = cipher.seal(data, about)
    assert cipher.open(sealed, about) == data
    assert cipher.seal(data, about) != sealed
    broken = bytearray(sealed)
    broken[at % len(broken)] ^= change
    for wrong, with_what in (
        (bytes(broken), about),
        (sealed, about + b"x"),
        (sealed[:-1], about),
        (b"", about),
    ):
        with pytest.raises(SealError):
            cipher.open(wrong, with_what)
    with pytest.raises(SealError):
        Cipher(bytes(32)).open(sealed, about)


def with_kept(tmp_path: Path, **kept: Any) -> Config:
    return make_config(run_dir=tmp_path / "run", kept=kept)


def test_the_key_is_made_at_first_use_and_its_owners_alone(tmp_path: Path) -> None:
    config = with_kept(tmp_path)
    path = tmp_path / "run" / KEY_FILE
    with pytest.raises(ConfigError, match=r"kept.key does not exist: without its key .* cannot be read"):
        cipher_of(config)
    cipher = cipher_of(config, make=True)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in path.parent.iterdir()] == [KEY_FILE]
    assert cipher_of(config, make=True).open(cipher.seal(b"x", b""), b"") == b"x"
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"others than its owner may read this key; chmod 600"):
        cipher_of(config)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(ConfigError, match="is no key; give 32 bytes in base64"):
        cipher_of(config)


def test_a_key_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_kept(tmp_path, key_env="A_KEY")
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(ConfigError, match="the environment has no 'A_KEY', and without its key nothing"):
        cipher_of(config, make=True)
    monkeypatch.setenv("A_KEY", "c2hvcnQ=")
    with pytest.raises(ConfigError, match="A_KEY: is no key"):
        cipher_of(config)
    key = os.urandom(32)
    for text in (base64.b64encode(key), base64.urlsafe_b64encode(key) + b"\n"):
        monkeypatch.setenv("A_KEY", text.decode())
        assert cipher_of(config).open(Cipher(key).seal(b"x", b""), b"") == b"x"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"watch": {"reference": "batch"}},
            r"watch.reference: batch: what agents ask and are answered would be kept, redacted and "
            r"encrypted; to consent add the section `kept: \{\}`",
        ),
        ({"roles": {"core": {"record": {}}}}, r"roles.core.record: what agents ask .* to consent add"),
        ({"watch": {"batch": {"most": 5}}}, "batch: has no meaning with reference: live"),
        ({"kept": {"store": "sqlite:///x.db"}}, "name the environment variable that holds it in key_env"),
        ({"kept": {"store": "nonsense", "key_env": "K"}}, "kept.store: is no database URL"),
        ({"kept": {"redact": ["(?<=a)b"]}}, "is no pattern of RE2"),
        ({"kept": {}, "roles": {"core": {"record": {"rate": 2}}}}, "less than or equal to 1"),
    ],
)
def test_what_is_not_consented_to_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_config(**{"roles": {"core": {}}, "default_role": "core"} | changes)


def test_limits_are_the_configurations(tmp_path: Path) -> None:
    config = make_config(
        run_dir=tmp_path,
        kept={"days": 2, "max_bytes": 5000},
        watch={"reference": "batch", "batch": {"most": 7}},
        roles={"core": {"record": {"most": 9}}, "other": {}},
    )
    most = {("request", "core"): 9, ("answer", "core"): 7, ("answer", "other"): 7}
    assert limits_of(config) == Limits(2, 5000, most)
    assert store_url(config) == f"sqlite:///{tmp_path / 'kept.db'}"
