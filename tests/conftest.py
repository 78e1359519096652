"""Tests import one another's helpers by name, from this folder, and see tables as wide as they are."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.pop("COLUMNS", None)  # a terminal's width, which parallel runs set
