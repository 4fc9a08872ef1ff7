"""Where the project and the real data lie. The real data is never copied into the project."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
NLM = SHARED / "data" / "nlm"
