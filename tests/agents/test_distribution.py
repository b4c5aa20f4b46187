"""The distribution that applications install: light, without pins, and beside OpenAI's ``agents``."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

AGENTS = Path(__file__).parents[2] / "agents"
PROJECT = tomllib.loads((AGENTS / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_package_alone_imports_nothing_but_pythons_own() -> None:
    modules = [path.stem for path in (AGENTS / "tiercel_agents").glob("*.py") if path.stem != "__init__"]
    code = (
        f"import sys; sys.path.insert(0, {str(AGENTS)!r}); before = set(sys.modules)\n"
        f"import tiercel_agents, {', '.join(f'tiercel_agents.{name}' for name in modules)}\n"
        "print(*{name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names) - before)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["tiercel_agents"]


def test_an_application_need_not_mind_its_requirements() -> None:
    assert PROJECT["dependencies"] == []
    for extra, needs in PROJECT["optional-dependencies"].items():
        for need in map(Requirement, needs):
            assert need.name != "torch", extra
            assert not any(one.operator in ("==", "===", "<", "<=", "~=") for one in need.specifier), (
                f"{extra}: {need} would pin what an application has"
            )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy to build from: what pip leaves behind would be in the next wheel."""
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(AGENTS, tmp_path / "agents", ignore=ignored))


def test_the_wheel_has_what_is_no_module(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=120)
    (made,) = tmp_path.glob("*.whl")
    inside = zipfile.ZipFile(made).namelist()
    for path in (source / "tiercel_agents").rglob("*"):
        if path.is_file():
            assert path.relative_to(source).as_posix() in inside
    assert not [name for name in inside if name.startswith("agents")]


@pytest.mark.network
def test_it_is_installed_beside_openais_agents(source: Path, tmp_path: Path) -> None:
    """In an environment of its own, from the package index that pip is set up with."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    found = subprocess.run(
        [*pip, "download", "--quiet", "--no-deps", "--dest", str(tmp_path), "openai-agents"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if found.returncode != 0:
        reason = (found.stderr.strip().splitlines() or ["it said nothing"])[-1]
        pytest.skip(f"pip cannot fetch openai-agents from its package index: {reason}")
    install = [*pip, "install", "--quiet", "--no-compile", f"{source}[adk]", "openai-agents"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    code = (
        "import agents, tiercel_agents.adk.client, tiercel_agents.adk.judge\n"
        "from agents import Agent, Runner\n"
        "from tiercel_agents.adk import GatewayPlugin\n"
        "print(agents.__file__); print(tiercel_agents.__file__)"
    )
    done = subprocess.run(
        [str(python), "-I", "-c", code], capture_output=True, text=True, timeout=300, cwd=AGENTS.parent
    )
    assert done.returncode == 0, done.stderr
    theirs, ours = done.stdout.split()
    assert theirs.endswith("site-packages/agents/__init__.py")
    assert ours.endswith("site-packages/tiercel_agents/__init__.py")
