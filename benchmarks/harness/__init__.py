"""What the scripts beside this folder share: peers and shapes, processes, what is watched, tables and charts.

Nothing here but torch is imported before it is used: a GPU machine may have no more than that.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# For the table of options and the watch. At the end: packages are to be those that a script has chosen.
sys.path.append(str(ROOT / "tests"))
