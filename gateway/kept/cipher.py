"""How kept conversations are sealed: AES-256 in GCM, with a key from the environment or a file of its own.

What a row says openly (its kind, role, variant …) is authenticated with it, so that neither can be changed or
put beside another.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from gateway.config import Config, ConfigError, KeptSettings

KEY_BYTES = 32
_NONCE_BYTES = 12
KEY_FILE = "kept.key"


class SealError(ValueError):
    """Something cannot be opened: it was sealed with another key, changed, or cut off."""


class Cipher:
    """Seals and opens with one key."""

    def __init__(self, key: bytes) -> None:
        """``key``: of ``KEY_BYTES``."""
        self._aead = AESGCM(key)
        self._mark = hashlib.blake2b(b"tiercel marks", key=key, digest_size=32).digest()

    def __repr__(self) -> str:
        return "Cipher(…)"

    def seal(self, data: bytes, about: bytes) -> bytes:
        """``about``: what is authenticated with it, and needed to open it."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, data, about)

    def open(self, sealed: bytes, about: bytes) -> bytes:
        """Raises SealError."""
        try:
            return self._aead.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], about)
        except (InvalidTag, ValueError):
            raise SealError("was sealed with another key, changed, or cut off") from None

    def mark(self, data: bytes) -> str:
        """The same for the same data; without the key it says nothing of them."""
        return hmac.new(self._mark, data, hashlib.sha256).hexdigest()


def cipher_of(config: Config, *, make: bool = False) -> Cipher:
    """By the configuration's key; ``make``: its file, where it has none yet. Raises ConfigError."""
    settings = config.kept or KeptSettings()
    if settings.key_env is not None:
        given = os.environ.get(settings.key_env)
        if not given:
            raise ConfigError(
                f"kept.key_env: the environment has no {settings.key_env!r}, and without its key nothing can "
                "be kept or read; set it to 32 bytes in base64 (`openssl rand -base64 32` makes some)"
            )
        return Cipher(_decoded(given, f"kept.key_env: {settings.key_env}"))
    path = config.run_dir / KEY_FILE
    if make:
        _make(path)
    return Cipher(_read(path))


def _make(path: Path) -> None:
    """Whole or not at all, and never over one that is there: another process may be as far."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(base64.b64encode(secrets.token_bytes(KEY_BYTES)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink()


def _read(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: without its key what was kept cannot be read; put it back, or delete "
            "what was kept with `tiercel tasks forget --all`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the key of what is kept cannot be read ({error}); mend that") from None
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path}: others than its owner may read this key; chmod 600 {path}")
    return _decoded(text, str(path))


def _decoded(text: str, where: str) -> bytes:
    try:
        key = base64.b64decode(text.strip().translate(str.maketrans("-_", "+/")), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"{where}: is no key; give 32 bytes in base64 (`openssl rand -base64 32` makes some)"
        )
    return key
