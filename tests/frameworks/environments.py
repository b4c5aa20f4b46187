"""The frameworks, and an environment for each:

``python -m tests.frameworks.environments [--if-possible] [NAME ...]``

An environment lies in ``var/frameworks/NAME`` and is made anew when what ``environments.toml``
says of it changes.
"""

from __future__ import annotations

import json
import shutil
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
    """``install`` is what pip is given, or npm; ``shared``: the product's own environment has it as well."""

    name: str
    title: str
    install: tuple[str, ...]
    shared: bool = False
    npm: bool = False

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
    def programs(self) -> Path | None:
        """Where the programs of what npm installed are; None where they are not."""
        found = PLACE / self.name / "node_modules/.bin"
        return found if self.npm and found.is_dir() and self._stamp.is_file() else None

    @property
    def _stamp(self) -> Path:
        return PLACE / self.name / "installed.json"

    def make(self) -> str:
        """Make its environment where it is not as it should be; says what was done."""
        wanted = json.dumps(self.install)
        if self._stamp.is_file() and self._stamp.read_text(encoding="utf-8") == wanted:
            return f"{self.name}: is there, {self._megabytes()} MB"
        began = time.monotonic()
        place = PLACE / self.name
        if self.npm:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            self._run("npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(place))
        else:
            venv.create(place, clear=True, with_pip=True)
            self._run(
                str(self.own), "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-compile"
            )
        self._stamp.write_text(wanted, encoding="utf-8")
        return f"{self.name}: made in {time.monotonic() - began:.0f} s, {self._megabytes()} MB"

    def _run(self, *installer: str) -> None:
        subprocess.run([*installer, *self.install], check=True, cwd=ROOT)

    def _megabytes(self) -> int:
        files = (path for path in (PLACE / self.name).rglob("*") if path.is_file() and not path.is_symlink())
        return sum(path.stat().st_size for path in files) >> 20


def frameworks() -> dict[str, Framework]:
    """All of them, by name; what npm installs last."""
    text = (Path(__file__).parent / "environments.toml").read_text(encoding="utf-8")
    return {
        name: Framework(
            name,
            one["title"],
            tuple(one.get("install", one.get("npm"))),
            one.get("shared", False),
            "npm" in one,
        )
        for name, one in tomllib.loads(text).items()
    }


def main() -> None:
    known = frameworks()
    required = "--if-possible" not in sys.argv
    missing: list[str] = []
    for name in [one for one in sys.argv[1:] if one != "--if-possible"] or known:
        if name not in known:
            sys.exit(f"{name}: is no framework; known are {', '.join(known)}")
        try:
            print(known[name].make(), flush=True)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            missing.append(name)
            print(f"{name}: could not be installed ({error}); its scenarios are skipped", file=sys.stderr)
    if missing and required:
        sys.exit(f"{', '.join(missing)}: could not be installed; run this again")


if __name__ == "__main__":
    main()
