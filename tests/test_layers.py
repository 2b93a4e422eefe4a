"""Imports point down: arrays, trees, programs, updates, techniques, planning."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jopt"
TECHNIQUES = {"pruning", "quantization", "optimizers", "distillation", "lowrank"}
# A folder may import from folders of a smaller number, and from itself.
LAYER = {
    "schedules": 0,
    "arrays": 0,
    "trees": 1,
    "programs": 2,
    "updates": 3,
    **dict.fromkeys(TECHNIQUES, 4),
    "planning": 5,
}
FILES = sorted(ROOT.rglob("*.py"))
IDS = [str(f.relative_to(ROOT)) for f in FILES]


def imported(tree):
    """Yield (node, dotted module name) for every import in the tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_imports_point_down(file):
    tree = ast.parse(file.read_text())
    folder = file.relative_to(ROOT).parts[0]
    for node, name in imported(tree):
        parts = name.split(".")
        if parts[0] != "jopt" or folder == "__init__.py":
            continue
        assert len(parts) > 1, f"{file}:{node.lineno} imports the whole of jopt"
        target = parts[1]
        assert target == folder or LAYER[target] < LAYER[folder], (
            f"{file}:{node.lineno}: {folder} must not import {target}"
        )


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_imports_stand_at_module_top_and_are_public(file):
    tree = ast.parse(file.read_text())
    top = {id(node) for node in tree.body}
    for node, name in imported(tree):
        assert id(node) in top, f"{file}:{node.lineno}: import inside a function"
        assert "jax._src" not in name, f"{file}:{node.lineno}: {name} is not public"


def test_no_import_cycles():
    """Inside one folder files import each other in one direction."""
    edges = {}
    for file in FILES:
        name = ".".join(("jopt", *file.relative_to(ROOT).with_suffix("").parts))
        tree = ast.parse(file.read_text())
        edges[name] = {
            m for _, full in imported(tree) for m in (full, full.rpartition(".")[0])
        }
    edges = {k: (v & edges.keys()) - {k} for k, v in edges.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"import cycle: {' -> '.join([*path, name])}"
        if name not in done:
            path.append(name)
            for other in sorted(edges[name]):
                visit(other)
            path.pop()
            done.add(name)

    for name in edges:
        visit(name)


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_a_file_is_read_in_one_sitting(file):
    lines = file.read_text().splitlines()
    assert len(lines) <= 400, f"{file} has {len(lines)} lines: is there a second idea?"
    assert ast.get_docstring(ast.parse(file.read_text())), f"{file} says not what it is"


def test_folders_name_concepts():
    banned = {"utils", "misc", "common", "helpers", "base", "core"}
    assert not banned & {p.stem for p in ROOT.rglob("*")}


def test_experiments_use_public_names_only():
    for file in (ROOT.parent / "experiments").rglob("*.py"):
        for node, name in imported(ast.parse(file.read_text())):
            assert not name.startswith("jopt."), f"{file}:{node.lineno}: {name}"
