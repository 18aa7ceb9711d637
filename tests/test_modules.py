"""Every module is used: nothing is left behind when another takes its place."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("mplug2_jax", "data_pipelines")
ENTRY_POINTS = {"mplug2_jax.cli.main", "data_pipelines.sources.config"}  # the command, and an old name for recipes
EXPORTED = "mplug2_jax.conversion.exported"  # programs of exported folders, which name each other


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported_names(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, and what it imports from them, which may be modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = path.parts[: len(path.parts) - node.level] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def test_every_module_is_imported_by_another_one(repository: Path, monkeypatch) -> None:
    monkeypatch.chdir(repository)
    files = [path for folder in (*PACKAGES, "configs") for path in Path(folder).rglob("*.py")]
    imported = {module_name(path): {*imported_names(path)} for path in files}
    unused = [
        name
        for path in files
        if (name := module_name(path)).startswith(PACKAGES) and path.name != "__init__.py"
        if not any(name in names for other, names in imported.items() if other != name)
    ]
    assert [name for name in unused if name not in ENTRY_POINTS and not name.startswith(EXPORTED)] == []
