"""What the job's `download` runs: the files of a checkpoint of the hub that are read, and no others.

A repository often holds its weights several times (`original/*.pth`, `pytorch_model*.bin`, GGUF, ONNX). One whose
weights are no safetensors is refused before anything of it is downloaded.
"""

import json
import os
import sys
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from quantize.core.companions import PATTERNS
from quantize.core.weights import CONFIGS, INDEX, SINGLE

REPO, REVISION, DIRECTORY = os.environ["REPO"], os.environ["REVISION"], os.environ["DIRECTORY"]

names = HfApi().list_repo_files(REPO, revision=REVISION)
if INDEX in names:
    index = hf_hub_download(REPO, INDEX, revision=REVISION, local_dir=DIRECTORY)
    shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    weights = [INDEX, *sorted(shards)]
elif SINGLE in names:
    weights = [SINGLE]
else:
    sys.exit(f"{REPO} at {REVISION} has no {SINGLE} and no {INDEX}; convert it to safetensors, or name another")
snapshot_download(
    REPO, revision=REVISION, local_dir=DIRECTORY, allow_patterns=[*weights, *CONFIGS, *PATTERNS]
)
print(f"{REPO} at {REVISION}: {', '.join(weights)} and what belongs to them lie in {DIRECTORY}")
