"""The folders of the server are layers, and what an object needs comes by its constructor."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import grimp
import tinsmith.server

SERVER = Path(tinsmith.server.__file__).parent
# Objects of other libraries that have no other way to be told: FastAPI's, SQLite's, tarfile's.
OF_LIBRARIES = {"app.openapi", "app.openapi_schema", "app.state.application", "app.state.services"}
OF_LIBRARIES |= {"connection.isolation_level", "request._body", "request._json", "self._timer.daemon"}
OF_LIBRARIES |= {"info.size", "info.mtime", "info.mode"}
LEFT_OUT = ("wire/results.py", "wire/tinsmith_wire_pb2.py")  # messages of protobuf are written so


def test_no_folder_of_the_server_imports_itself_by_way_of_others() -> None:
    """Modules beside the folders count as folders; imports below `TYPE_CHECKING` count as all others do."""
    graph = grimp.build_graph("tinsmith", exclude_type_checking_imports=False, cache_dir=None)
    modules = graph.find_descendants("tinsmith.server")
    assert len(modules) > 80

    def folder(module: str) -> str:
        parent = module.rpartition(".")[0]
        return module if parent == "tinsmith.server" or graph.find_children(module) else parent

    imports: dict[str, set[str]] = {}
    for module in modules:
        below = graph.find_modules_directly_imported_by(module) & modules
        found = imports.setdefault(folder(module), set())
        found |= {folder(each) for each in below} - {folder(module)}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the folders of a cycle
    own = {module: graph.find_modules_directly_imported_by(module) & modules for module in modules}
    graphlib.TopologicalSorter(own).prepare()


def test_the_server_has_few_files() -> None:
    """A module has to be worth a file: code with one caller and no meaning of its own belongs there."""
    assert len(list(SERVER.rglob("*.py"))) <= 110


def assigned(tree: ast.Module) -> Iterator[str]:
    """The attributes of other objects that are assigned: `run.state`, `self.engine.on_death`."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign | ast.AugAssign):
            targets = [node.target]
        for target in targets:
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(each, ast.Attribute) and ast.unparse(each.value) not in ("self", "cls"):
                    yield ast.unparse(each)


def state(trees: list[ast.Module]) -> set[str]:
    """The fields of dataclasses that are data: no functions, and no objects that do something."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    records = [each for each in classes if "dataclass" in " ".join(map(ast.unparse, each.decorator_list))]
    active = {each.name for each in classes} - {each.name for each in records}
    found: set[str] = set()
    for record in records:
        for field in record.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                names = {node.id for node in ast.walk(field.annotation) if isinstance(node, ast.Name)}
                if not names & (active | {"Callable"}):
                    found.add(field.target.id)
    return found


def test_nothing_is_hooked_up_after_it_was_made() -> None:
    """Only data is assigned to other objects; their collaborators came through their constructors."""
    paths = (path for path in SERVER.rglob("*.py") if not str(path).endswith(LEFT_OUT))
    trees = [ast.parse(path.read_text()) for path in paths]
    data = state(trees)
    hooked = {
        name
        for tree in trees
        for name in assigned(tree)
        if name.rpartition(".")[2] not in data and "__" not in name
    }
    assert hooked - OF_LIBRARIES == set()


def test_no_object_has_more_than_a_dozen_collaborators() -> None:
    """Exceptions are the object that puts all together, and records of data."""
    crowded = {}
    for path in SERVER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                        count = len(method.args.args) + len(method.args.kwonlyargs) - 1
                        if count > 12:
                            crowded[node.name] = count
    assert crowded == {}
