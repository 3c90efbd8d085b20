"""Program of a rank of the stall tests: the reader of rank 1 is slow for some steps and then hangs.

python stalls.py loop|stop DATA_DIR OUTPUT_DIR
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from tiny_run import rank_values

import training.__main__ as entry
from data_pipeline.loader import Loader
from training.distributed import rank
from training.run_file import validate

LAST_STEP = 4  # 0-based: rank 1 gets no further
SLOW_SECONDS = 2.5


def loop_forever():
    while True:
        sum(range(1000))


def main() -> int:
    fault, data_dir, output_dir = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    entry.load_config = lambda *_: validate(rank_values(data_dir, output_dir, max_steps=8), "test")
    steps = Loader.steps

    def stalling(self, start: int, stop: int):
        for step, batch in enumerate(steps(self, start, stop), start):
            if rank() == 1:
                if fault == "loop":
                    time.sleep(SLOW_SECONDS)
                if step == LAST_STEP:
                    loop_forever() if fault == "loop" else os.kill(os.getpid(), signal.SIGSTOP)
            yield batch

    Loader.steps = stalling
    return entry.main(["unused.yaml"])


if __name__ == "__main__":
    sys.exit(main())
