"""Let the tests import the examples as the scripts do."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
for place in (ROOT, ROOT / "examples" / "models" / "demo_models"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
