"""Runs gpt_fsdp2.py, but its processes wait before a step until a file exists: see test_two_hosts.py.

held.py STEP FILE …
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

import gpt_fsdp2
import seeds

everything, held, file = seeds.everything, int(sys.argv[1]), Path(sys.argv[2])


def hold(seed, step, *share):
    while step == held and not file.exists():
        time.sleep(0.05)
    everything(seed, step, *share)


seeds.everything = hold
del sys.argv[1:3]
gpt_fsdp2.main()
