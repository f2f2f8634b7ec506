"""The engines and the tiny model of tests/vllm serve these tests as well."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for directory in (ROOT / "tests" / "vllm", ROOT / "scripts"):
    sys.path.insert(0, str(directory))
