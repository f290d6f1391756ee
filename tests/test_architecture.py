"""The house keeps its floors: a file imports only from lower ones, and a few habits hold."""

import ast
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[1] / "engine"
FLOORS = {
    "engine": 0,  # the version
    "engine.parsing": 0,
    "engine.demo": 0,  # where the weights lie
    "engine.config": 1,
    "engine.tables": 1,
    "engine.jobs": 2,
    "engine.bands": 2,
    "engine.output": 2,
    "engine.provenance": 3,
    "engine.saving": 3,
    "engine.inspect": 4,
    "engine.progress": 2,
    "engine.kernels": 1,
    "engine.linfusion": 3,
    "engine.fuse": 4,
    "engine.graphs": 4,
    "engine.parallel": 3,
    "engine.simulation": 3,
    "engine.hardware": 4,
    "engine.codec": 4,
    "engine.memory": 4,
    "engine.colours": 4,
    "engine.diffusion": 4,
    "engine.loading": 4,
    "engine.watch": 3,
    "engine.signals": 0,
    "engine.exits": 0,
    "engine.ladder": 5,
    "engine.checkpoint": 6,
    "engine.keeper": 7,
    "engine.plan": 6,
    "engine.preflight": 7,
    "engine.pipeline": 8,
    "engine.session": 4,
    "engine.painter": 9,
    "engine.batch": 10,
    "engine.generate": 11,
    "engine.worker": 11,
    "engine.serve": 12,
    "engine.distill": 12,
}
TRAINING_FLOOR = 9  # engine.demo.train and what is around it: a command of its own
MODULES = sorted(ENGINE.rglob("*.py"))


def module_name(path):
    return ".".join(path.relative_to(ENGINE.parent).with_suffix("").parts).removesuffix(".__init__")


def room(name):
    """(package or file on a floor, its floor) of a module."""
    if name.startswith("engine.demo."):
        return "engine.demo.train", TRAINING_FLOOR
    top = ".".join(name.split(".")[:2])
    return top, FLOORS[top]


def engine_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("engine"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("engine"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = (ENGINE.parent / name.replace(".", "/")).with_suffix(".py").exists()
                is_package = (ENGINE.parent / name.replace(".", "/")).is_dir()
                yield name if is_module or is_package else node.module


# The package's own file is its facade: it names what is on all floors, and imports it when asked.
@pytest.mark.parametrize("path", [p for p in MODULES if p.parent != ENGINE or p.stem != "__init__"])
def test_imports_go_down_the_floors(path):
    own, floor = room(module_name(path))
    for name in engine_imports(path):
        other, other_floor = room(name)
        assert other == own or other_floor < floor, f"{own} may not import {other}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_the_mesh_reads_the_environment(path):
    if path != ENGINE / "bands" / "mesh.py":
        assert "environ" not in path.read_text()
        assert "getenv" not in path.read_text()


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_modules_teach_and_functions_stay_short(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module begins with what it is about"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 50, f"{node.name} has {length} lines"


def test_imports_have_no_side_effects():
    """No module body calls anything but what builds its constants and classes."""
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            assert not is_call, f"{path.name}:{node.lineno} calls something on import"
