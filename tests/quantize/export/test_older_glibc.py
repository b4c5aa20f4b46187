"""A library that asks for a newer glibc for C23's functions alone is loaded by an older one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from quantize.export.older_glibc import ElfError, loadable_copies, without_newer

SOURCE = """
extern long newer(const char *, char **, int);
__asm__(".symver newer, __isoc23_strtol@GLIBC_2.38");
long twice(const char *text) { return 2 * newer(text, 0, 10); }
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with such a library, built against a stub that calls itself libc."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    place = tmp_path_factory.mktemp("libraries")
    stub, script = place / "stub.c", place / "stub.map"
    stub.write_text("long __isoc23_strtol(const char *a, char **b, int c) { return 0; }", encoding="utf-8")
    script.write_text("GLIBC_2.38 { global: __isoc23_strtol; };", encoding="utf-8")
    (place / "used.c").write_text(SOURCE, encoding="utf-8")
    made = place / "made"
    made.mkdir()
    build = ["gcc", "-shared", "-fPIC", "-nostdlib"]
    version = f"-Wl,--version-script={script}"
    subprocess.run([*build, version, "-Wl,-soname,libc.so.6", stub, "-o", place / "libc.so.6"], check=True)
    subprocess.run([*build, place / "used.c", place / "libc.so.6", "-o", made / "libused.so"], check=True)
    return made


def test_the_copy_loads_and_computes(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copies = loadable_copies(libraries, "used-1")
    assert copies == tmp_path / "tiercel" / "used-1"
    assert ctypes.CDLL(str(copies / "libused.so")).twice(b"21") == 42
    assert loadable_copies(libraries, "used-1") == copies
    assert [path.name for path in (tmp_path / "tiercel").iterdir()] == ["used-1"]


def test_what_needs_more_of_the_newer_one_is_refused(libraries: Path) -> None:
    library = (libraries / "libused.so").read_bytes().replace(b"__isoc23_strtol", b"__another_funct")
    with pytest.raises(ElfError, match=r"__another_funct of GLIBC_2\.38"):
        without_newer(library, "libused.so")
    with pytest.raises(ElfError, match="no library of 64 bits"):
        without_newer(b"MZ\x90\x00 and more", "libused.dll")
