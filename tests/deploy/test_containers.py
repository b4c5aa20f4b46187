"""Images and compose files, as far as they can be tried without a container engine: what they name exists,
what they start starts, and they agree with the chart."""

from __future__ import annotations

import asyncio
import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from packaging.requirements import Requirement

from gateway.config import Config, load_config
from gateway.upstream.fake import FakeEngine
from tests.helm.chart import containers, of_kind, parsed_by_vllm, pods, render, scenario

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gateway"))

from gateway_stack import OTHERS, addresses, eventually, free_port, settings, write_variants

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "deploy" / "containers"
COMPOSE = ROOT / "deploy" / "compose"
IMAGES = sorted(CONTAINERS.glob("*.Dockerfile"))
STACKS = [COMPOSE / "compose.cpu.yaml", COMPOSE / "compose.gpu.yaml"]
EACH_IMAGE = pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.stem)
EACH_STACK = pytest.mark.parametrize("stack", STACKS, ids=lambda path: path.stem)
HEAVY = {"torch", "transformers", "llmcompressor", "compressed_tensors", "datasets"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions(image: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions with their arguments, lines that go on put together."""
    text = re.sub(r"^\s*#.*\n", "", image.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    parts = [line.partition(" ") for line in lines if line.strip()]
    return [(name, rest.strip()) for name, _, rest in parts]


def last(image: Path, name: str) -> str:
    return [rest for found, rest in instructions(image) if found == name][-1]


def copied(image: Path) -> Iterator[str]:
    """What an image takes from the repository."""
    for name, rest in instructions(image):
        if name == "COPY" and not rest.startswith("--from"):
            yield from rest.split()[:-1]


def ignored(path: str) -> bool:
    """By .dockerignore: the last line that fits decides."""
    found = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        parts = path.split("/")
        above = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        if pattern.startswith("**/"):
            fits = any(fnmatch.fnmatch(part, pattern.removeprefix("**/")) for part in parts)
        else:
            fits = any(fnmatch.fnmatch(one, pattern) for one in above)
        if fits:
            found = not line.startswith("!")
    return found


@EACH_IMAGE
def test_hadolint_has_nothing_to_say(image: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), str(image)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@EACH_IMAGE
def test_what_is_copied_exists_and_is_not_ignored(image: Path) -> None:
    for path in copied(image):
        assert (ROOT / path).exists(), path
        assert not ignored(path), path
    for path in ("deploy/assistant/model/model.safetensors", ".venv/bin/python", "var/run", ".git/config"):
        assert ignored(path), path


@EACH_IMAGE
def test_nobody_is_root_and_the_base_can_be_pinned(image: Path) -> None:
    assert last(image, "USER") == "10001:10001"
    stages = [rest.split()[0] for name, rest in instructions(image) if name == "FROM"]
    assert len(stages) == 2
    (base,) = {stage.strip("${}") for stage in stages}
    given = dict(rest.split("=", 1) for name, rest in instructions(image) if name == "ARG" and "=" in rest)
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", given[base]), "a tag, that --build-arg replaces by a digest"
    assert not given[base].endswith(":latest")
    assert {"HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT", "LABEL"} <= {name for name, _ in instructions(image)}


def test_the_versions_are_those_of_the_package() -> None:
    version = PROJECT["version"]
    for image in IMAGES:
        assert ("ARG", f"VERSION={version}") in instructions(image)
    assert f"TIERCEL_VERSION:-{version}" in (COMPOSE / "services.yaml").read_text(encoding="utf-8")
    setup = (ROOT / "deploy" / "setup.sh").read_text(encoding="utf-8")
    (torch,) = re.findall(r"^TORCH=(.+)$", setup, re.MULTILINE)
    (vllm,) = re.findall(r"^VLLM=(.+)$", setup, re.MULTILINE)
    assert f"torch=={torch}" in (CONTAINERS / "quantize.Dockerfile").read_text(encoding="utf-8")
    for image in (CONTAINERS / "quantize.Dockerfile", *STACKS):
        assert set(re.findall(r"vllm-openai(?:-cpu)?:\S*?v([\d.]+)", image.read_text())) == {vllm}, image


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of the package as the images make it: of what is copied and not ignored."""
    place = tmp_path_factory.mktemp("image")
    source = place / "src"
    for path in {path for image in IMAGES for path in copied(image)}:
        for one in [ROOT / path, *(ROOT / path).rglob("*")]:
            inside = one.relative_to(ROOT)
            if one.is_file() and not ignored(inside.as_posix()):
                (source / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(one, source / inside)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(place), str(source)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (made,) = place.glob("*.whl")
    return zipfile.ZipFile(made).namelist()


def test_the_package_in_the_images_is_whole(wheel: list[str]) -> None:
    """What is no module is left out of a package unless somebody names it."""
    for folder in ("deploy/engine_site", "gateway/console/static"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(ROOT).as_posix() in wheel
    assert "gateway/__main__.py" in wheel
    assert not [name for name in wheel if "agents" in name.split("/")[0]], "a distribution of its own"
    assert not [name for name in wheel if name.endswith(".safetensors") or name.startswith("tests")]


def closure(*extras: str) -> set[str]:
    """Distributions that tiercel needs with these extras and no others, by normalized name."""
    optional = PROJECT["optional-dependencies"]
    ours = [*PROJECT["dependencies"], *(need for extra in extras for need in optional[extra])]
    todo = [(need.name, frozenset(need.extras)) for need in map(Requirement, ours)]
    found = {"tiercel"}
    done: set[tuple[str, frozenset[str]]] = set()
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in done:
            continue
        done.add((name, wanted))
        found.add(normal(name))
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # of another platform
        for need in map(Requirement, needs):
            marker = need.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*wanted, "")):
                todo.append((need.name, frozenset(need.extras)))
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def kept_out(*extras: str) -> list[str]:
    """Top-level modules here that an installation with only these extras would not have."""
    there = closure(*extras)
    return [
        module
        for module, owners in metadata.packages_distributions().items()
        if not {normal(owner) for owner in owners} & there
    ]


BLOCK = """
import json, os, sys
from importlib.abc import MetaPathFinder
class NotInstalled(MetaPathFinder):
    absent = frozenset(json.loads(os.environ["ABSENT"]))
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotInstalled())
"""
"""As sitecustomize.py: hides what the image does not have."""


async def test_the_gateway_starts_as_its_image_starts_it(tmp_path: Path) -> None:
    """The image's command, in its environment, with the libraries of its extras alone; and it serves."""
    image = CONTAINERS / "gateway.Dockerfile"
    (extras,) = re.findall(r'"\.\[(.+)\]"', last_run_of_pip(image))
    assert last_run_of_pip(image).endswith(" ./agents")
    absent = kept_out(*extras.split(","))
    assert set(absent) >= HEAVY
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCK, encoding="utf-8")
    write_variants(tmp_path / "variants")
    port = free_port()
    python, *arguments = json.loads(last(image, "ENTRYPOINT"))
    assert python == "python"
    option, _ = json.loads(last(image, "CMD"))
    environment = dict(re.findall(r"(\w+)=(\S+)", last(image, "ENV")))
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "ABSENT": json.dumps(absent), "PATH": os.defpath}
    async with FakeEngine().serving(also=OTHERS) as url, aiohttp.ClientSession() as http:
        pools = addresses(url)
        text = settings(tmp_path / "variants", pools, gateway={"port": port}, run_dir=str(tmp_path / "run"))
        (tmp_path / "tiercel.yaml").write_text(text, encoding="utf-8")
        command = [sys.executable, *arguments, option, str(tmp_path / "tiercel.yaml")]
        gateway = await asyncio.create_subprocess_exec(
            *command, env=environment, cwd=tmp_path, stderr=asyncio.subprocess.PIPE
        )
        try:
            address = f"http://127.0.0.1:{port}"

            async def ready() -> bool:
                assert gateway.returncode is None, (await gateway.stderr.read()).decode()  # type: ignore[union-attr]
                try:
                    async with http.get(address + "/readiness") as response:
                        return response.status == 200
                except aiohttp.ClientError:
                    return False

            await eventually(ready, within_s=60)
            body = {"model": "assistant", "messages": [{"role": "user", "content": "hello"}]}
            async with http.post(address + "/v1/chat/completions", json=body) as response:
                assert response.status == 200, await response.text()
            check = json.loads(last(image, "HEALTHCHECK").partition("CMD ")[2])
            health = [sys.executable, *(part.replace("8080", str(port)) for part in check[1:])]
            assert (await (await asyncio.create_subprocess_exec(*health)).wait()) == 0
        finally:
            if gateway.returncode is None:
                gateway.terminate()
            await gateway.communicate()
    assert gateway.returncode == 0


def last_run_of_pip(image: Path) -> str:
    return [rest for name, rest in instructions(image) if name == "RUN" and "pip install" in rest][-1]


def test_the_gateway_imports_none_of_the_heavy_libraries() -> None:
    code = "import sys, gateway.__main__; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "uvicorn" in done.stdout.split()
    assert not (HEAVY | {"vllm"}) & set(done.stdout.split())


def test_the_quantizer_has_the_libraries_that_its_command_line_reads() -> None:
    """``tiercel quantize`` with nothing but the extras of its image."""
    image = CONTAINERS / "quantize.Dockerfile"
    assert json.loads(last(image, "ENTRYPOINT")) == ["tiercel", "quantize"]
    (extras,) = re.findall(r'"\.\[(.+)\]"', last_run_of_pip(image))
    run = "import deploy.making, quantize.make.compress, deploy.cli; deploy.cli.main(['quantize', '-h'])"
    environment = {**os.environ, "ABSENT": json.dumps(kept_out(*extras.split(",")))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{BLOCK}\n{run}"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "make variants" in done.stdout


# compose


def services(stack: Path) -> dict[str, dict[str, Any]]:
    """A stack's services with what they extend, and variables at their defaults, as compose puts them
    together: mappings are merged, lists joined, and everything else replaced."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", stack.read_text(encoding="utf-8"))
    assert "${" not in text, "a variable has no default"
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    for name, service in found.items():
        if "extends" in service:
            base = service.pop("extends")
            found[name] = merged(services(COMPOSE / base["file"])[base["service"]], service)
    return found


def merged(under: Any, over: Any) -> Any:
    if isinstance(under, dict) and isinstance(over, dict):
        return under | {key: merged(under[key], over[key]) if key in under else over[key] for key in over}
    if isinstance(under, list) and isinstance(over, list):
        return under + over
    return over


def engines(stack: Path) -> dict[str, dict[str, Any]]:
    return {name: one for name, one in services(stack).items() if name.startswith("engine-")}


@pytest.mark.parametrize("path", [*STACKS, COMPOSE / "services.yaml"], ids=lambda path: path.stem)
def test_a_compose_file_fits_the_specifications_schema(path: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@EACH_STACK
def test_every_service_is_closed_up(stack: Path) -> None:
    every = services(stack)
    assert {"gateway", "prometheus", "grafana"} < set(every)
    for name, service in every.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "healthcheck" in service or name == "gateway", "the gateway's is in its image"
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, "a log that fills no disk"
        assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service), name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
        assert re.search(r":v?\d", service["image"]), f"{name}: a version, no moving tag"
        if name == "gateway" or name.startswith("engine-"):
            assert service["user"] == "10001:10001"


@EACH_STACK
def test_what_a_service_mounts_exists(stack: Path) -> None:
    named = yaml.safe_load(stack.read_text(encoding="utf-8"))["volumes"]
    for name, service in services(stack).items():
        for volume in service.get("volumes", ()):
            source, target, *mode = volume.split(":")
            if source.startswith("."):
                assert mode == ["ro"], name
                assert target == "/variants" or (COMPOSE / source).exists(), volume
            else:
                assert source in named, volume
        if "build" in service:
            context = (COMPOSE / service["build"]["context"]).resolve()
            assert context == ROOT
            assert (context / service["build"]["dockerfile"]).is_file()


def compose_config() -> Config:
    return load_config(COMPOSE / "tiercel.yaml")


@EACH_STACK
def test_the_gateways_configuration_names_the_engines_that_are_there(stack: Path) -> None:
    config = compose_config()
    expected = {}
    for name, service in engines(stack).items():
        model, _, variant = name.removeprefix("engine-").partition("-")
        (port,) = (part.removeprefix("--port=") for part in service["command"] if "--port=" in part)
        expected[f"{model}:{variant}"] = (f"http://{name}:{port}",)
        assert service["command"][0].endswith(f"/variants/{model}/{variant}/current")
        assert f"--served-model-name={model}" in service["command"]
        (drain,) = (
            part.removeprefix("--shutdown-timeout=") for part in service["command"] if "shutdown" in part
        )
        assert int(drain) < int(service["stop_grace_period"].removesuffix("s")), "or it is killed in a stream"
    assert dict(config.pools) == expected
    assert set(config.served) == set(expected)
    (port,) = services(stack)["gateway"]["ports"]
    assert int(port.rpartition(":")[2]) == config.gateway.port
    volumes = [volume.split(":")[1] for volume in services(stack)["gateway"]["volumes"]]
    assert {str(config.variants_dir), str(config.run_dir)} <= set(volumes)


def test_the_roles_are_those_that_the_variants_were_gated_for() -> None:
    ours, theirs = compose_config(), load_config(ROOT / "tiercel.yaml")
    assert ours.served == theirs.served
    assert ours.default_role == theirs.default_role
    assert {name: (role.budget, role.grounded) for name, role in ours.roles.items()} == {
        name: (role.budget, role.grounded) for name, role in theirs.roles.items()
    }


def test_the_key_in_the_file_is_the_one_that_its_comment_names() -> None:
    (key,) = compose_config().keys
    assert key.sha256 == hashlib.sha256(b"tiercel-on-loopback").hexdigest()
    assert "`tiercel-on-loopback`" in (COMPOSE / "tiercel.yaml").read_text(encoding="utf-8")


def test_prometheus_reads_the_gateway_and_the_engines() -> None:
    path = COMPOSE / "prometheus.yml"
    if shutil.which("promtool"):
        check = ["promtool", "check", "config", "--syntax-only", str(path)]
        done = subprocess.run(check, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in read["scrape_configs"]}
    config = compose_config()
    urls = [url for pool in config.pools.values() for url in pool]
    assert targets["gateway"] == [f"gateway:{config.gateway.port}"]
    assert sorted(targets["engines"]) == sorted(url.removeprefix("http://") for url in urls)
    mounts = [volume.split(":") for volume in services(STACKS[0])["prometheus"]["volumes"]]
    assert {target for _, target, *_ in mounts} >= {*read["rule_files"], "/etc/prometheus/prometheus.yml"}


def test_grafana_is_given_its_source_and_its_dashboards() -> None:
    places = COMPOSE / "grafana" / "provisioning"
    (source,) = yaml.safe_load((places / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((places / "dashboards" / "tiercel.yaml").read_text())["providers"]
    grafana = services(STACKS[0])["grafana"]
    mounts = {volume.split(":")[1]: COMPOSE / volume.split(":")[0] for volume in grafana["volumes"]}
    assert mounts["/etc/grafana/provisioning"] == places
    dashboards = mounts[provider["options"]["path"]]
    assert len(list(dashboards.glob("*.json"))) == 4
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (dashboards / Path(home).name).is_file()


@pytest.mark.engine
def test_vllm_understands_the_engines_arguments() -> None:
    lines = {
        f"{stack.stem} {name}": service["command"]
        for stack in STACKS
        for name, service in engines(stack).items()
    }
    parsed = parsed_by_vllm(lines)
    for name, found in parsed.items():
        assert found["scheduling_policy"] == "priority", name
        assert found["kv_cache_dtype"] == ("fp8" if name.endswith("kv8") else "auto"), name


# the chart


def test_the_chart_runs_the_images_as_they_are_made() -> None:
    objects = render(scenario("two-precisions"))
    gateway = CONTAINERS / "gateway.Dockerfile"
    (container,) = [
        one
        for deployment, pod in pods(of_kind(objects, "Deployment"))
        for one in containers(pod)
        if one["name"] == "gateway"
    ]
    assert "command" not in container, "the image's entry point"
    assert container["args"] == json.loads(last(gateway, "CMD"))
    assert [str(port["containerPort"]) for port in container["ports"]] == [last(gateway, "EXPOSE")]
    assert container["image"].rpartition(":")[2] == PROJECT["version"]
    for found, pod in pods(objects):
        if found["kind"] == "Deployment":
            user = pod["spec"]["securityContext"]
            assert f"{user['runAsUser']}:{user['runAsGroup']}" == last(gateway, "USER")
    engine_images = {
        one["image"] for _, pod in pods(objects) for one in containers(pod) if one["name"] == "engine"
    }
    given = dict(
        rest.split("=", 1)
        for name, rest in instructions(CONTAINERS / "quantize.Dockerfile")
        if name == "ARG" and "=" in rest
    )
    assert given["ENGINE"] in engine_images
