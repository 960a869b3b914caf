"""Import directions: a stage may import the stages that produce its input, never later stages."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.builders import ROOT, imports_of

SCRIPTS = ("train", "evaluate", "predict", "app", "app_server", "ai_images_detector")

COMMON = {
    "installed", "escape", "devices", "checked", "console", "cli", "interrupts", "locks", "recipes",
    "storage", "web_addresses", "imaging",
}  # fmt: skip

PAGE = {
    "app_server.py",
    "ai_images_detector.py",
    *(f"page/{name}.py" for name in (
        "about", "cost", "detector", "draw", "html", "mistakes", "photo", "scored", "session",
        "start", "table", "uploads",
    )),
}  # fmt: skip
"""Modules that may import Streamlit: the server, and the modules that draw the page."""

MAY_IMPORT = {
    "installed": set(),
    "escape": set(),
    "devices": set(),
    "checked": set(),
    "console": {"escape"},
    "cli": {"console", "escape", "devices", "storage"},
    "interrupts": {"console"},
    "recipes": {"checked", "storage"},
    "locks": set(),
    "web_addresses": {"installed"},
    "storage": {"installed", "escape", "locks", "web_addresses"},
    "imaging": {"escape", "storage"},
    "sharding": COMMON,
    "pipeline": {*COMMON, "sharding.format", "sharding.rows"},
    "model": {*COMMON, "sharding", "pipeline"},
    "report": {*COMMON, "sharding", "pipeline", "model"},
    "serve": {*COMMON, "sharding", "pipeline", "model"},
    "page": {*COMMON, "sharding", "pipeline", "model"},
    **{script: {*COMMON, "sharding", "pipeline", "model", "report"} for script in SCRIPTS},
    "app": {"page"},
    "app_server": {"page"},
}


def files_of(owner: str) -> list[Path]:
    """Return the Python files of a package or script."""
    return sorted((ROOT / owner).rglob("*.py")) or [ROOT / f"{owner}.py"]


def refused(owner: str, module: str) -> bool:
    """Return whether `owner` must not import `module`. Third-party modules are always allowed."""
    target = module.partition(".")[0]
    if target not in MAY_IMPORT or target == owner:
        return False
    return not any(module == name or module.startswith(f"{name}.") for name in MAY_IMPORT[owner])


@pytest.mark.parametrize("owner", MAY_IMPORT)
def test_imports_point_upstream(owner: str) -> None:
    for path in files_of(owner):
        for module in imports_of(path):
            assert not refused(owner, module), (
                f"{path.relative_to(ROOT)} imports {module}; "
                f"{owner} may import only {sorted(MAY_IMPORT[owner])}"
            )


def file_of(module: str) -> Path | None:
    """Return the file of a module of this project; None for other modules and for functions."""
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


USERS = [
    *(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("evaluation", "calibration", "inference", "export", "adapters")
        for path in files_of(f"model/{package}")
        if path.stem != "__init__"
    ),
    *(
        module
        for script in ("evaluate", "predict")
        for name in imports_of(ROOT / f"{script}.py")
        for module in (name, name.rpartition(".")[0])
        if file_of(module)
    ),
]
"""Modules that use a detector, and those that the scripts import, also in functions."""

TRAINER = ("model.training.", "model.launch.")


def is_run_later(node: ast.AST) -> bool:
    """Return whether the import of a file does not run the statements inside of `node`. That of a
    name may call `__getattr__` of its package.
    """
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "__getattr__"


@functools.cache
def imported_at_once(path: Path, with_types: bool = False) -> frozenset[str]:
    """Return the dotted names of what a file imports when it is imported itself, `with_types` also
    those that only a type checker imports.
    """
    names, nodes = set(), [ast.parse(path.read_text())]
    for node in nodes:  # the list grows
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif (with_types and isinstance(node, ast.If)) or not is_run_later(node):
            nodes += ast.iter_child_nodes(node)
    return frozenset(names)


def loaded_with(modules: Iterable[str]) -> set[str]:
    """Return the modules of this project that an import of `modules` loads, with themselves."""
    waiting, loaded = [*modules], set()
    while waiting:
        parts = waiting.pop().split(".")
        for name in (".".join(parts[: end + 1]) for end in range(len(parts))):
            path = file_of(name)
            if path and name not in loaded:
                loaded.add(name)
                waiting += imported_at_once(path)
    return loaded


def test_what_uses_a_detector_does_not_load_the_trainer() -> None:
    """Not through an import of another module either."""
    assert not [name for name in loaded_with(USERS) if name.startswith(TRAINER)]


def test_modules_that_are_loaded_indirectly_are_found() -> None:
    assert {"model.checkpoint", "model.network", "storage"} <= loaded_with(["model.export.onnx"])
    assert "model.inference.detector" in loaded_with(["model.load_detector"])
    assert {"model.training", "model.training.step"} <= loaded_with(["model.training.run"])
    assert not loaded_with(["torch.nn"])


@pytest.mark.slow
def test_in_a_new_process_what_uses_a_detector_does_not_load_the_trainer() -> None:
    code = (
        f"import importlib, sys\nfor name in {USERS}: importlib.import_module(name)\n"
        f"print([m for m in sys.modules if m.startswith({TRAINER})])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Not for types either: one of the two is in the wrong place."""
    graph = {
        path: {
            target
            for name in imported_at_once(path, with_types=True)
            for module in (name, name.rpartition(".")[0])
            if (target := file_of(module)) and target.stem != "__init__"
        }
        for owner in MAY_IMPORT
        for path in files_of(owner)
    }
    TopologicalSorter(graph).prepare()


def imports_between(owner: str) -> dict[str, set[str]]:
    """Return, for each folder of `owner`, the other folders of it that its files import."""
    folders = {path.name for path in (ROOT / owner).iterdir() if (path / "__init__.py").is_file()}
    pattern = re.compile(rf"{owner}\.(\w+)")
    return {
        folder: {
            match[1]
            for path in files_of(f"{owner}/{folder}")
            for module in imports_of(path)
            if (match := pattern.match(module)) and match[1] in folders - {folder}
        }
        for folder in folders
    }


@pytest.mark.parametrize("owner", ["model", "sharding"])
def test_folders_do_not_import_each_other_in_a_circle(owner: str) -> None:
    TopologicalSorter(imports_between(owner)).prepare()


def test_a_circle_of_folders_is_detected() -> None:
    folders = imports_between("model")
    assert "features" in folders["training"]
    with pytest.raises(CycleError, match="training"):
        TopologicalSorter(folders | {"features": {"training"}}).prepare()


def test_the_rule_can_refuse() -> None:
    assert refused("pipeline", "sharding.build.build_set")
    assert refused("sharding", "pipeline.augment")
    assert refused("evaluate", "train.main")
    assert refused("model", "report.page")
    assert refused("imaging", "sharding.format")
    assert refused("model", "serve.limits")
    assert refused("serve", "report.page")
    assert refused("page", "serve.limits")
    assert refused("serve", "page.draw")
    assert refused("app", "model.load_detector")
    assert not refused("pipeline", "sharding.format.open_shards")


@pytest.mark.parametrize(
    ("library", "home"),
    [("nvidia", {"pipeline/dali.py", "pipeline/dali_graph.py"}), ("streamlit", PAGE),
     ("webdataset", {"sharding/write.py"}), ("captum", {"model/inference/gradcam.py"}),
     ("c2pa", {"model/c2pa/signatures.py"}), ("fastapi", {"serve/api.py", "serve/uploads.py"}),
     ("uvicorn", {"serve/server.py"}),
     *((tracker, {"model/tracking/tracker.py"}) for tracker in ("wandb", "mlflow"))],
)  # fmt: skip
def test_heavy_libraries_are_imported_only_in_listed_modules(library: str, home: set[str]) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for folder in (*MAY_IMPORT,)
        for path in files_of(folder)
        if any(module.partition(".")[0] == library for module in imports_of(path))
    }
    assert users == home


def test_pyarrow_compute_is_imported_explicitly() -> None:
    """`pa.compute` exists only after some other library has imported it, such as pandas."""
    for owner in MAY_IMPORT:
        for path in files_of(owner):
            assert "pa.compute" not in path.read_text(), path


def test_json_is_parsed_by_storage() -> None:
    """`json.loads` ends a deeply nested text with RecursionError, which nobody expects."""
    own = re.compile(r"^(?!.*`).*json\.loads?\((?!json\.dumps)|map\(json\.loads", re.MULTILINE)
    users = {
        path.relative_to(ROOT).as_posix()
        for owner in MAY_IMPORT
        for path in files_of(owner)
        if own.search(path.read_text())
    }
    assert users == {"storage.py"}


def test_no_randomness_in_the_graph() -> None:
    """Random parameters are inputs of the DALI graph. Random operators of DALI would give other
    values after a resume and in the other backend.
    """
    for path in (ROOT / "pipeline").glob("*.py"):
        assert "fn.random" not in path.read_text(), path


def test_what_is_parsed_is_read_by_storage() -> None:
    """`read_text` of `Path` waits for a pipe, and reads a device or a huge file to the end."""
    unbounded = re.compile(r"(?:parse_json|tomllib\.loads|table_from)\(.*\.read_(?:text|bytes)\(")
    for owner in MAY_IMPORT:
        for path in files_of(owner):
            assert not unbounded.search(path.read_text()), f"{path}: use storage.read_plain"
