"""What an untuned run loses or gains against tuned ones: tasks, optimisers, a training loop, a report."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The tasks are made of the models and data of launch/; and ours is the optimiser of this checkout, also where
# the published package, which shares its import name, is installed.
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]
