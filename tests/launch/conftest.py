import sys
from pathlib import Path

# The scripts import each other by plain name, as `torchrun launch/….py` lets them.
sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))
