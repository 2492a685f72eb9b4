"""Reads imports and names out of Python source, without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One imported module, as written at `line`.

    `lazy` is it inside a function, `typing_only` under TYPE_CHECKING.
    """

    module: str
    line: int
    lazy: bool
    typing_only: bool


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(root: Path, path: Path) -> list[Import]:
    """Every import in a file: at its top, inside functions, and `import_module("...")` with a literal."""
    package = module_name(root, path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]

    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        for module in named_modules(node, package):
            yield Import(module, getattr(node, "lineno", 0), lazy, typing_only)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = isinstance(node, ast.If) and dotted(node.test).split(".")[-1] == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            under_guard = guarded and child in node.body
            yield from visit(child, lazy, typing_only or under_guard)

    return list(visit(ast.parse(path.read_text()), False, False))


def named_modules(node: ast.AST, package: list[str]) -> list[str]:
    """The modules that one statement or call imports; `package` is what its relative imports start from."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            base = ".".join([*package[: len(package) - node.level + 1], base]).strip(".")
        # `from megaplug import topology` names a room, `from megaplug import __version__` does not
        rooms = base in ("megaplug", "megaplug.layers", "megatron")
        return [
            f"{base}.{alias.name}" if rooms and not alias.name.startswith("__") else base
            for alias in node.names
        ]
    if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
        return [
            arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
        ]
    return []


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def imported_names(tree: ast.AST) -> dict[str, str]:
    """What the names bound by imports stand for: `import torch.cuda as c` gives {"c": "torch.cuda"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def in_full(name: str, names: dict[str, str]) -> str:
    first, dot, rest = name.partition(".")
    return f"{names.get(first, first)}{dot}{rest}"
