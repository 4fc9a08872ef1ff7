"""Who may import whom: launch -> pretrain -> model and data, and never back."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "data": {"data"},
    "model": {"model"},
    "pretrain": {"pretrain", "model", "data"},
    "launch": {"launch", "pretrain", "model", "data"},
}


def imported(path: Path) -> set[str]:
    """First names of everything that a source file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", [str(p.relative_to(ROOT)) for room in ALLOWED for p in (ROOT / room).rglob("*.py")])
def test_imports_go_one_way(path: str) -> None:
    room, names = path.split("/")[0], imported(ROOT / path)
    assert names & set(ALLOWED) <= ALLOWED[room]
    if room == "model":
        assert names <= {"model", "torch", "collections", "dataclasses", "functools", "math", "random", "re", "typing"}
    if room == "data" and path != "data/blocks.py":
        assert "torch" not in names
    if path != "pretrain/engine.py":
        assert "deepspeed" not in names
