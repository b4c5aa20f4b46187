"""A model of a hub as a checkpoint directory: the files that an engine needs, fetched once.

What is fetched is safetensors weights, configurations, tokenizer and templates; nothing of what else a
repository holds (``original/``, ``consolidated.safetensors``, pickles, GGUF, ONNX, code). The commit is kept
beside the files: a model stays what it was until its directory is deleted, or another revision is asked for.
A fetch that was interrupted goes on where it was, within a file too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from deploy.hub_weights import FETCHING, FetchError, Wanted, fetch
from gateway.config import ModelConfig
from quantize.core.companions import PATTERNS
from quantize.core.files import locked, write_whole
from quantize.core.weights import CONFIGS, INDEX, PICKLES, SINGLE, CheckpointError, conversion

STATE = ".hub.json"
"""In the directory: repository, the revision that was asked for, its commit, and the files' sizes."""

Say = Callable[[str], None]


class HubError(CheckpointError):
    """A model could not be fetched. The text says why and what to do."""


def ensure(model: ModelConfig, say: Say = lambda _text: None) -> Path:
    """The directory of the model's checkpoint, fetched where it is a hub's and not there. Raises HubError."""
    if is_there(model):
        return model.path
    with locked(model.path / ".lock", f"fetching {model.hub}", say):
        if not is_there(model):
            with _told(model):
                _fetch(model, say)
    return model.path


def is_there(model: ModelConfig) -> bool:
    """Whether all of a hub's model was fetched, which nobody is asked; of others always."""
    if model.hub is None:
        return True
    state = _state(model.path)
    return (
        state.get("hub") == model.hub
        and state.get("revision") == model.revision
        and all(
            (model.path / name).is_file() and (model.path / name).stat().st_size == size
            for name, size in state.get("files", {}).items()
        )
    )


def _state(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _fetch(model: ModelConfig, say: Say) -> None:
    from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, snapshot_download

    assert model.hub is not None
    endpoint = os.environ.get("HF_ENDPOINT")
    info = HfApi(endpoint=endpoint).model_info(model.hub, revision=model.revision, files_metadata=True)
    siblings = {one.rfilename: one for one in info.siblings or ()}
    sizes = {name: one.size or 0 for name, one in siblings.items()}
    digests = {name: one.lfs.sha256 for name, one in siblings.items() if one.lfs}
    where: dict[str, Any] = {"revision": info.sha, "local_dir": model.path, "endpoint": endpoint}
    index: Mapping[str, Any] = {}
    if INDEX in sizes:
        fetched = hf_hub_download(model.hub, INDEX, **where)
        index = json.loads(Path(fetched).read_text(encoding="utf-8")).get("weight_map", {})
    files = {name: sizes[name] for name in wanted(model, sizes, index)}
    weights = [
        Wanted(
            name,
            sizes[name],
            digests.get(name),
            hf_hub_url(model.hub, name, revision=info.sha, endpoint=endpoint),
        )
        for name in files
        if name.endswith(".safetensors")
    ]
    _refuse_short(model, sum(files.values()) - _there(model.path))
    say(
        f"{model.name}: fetching {len(files)} files of {model.hub} at {str(info.sha)[:12]}, "
        f"{sum(files.values()) / 1e9:.2f} GB, into {model.path}"
    )
    for left in model.path.glob(".cache/huggingface/**/*.incomplete"):
        left.unlink()  # no later run goes on with it
    others = [name for name in files if name not in {one.name for one in weights}]
    snapshot_download(model.hub, allow_patterns=others, **where)
    fetch(weights, model.path)
    shutil.rmtree(model.path / FETCHING, ignore_errors=True)
    for path in model.path.iterdir():  # of another revision
        if path.is_file() and path.name not in files and not path.name.startswith("."):
            path.unlink()
    state = {"hub": model.hub, "revision": model.revision, "commit": info.sha}
    found = {name: (model.path / name).stat().st_size for name in files}
    write_whole(model.path / STATE, json.dumps(state | {"files": found}, indent=1) + "\n")


def _there(path: Path) -> int:
    """Bytes of what has come already, whatever it is."""
    return sum(one.stat().st_size for one in (*path.glob("*"), *path.glob(f"{FETCHING}/*")) if one.is_file())


def wanted(model: ModelConfig, names: Mapping[str, int], shards: Mapping[str, str]) -> list[str]:
    """Which of a repository's files make a checkpoint. ``shards``: its index's tensors to files. Raises
    HubError."""
    weights = sorted({*shards.values()}) if shards else [SINGLE]
    if missing := [name for name in weights if name not in names]:
        begin = f"models.{model.name}.hub: {model.hub} has no {missing[0]}"
        if any(name.endswith(PICKLES) for name in names if "/" not in name):
            directory = Path(str(model.hub).rpartition("/")[2])
            raise HubError(
                f"{begin}, but pickles, which can run code and are not read here. Convert them, and give "
                f"models.{model.name}.path: {directory}-safetensors instead of hub:\n"
                f"  hf download {model.hub} --local-dir {directory}\n{conversion(directory)}"
            )
        raise HubError(
            f"{begin}, and weights are read from safetensors alone; take a repository that has them, or give "
            f"models.{model.name}.path"
        )
    kept = (*CONFIGS, *PATTERNS)
    beside = [name for name in names if any(_matches(name, pattern) for pattern in kept)]
    return [*beside, *([INDEX] if shards else []), *weights]


def _matches(name: str, pattern: str) -> bool:
    """Whether a path fits, folder by folder: ``original/tokenizer.model`` is no ``tokenizer.model``."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def _refuse_short(model: ModelConfig, needed: int) -> None:
    free = shutil.disk_usage(model.path).free
    if needed > free:
        raise HubError(
            f"models.{model.name}.hub: {model.hub} takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are "
            f"free at {model.path}; make room, or set variants_dir to another disk"
        )


@contextmanager
def _told(model: ModelConfig) -> Iterator[None]:
    """What goes wrong between here and the hub, as a sentence."""
    import httpx
    from huggingface_hub import errors

    key, name = (
        f"models.{model.name}.hub",
        f"{model.hub}" + (f" at {model.revision}" if model.revision else ""),
    )
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    elsewhere = (
        f"fetch it where there is a network (`hf download {model.hub} --local-dir DIRECTORY`) and give the "
        f"directory as models.{model.name}.path instead of hub"
    )
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(
            f"{key}: {name} is gated; accept its conditions at {endpoint}/{model.hub} and set HF_TOKEN to a "
            "token of that account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{key}: {endpoint} has no {name} that may be read; correct the id, or set HF_TOKEN if it is "
            "private"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(
            f"models.{model.name}.revision: {model.hub} has no revision {model.revision!r}; name a branch, a "
            "tag or a commit"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise HubError(
            f"{key}: HF_HUB_OFFLINE is set, and {name} is not there; unset it, or {elsewhere}"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx.HTTPError, FetchError) as error:
        raise HubError(
            f"{key}: {name} cannot be fetched from {endpoint} ({_reason(error)}); what came is kept, and the "
            f"same command goes on. Without a network {elsewhere}"
        ) from None


def _reason(error: BaseException) -> str:
    """The innermost cause, in a line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
