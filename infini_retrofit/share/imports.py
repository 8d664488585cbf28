"""Which first-party source files a source file needs, read from its import statements.

Nothing is imported or run. An exported folder must hold these files.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

FIRST_PARTY = ("infini_retrofit", "stages")
ROOT = Path(__file__).resolve().parents[2]


def first_party_files(source: Path, root: Path = ROOT) -> list[Path]:
    """Return `source` and every first-party file that it needs, however far down, sorted.

    Args:
        source: a Python file below `root`.
        root: the folder that holds the first-party packages.
    """
    found: set[Path] = set()
    waiting = {source.resolve(), *_package_files(source.resolve().parent, root)}
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting |= imported_files(file, root) - found
    return sorted(found)


def imported_files(source: Path, root: Path = ROOT) -> set[Path]:
    """Return the first-party files that one file imports itself, packages' `__init__` included."""
    files: set[Path] = set()
    for name in _imported_names(source, root):
        if name.split(".")[0] in FIRST_PARTY:
            module = root.joinpath(*name.split("."))
            candidates = {module.with_suffix(".py"), *_package_files(module, root)}
            files |= {file for file in candidates if file.is_file()}
    return files


def _package_files(folder: Path, root: Path) -> set[Path]:
    """Return the `__init__.py` of a package and of all packages above it."""
    folders = [folder, *folder.parents]
    above = folders[: folders.index(root)] if root in folders else []
    return {f / "__init__.py" for f in above if (f / "__init__.py").is_file()}


def _imported_names(source: Path, root: Path) -> Iterator[str]:
    """Yield the dotted names of all that a file imports, late imports included."""
    package = source.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
            yield module
