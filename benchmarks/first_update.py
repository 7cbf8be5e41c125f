"""One update of LeNet-5 at 4 micro-batches of 32 in a fresh process, for `benchmarks.startup`.

python -m benchmarks.first_update lightning
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

MARK = "ACCUMEXP_BENCHMARK_MARK"  # names the file to write when the first update is done


def mark() -> None:
    if path := os.environ.get(MARK):
        Path(path).write_text(str(time.time()))


def main() -> None:
    import torch

    from .loops import HandWritten, Loop, built, timed
    from .peers import PEERS
    from .tasks import Task

    kinds: dict[str, type[Loop]] = {kind.name: kind for kind in (HandWritten, *PEERS)}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_update", description=__doc__)
    parser.add_argument("loop", choices=list(kinds))
    options = parser.parse_args()
    loop = built(kinds[options.loop], Task("lenet5", torch.device("cpu"), 32, 4, 128))
    timed(loop)
    mark()
    loop.close()


if __name__ == "__main__":
    main()
