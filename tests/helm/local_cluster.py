"""A release's pods as processes of this machine: their commands, environment and volumes as rendered.

Volumes are directories, and the paths that containers know become theirs, in commands, variables and
configuration alike. Programs of the images are those of this checkout: ``tiercel``, the gateway, and the
engine's server on the CPU. Of what a manifest asks, GPUs, ranks and contexts longer than the model's are
left out; nothing else is.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from tests.helm.chart import ENGINE_PYTHON, NAMESPACE, Object, fullname, labels, of_kind, pods, pools

ROOT = Path(__file__).parents[2]
SITE = ROOT / "deploy" / "engine_site"
LONGEST = 1024
"""Tokens of the model that is served here."""
NOT_HERE = re.compile(
    "--(tensor-parallel-size|pipeline-parallel-size|nnodes|node-rank|master-addr|gpu-memory-utilization)="
)
ON_TWO_CORES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
TIERCEL = f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m deploy.cli "$@"\n'
VLLM = f'#!/bin/sh\nshift\nmodel=$1\nshift\nexec {ENGINE_PYTHON} {SITE}/serve_vllm.py --model "$model" "$@"\n'


@dataclass
class Given:
    """What a person has put into the cluster: claims and config maps that the release does not make, images,
    values of secrets by name and key, and variables of the world around (a hub of another address).

    ``seen`` is what vLLM found out about classes of models, at which it looks in a process of its own: that
    takes as long as the rest of a start, and is known to the next pod here, wherever that one's cache lies.
    """

    directories: dict[str, Path] = field(default_factory=dict)
    secrets: dict[tuple[str, str], str] = field(default_factory=dict)
    world: dict[str, str] = field(default_factory=dict)
    seen: Path | None = None


class Cluster:
    """Where the pods of one installation run. ``ports`` are of its services, the gateway's under its name."""

    def __init__(self, place: Path, given: Given, ports: Mapping[str, int]) -> None:
        self.place, self.given, self.ports = place, given, ports
        self.objects: list[Object] = []
        self._programs = place / "bin"
        self._programs.mkdir(parents=True)
        for name, text in (("tiercel", TIERCEL), ("vllm", VLLM)):
            program = self._programs / name
            program.write_text(text, encoding="utf-8")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def apply(self, objects: list[Object]) -> None:
        """What `helm install` or `helm upgrade` does; claims stay."""
        self.objects = objects

    def claim(self, name: str) -> Path:
        """The directory of a claim, which outlives releases."""
        found = self.given.directories.get(name, self.place / "claims" / name)
        found.mkdir(parents=True, exist_ok=True)
        return found

    def mounts(self, owner: str, pod: Object, container: Object) -> dict[str, Path]:
        """Directories by the paths at which a container sees them."""
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", ())}
        found: dict[str, Path] = {}
        for mount in container.get("volumeMounts", ()):
            if mount["mountPath"] != "/dev/shm":
                directory = self._directory(owner, volumes[mount["name"]])
                found[mount["mountPath"]] = directory / mount.get("subPath", "")
        for mount in container.get("volumeMounts", ()):
            volume = volumes[mount["name"]]
            for name, text in self._files(volume).items():
                written = text if name.endswith(".py") else self._here(text, found)
                (found[mount["mountPath"]] / name).write_text(written, encoding="utf-8")
        return found

    def _directory(self, owner: str, volume: Object) -> Path:
        if "persistentVolumeClaim" in volume:
            return self.claim(volume["persistentVolumeClaim"]["claimName"])
        if "image" in volume:
            return self.given.directories[volume["image"]["reference"]]
        named = volume.get("configMap", {}).get("name") or volume.get("secret", {}).get("secretName")
        if named in self.given.directories:
            return self.given.directories[named]
        found = self.place / "pods" / owner / volume["name"]
        found.mkdir(parents=True, exist_ok=True)
        return found

    def _files(self, volume: Object) -> dict[str, str]:
        """Of a config map that the release makes."""
        name = volume.get("configMap", {}).get("name")
        found: dict[str, str] = next(
            (one["data"] for one in of_kind(self.objects, "ConfigMap") if one["metadata"]["name"] == name), {}
        )
        return found

    def _here(self, text: str, mounts: Mapping[str, Path]) -> str:
        """A text of a container with this machine's paths and addresses."""
        words = {path: str(directory) for path, directory in mounts.items()}
        words["/usr/bin/python3"] = str(ENGINE_PYTHON)
        for service, port in self.ports.items():
            words[f"{service}.{NAMESPACE}.svc:8000"] = f"127.0.0.1:{port}"
            words[f"//{service}:80"] = f"//127.0.0.1:{port}"
        either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
        text = re.sub(rf"(?<![\w.-])({either})(?![\w.-])", lambda match: words[match[1]], text)
        text = text.replace('"host": "0.0.0.0"', '"host": "127.0.0.1"')
        return text.replace('"port": 8080', f'"port": {self.ports[fullname(self.objects)]}')

    def environment(self, container: Object, mounts: Mapping[str, Path]) -> dict[str, str]:
        """A container's variables, secrets filled in, upon the little that an image brings along."""
        path = os.pathsep.join([str(self._programs), os.environ["PATH"]])
        found = {"PATH": path, "LITELLM_LOCAL_MODEL_COST_MAP": "True", **self.given.world}
        for entry in container.get("env", ()):
            source = entry.get("valueFrom", {})
            if "secretKeyRef" in source:
                found[entry["name"]] = self.given.secrets[
                    source["secretKeyRef"]["name"], source["secretKeyRef"]["key"]
                ]
            elif "value" in entry:
                found[entry["name"]] = self._here(entry["value"], mounts)
        return found

    def run(
        self, owner: str, pod: Object, container: Object, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """A container that ends."""
        mounts = self.mounts(owner, pod, container)
        line = [self._here(word, mounts) for word in (*container["command"], *container.get("args", ()))]
        line[0] = sys.executable if line[0] == "python" else line[0]
        environment = self.environment(container, mounts)
        with self._seen(environment):
            return subprocess.run(
                line,
                cwd=self.place,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )

    @contextlib.contextmanager
    def _seen(self, environment: Mapping[str, str]) -> Iterator[None]:
        """What was seen is in the cache of a container, and what that one saw is kept."""
        cache, seen = environment.get("VLLM_CACHE_ROOT"), self.given.seen
        if cache is None or seen is None:
            yield
            return
        own = Path(cache) / "modelinfos"
        shutil.copytree(seen, own, dirs_exist_ok=True)
        yield
        shutil.copytree(own, seen, dirs_exist_ok=True)

    @contextlib.contextmanager
    def process(self, owner: str, pod: Object) -> Iterator[Process]:
        """A pod whose container goes on; its init containers have ended well before."""
        for first in pod["spec"].get("initContainers", ()):
            done = self.run(owner, pod, first, 30)
            assert done.returncode == 0, done.stdout + done.stderr
        (container,) = pod["spec"]["containers"]
        mounts = self.mounts(owner, pod, container)
        environment = self.environment(container, mounts)
        line = [self._here(word, mounts) for word in (*container.get("command", ()), *container["args"])]
        if container["name"] == "engine":
            line = [*line[:3], *_on_a_cpu(line[3:], self.ports[owner])]
            environment |= ON_TWO_CORES
        else:
            line = [sys.executable, *_entry_point(ROOT / "deploy/containers/gateway.Dockerfile")[1:], *line]
            environment["PYTHONPATH"] = str(ROOT)
        log = self.place / f"{owner}.log"
        with self._seen(environment):
            with log.open("wb") as output:
                started = Process(line, environment, self.place, output, log)
            try:
                yield started
            finally:
                started.kill()


def _on_a_cpu(arguments: list[str], port: int) -> list[str]:
    """An engine's arguments without what asks for GPUs, at a port of its own."""
    kept = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        changed = {"--host": "127.0.0.1", "--port": str(port)}
        if name == "--max-model-len":
            changed[name] = str(min(int(value), LONGEST))
        if not NOT_HERE.match(argument):
            kept.append(f"{name}={changed[name]}" if name in changed else argument)
    return [*kept, *(["--enforce-eager"] if "--enforce-eager" not in kept else [])]


def _entry_point(dockerfile: Path) -> list[str]:
    lines = dockerfile.read_text(encoding="utf-8").splitlines()
    (line,) = (one for one in lines if one.startswith("ENTRYPOINT "))
    found: list[str] = yaml.safe_load(line.removeprefix("ENTRYPOINT "))
    return found


class Process:
    """A container that runs. A signal goes to its first process, as the kubelet's does."""

    def __init__(
        self, line: list[str], environment: dict[str, str], place: Path, output: IO[bytes], log: Path
    ) -> None:
        self._log = log
        self._process = subprocess.Popen(
            line, cwd=place, env=environment, stdout=output, stderr=output, start_new_session=True
        )

    @property
    def ended(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int:
        return self._process.wait(timeout_s)

    def said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-4000:]

    def kill(self) -> None:
        """It, and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def job_pods(objects: list[Object]) -> dict[str, Object]:
    """The pods of the release's jobs, by the job's name."""
    return {owner["metadata"]["name"]: pod for owner, pod in pods(objects) if owner["kind"] == "Job"}


def gateway_pod(objects: list[Object]) -> Object:
    """The gateway's."""
    (found,) = (
        pod for _, pod in pods(objects) if labels(pod).get("app.kubernetes.io/component") == "gateway"
    )
    return found


def started(objects: list[Object]) -> dict[str, tuple[str, Object]]:
    """One pod of every pool that has any, with the pool's name, by ``model:variant``."""
    return {
        served: (owner["metadata"]["name"], pod)
        for served, (owner, pod) in pools(objects).items()
        if owner["spec"].get("replicas", 1) > 0
    }


def helm_test_pod(objects: list[Object]) -> Any:
    """What `helm test` starts."""
    (found,) = of_kind(objects, "Pod")
    return found
