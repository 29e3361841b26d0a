"""The arrows of the layout: who may import whom. Read from the source, so nothing has to import."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("registry", "training", "serving")

# folder (or file) → top-level modules that nothing in it may import
FORBIDDEN = {
    "registry": {"torch", "transformers", "peft", "litestar", "serving", "training"},
    "training": {"litestar", "serving", "wardrobe"},
    "serving": {"training", "wardrobe"},
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    """Every module named by an import statement anywhere in the file, functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def offenders(folder: str, banned: set[str], allowed_under: str | None = None) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(folder)
        if allowed_under is None or not path.is_relative_to(ROOT / allowed_under)
        for module in imported_modules(path)
        if module.split(".")[0] in banned
    ]


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_package_imports_only_along_the_arrows(folder: str) -> None:
    assert sources(folder), f"{folder} is empty: the walk would prove nothing"
    assert offenders(folder, FORBIDDEN[folder]) == []


@pytest.mark.parametrize(
    ("module", "home"), [("torch", "serving/engine"), ("litestar", "serving/api")]
)
def test_a_heavy_library_stays_in_its_room(module: str, home: str) -> None:
    assert offenders("serving", {module}, allowed_under=home) == []
    users = [p for p in sources(home) if module in {m.split(".")[0] for m in imported_modules(p)}]
    assert users, f"nothing under {home} imports {module}: the rule would prove nothing"


def test_the_engine_boundary_knows_neither_torch_nor_names() -> None:
    modules = set(imported_modules(ROOT / "serving/engine/boundary.py"))
    assert {m.split(".")[0] for m in modules} <= {
        "collections",
        "dataclasses",
        "typing",
        "registry",
    }


def test_adapters_is_a_folder_of_recipes_and_no_package() -> None:
    assert list((ROOT / "adapters").rglob("*.py")) == []


def test_no_room_is_called_utils() -> None:
    names = {part for folder in PACKAGES for path in sources(folder) for part in path.parts}
    assert names.isdisjoint({"utils", "common", "helpers", "managers", "utils.py", "helpers.py"})


def test_every_package_says_in_one_line_what_it_is() -> None:
    for init in (p for folder in PACKAGES for p in sources(folder) if p.name == "__init__.py"):
        assert ast.get_docstring(ast.parse(init.read_text())), f"{init} has no docstring"


def test_no_pickle_reader_in_the_serving_process() -> None:
    assert offenders("serving", {"pickle", "cloudpickle", "joblib", "dill"}) == []
    for path in sources("serving"):
        assert "torch.load" not in path.read_text(), f"{path} uses torch.load"
