"""What the scripts beside this folder share: peers and shapes, processes, counting, tables and charts.

Everything here except torch is imported only when it is used: a GPU machine may have nothing else.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# For the option table and tests/watching.py. At the end, so that a script's choice of packages comes first.
sys.path.append(str(ROOT / "tests"))
