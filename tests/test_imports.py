"""Who may import whom. Arrows go one way: launch -> pretrain -> model and data, and so inside `data`; no circles."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = {"data.common", "data.archive", "data.text", "data.corpus", "data.shards", "data.images"}
ALLOWED = {
    "data.common": set(),
    "data.archive": {"data.common"},
    "data.text": {"data.common"},
    "data.corpus": {"data.common", "data.archive"},
    "data.shards": {"data.common", "data.corpus", "data.text"},
    "data.images": {"data.common", "data.text"},
    "model": set(),
    "pretrain": {"model", *DATA},
    "launch": {"pretrain", "model", *DATA},
}
OURS = {room.split(".")[0] for room in ALLOWED}
SOURCES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}


def imported(path: Path) -> set[str]:
    """Full names of everything that a source file imports, anywhere in it: modules, and names out of them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(module: str) -> str:
    """The room that a module of ours is in; "" for the packages themselves, which hold no code."""
    return next((room for room in ALLOWED if f"{module}.".startswith(f"{room}.")), "")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    names, room = imported(MODULES[module]), room_of(module)
    ours = {name for name in names if name.split(".")[0] in OURS}
    if room:
        assert {room_of(name) for name in ours} <= {room, *ALLOWED[room]}
    first_names = {name.split(".")[0] for name in names}
    if room == "model":
        torch_and_standard = {"torch", "collections", "dataclasses", "functools", "math", "random", "re", "typing"}
        assert first_names <= {"model", *torch_and_standard}
    if room in DATA and module not in ("data.shards.blocks", "data.shards.records"):
        assert "torch" not in first_names
    if module not in ("pretrain.engine", "pretrain.optimizer"):
        assert "deepspeed" not in first_names


def test_no_imports_go_in_a_circle() -> None:
    graph = {module: {name for name in imported(path) if name in MODULES} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_a_training_rank_imports_no_text_processing() -> None:
    code = (
        "import sys, pretrain.train\n"
        "heavy = {'lxml', 'sacremoses', 'tokenizers', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
