"""Run by the engine's interpreter: parses command lines of ``vllm serve``, and makes its settings of them.

Standard input is a JSON object of lists of arguments; the last line of standard output is what was parsed.
"""

import json
import sys

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
found = {}
for name, line in json.load(sys.stdin).items():
    parsed = parser.parse_args(line)
    AsyncEngineArgs.from_cli_args(parsed)
    fields = (
        "model_tag",
        "max_num_seqs",
        "kv_cache_dtype",
        "headless",
        "nnodes",
        "node_rank",
        "scheduling_policy",
        "shutdown_timeout",
    )
    found[name] = {field: getattr(parsed, field) for field in fields}
print(json.dumps(found))
