"""The frameworks, and an environment for each: ``python -m tests.frameworks.environments [NAME ...]``.

An environment lies in ``var/frameworks/NAME`` and is made anew when what ``environments.toml``
says of it changes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "var/frameworks"
PAGES = ROOT / "docs/frameworks"


@dataclass(frozen=True)
class Framework:
    """``install`` is what pip is given; ``shared``: the product's own environment has it as well."""

    name: str
    title: str
    install: tuple[str, ...]
    shared: bool = False

    @property
    def page(self) -> Path:
        """Its recipes."""
        return PAGES / f"{self.name}.md"

    @property
    def own(self) -> Path:
        """The Python of its environment, which may not be there."""
        return PLACE / self.name / "bin/python"

    @property
    def python(self) -> Path | None:
        """The Python that it runs with here; None where there is none."""
        if self.own.exists() and self._stamp.is_file():
            return self.own
        return Path(sys.executable) if self.shared else None

    @property
    def _stamp(self) -> Path:
        return PLACE / self.name / "installed.json"

    def make(self) -> str:
        """Make its environment where it is not as it should be; says what was done."""
        wanted = json.dumps(self.install)
        if self._stamp.is_file() and self._stamp.read_text(encoding="utf-8") == wanted:
            return f"{self.name}: is there, {self._megabytes()} MB"
        began = time.monotonic()
        venv.create(PLACE / self.name, clear=True, with_pip=True)
        pip = [
            str(self.own),
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--quiet",
            "--no-compile",
        ]
        subprocess.run([*pip, *self.install], check=True, cwd=ROOT)
        self._stamp.write_text(wanted, encoding="utf-8")
        return f"{self.name}: made in {time.monotonic() - began:.0f} s, {self._megabytes()} MB"

    def _megabytes(self) -> int:
        files = (path for path in (PLACE / self.name).rglob("*") if path.is_file() and not path.is_symlink())
        return sum(path.stat().st_size for path in files) >> 20


def frameworks() -> dict[str, Framework]:
    """All of them, by name."""
    text = (Path(__file__).parent / "environments.toml").read_text(encoding="utf-8")
    return {
        name: Framework(name, one["title"], tuple(one["install"]), one.get("shared", False))
        for name, one in tomllib.loads(text).items()
    }


def main() -> None:
    known = frameworks()
    for name in sys.argv[1:] or known:
        if name not in known:
            sys.exit(f"{name}: is no framework; known are {', '.join(known)}")
        try:
            print(known[name].make(), flush=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{name}: could not be installed (status {error.returncode}); run this again")


if __name__ == "__main__":
    main()
