"""Where the real data lies. It is never copied into the project; a test that needs it says so and skips without it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
NLM = SHARED / "data" / "nlm"
needs_shared = pytest.mark.skipif(not NLM.is_dir(), reason=f"real data is absent: no folder {NLM}")
