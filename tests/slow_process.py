"""Runs `jaxllm` with a pause before each step, and writes when each step's batch was asked for: a slow machine.

    python tests/slow_process.py SECONDS TIMES.json WORDS...
"""

import json
import pathlib
import sys
import time

from jaxllm import cli
from jaxllm.train import loop

pause, times, words = float(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]
put, seen = loop._put, []


def slow_put(batch, rows):
    time.sleep(pause)
    seen.append(time.time())
    return put(batch, rows)


loop._put = slow_put
code = cli.main(words)
times.write_text(json.dumps(seen), encoding="utf-8")
sys.exit(code)
