"""Real data for the tests: a test that needs it is marked `needs_shared`, and is skipped where it is absent."""

import pytest

from tests.paths import NLM, ROOT, SHARED

__all__ = ["NLM", "ROOT", "SHARED", "needs_shared"]

needs_shared = pytest.mark.skipif(not NLM.is_dir(), reason=f"real data is absent: no folder {NLM}")
