"""Kernel hash: what must be equal for a measurement or proof of a variant to hold, read from source without importing it.

The hash covers every definition that the variant's `forward` and `backward` reach: kernels, their callees, constants and
launchers, through imports, within the variant's own package. It is taken over syntax trees without positions, comments,
docstrings, decorators or the types of host functions' arguments, and over the set of definitions rather than over files; so
reformatting and moving code keep records, and any other edit of what runs makes them stale. What merely decides (which
variants, which configs, what they cost) is not reached and does not count.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..registry import Variant

#: Functions of a variant's module where the search starts.
ENTRIES = ("forward", "backward")

#: Modules of this package that take no part in what a kernel computes: facts, messages and tables.
_FLOORS = frozenset(
    f"{__package__.split('.')[0]}.{name}" for name in ("errors", "settings", "device", "problem", "registry", "requirements")
)

#: Fields of syntax nodes that say nothing, or that differ between versions of Python.
_SILENT = frozenset(
    ("ctx", "decorator_list", "kind", "type_comment", "type_params", "lineno", "end_lineno", "col_offset", "end_col_offset")
)

_Function = ast.FunctionDef | ast.AsyncFunctionDef


class _Definition:
    """A statement of a module that binds names, with what is derived from it once."""

    def __init__(self, statement: ast.stmt) -> None:
        self._statement = statement

    @functools.cached_property
    def dump(self) -> str:
        return _dump(self._statement)

    @functools.cached_property
    def references(self) -> tuple[tuple[str, ...], ...]:
        return tuple(sorted(set(_references(self._statement))))


@dataclasses.dataclass(frozen=True)
class _Module:
    """A parsed module: what each of its names is bound by, and what it imports.

    imports: local name -> (module, name in it, or None for the module itself); stars: modules imported from with `*`.
    """

    name: str
    definitions: dict[str, list[_Definition]]
    imports: dict[str, tuple[str, str | None]]
    stars: list[str]


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement of a module binds."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
        return
    for node in ast.iter_child_nodes(statement):
        if isinstance(node, ast.stmt):
            yield from _bound(node)
        elif isinstance(node, ast.ExceptHandler):
            for inner in node.body:
                yield from _bound(inner)
        else:
            yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def _imports(tree: ast.AST, package: str) -> tuple[dict[str, tuple[str, str | None]], list[str]]:
    """Imported names below a node, those inside functions and `if`s too."""
    found: dict[str, tuple[str, str | None]] = {}
    stars = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                found[a.asname or a.name.split(".")[0]] = (a.name if a.asname else a.name.split(".")[0], None)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            for a in node.names:
                if a.name == "*":
                    stars.append(base)
                else:
                    found[a.asname or a.name] = (base, a.name)
    return found, stars


@functools.lru_cache(maxsize=4096)
def _find(module: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module is, found without importing it or the packages it is in."""
    package, _, _ = module.rpartition(".")
    if not package:
        return importlib.util.find_spec(module) if module not in sys.builtin_module_names else None
    outer = _find(package)
    if outer is None or outer.submodule_search_locations is None:
        return None
    return importlib.machinery.PathFinder.find_spec(module, list(outer.submodule_search_locations))


@functools.lru_cache(maxsize=4096)
def _parse(module: str) -> _Module | None:
    """A module's source, parsed once; None if there is none to be found."""
    spec = _find(module)
    loader = None if spec is None else spec.loader
    text = loader.get_source(module) if isinstance(loader, importlib.abc.InspectLoader) else None
    if spec is None or text is None:
        return None
    tree = ast.parse(text)
    definitions: dict[str, list[_Definition]] = {}
    for statement in tree.body:
        if not isinstance(statement, (ast.Import, ast.ImportFrom)):
            definition = _Definition(statement)
            for name in _bound(statement):
                definitions.setdefault(name, []).append(definition)
    is_package = spec.submodule_search_locations is not None
    imports, stars = _imports(tree, module if is_package else module.rpartition(".")[0])
    return _Module(module, definitions, imports, stars)


def _jitted(function: _Function) -> bool:
    """Whether a decorator compiles the function: then the types of its arguments are part of what is compiled."""
    names = {n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "") for d in function.decorator_list for n in ast.walk(d)}
    return any("jit" in name for name in names)


def _children(node: ast.AST, typed: bool) -> Iterator[tuple[str, object]]:
    """Fields of a node that count. typed: annotations do, as in a compiled function or the fields of a class."""
    body = getattr(node, "body", None)
    documented = (
        isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None
    )
    for name in node._fields:
        value = getattr(node, name, None)
        if name in _SILENT or value is None or value == []:
            continue
        if name in ("annotation", "returns") and not typed:
            continue
        yield name, value[1:] if name == "body" and documented and isinstance(body, list) else value


def _dump(node: object, typed: bool = False) -> str:
    """Text of a syntax tree that is the same for every version of Python."""
    if isinstance(node, list):
        return "[" + ",".join(_dump(n, typed) for n in node) + "]"
    if not isinstance(node, ast.AST):
        return f"{type(node).__name__}:{node!r}"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        typed = _jitted(node)
    elif isinstance(node, ast.ClassDef):
        typed = True
    return type(node).__name__ + "(" + ",".join(f"{name}={_dump(value, typed)}" for name, value in _children(node, typed)) + ")"


def _references(node: object, typed: bool = False) -> Iterator[tuple[str, ...]]:
    """Dotted names that a definition uses: ("tl", "sum"), ("sweep_triton", "forward"); annotations of host code excepted."""
    if isinstance(node, list):
        for n in node:
            yield from _references(n, typed)
        return
    if not isinstance(node, ast.AST):
        return
    if isinstance(node, (ast.Name, ast.Attribute)):
        path: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            path.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            yield (inner.id, *reversed(path))
            return
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        typed = _jitted(node)
    for name, value in _children(node, typed and not isinstance(node, ast.ClassDef)):
        if name != "annotation" or typed:
            yield from _references(value, typed)


class _Closure:
    """The definitions that are reached from some names of a module."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.dumps: set[str] = set()
        self._seen: set[tuple[str, str]] = set()
        self._followed: set[tuple[str, tuple[str, ...]]] = set()

    def module(self, name: str) -> _Module | None:
        own = name == self.package or name.startswith(self.package + ".")
        return _parse(name) if own and name not in _FLOORS else None

    def reach(self, module: str, path: tuple[str, ...]) -> None:
        """Follow a dotted name as seen in a module."""
        found = self.module(module)
        if found is None or not path or (module, path) in self._followed:
            return
        self._followed.add((module, path))
        name, *rest = path
        if name in found.definitions:
            self._take(found, name)
        elif name in found.imports:
            base, inner = found.imports[name]
            if inner is None:
                self._through(base, tuple(rest))
            elif self.module(f"{base}.{inner}") is not None:
                self._through(f"{base}.{inner}", tuple(rest))
            else:
                self.reach(base, (inner, *rest))
        else:
            for star in found.stars:
                self.reach(star, path)

    def _through(self, module: str, path: tuple[str, ...]) -> None:
        """A name inside a module that is used as an object: `sweep_triton.forward`, or the module as a whole."""
        if path and self.module(f"{module}.{path[0]}") is not None and path[0] not in getattr(self.module(module), "definitions", {}):
            self._through(f"{module}.{path[0]}", path[1:])
            return
        whole = self.module(module)
        if whole is not None:
            for name in path[:1] or list(whole.definitions):
                self.reach(module, (name, *path[1:]))

    def _take(self, module: _Module, name: str) -> None:
        if (module.name, name) in self._seen:
            return
        self._seen.add((module.name, name))
        for definition in module.definitions[name]:
            self.dumps.add(definition.dump)
            for path in definition.references:
                self.reach(module.name, path)


@functools.lru_cache(maxsize=4096)
def module_hash(module: str, entries: tuple[str, ...] = ENTRIES) -> str:
    """The hash of what some functions of a module reach, 24 hexadecimal digits; `unknown` where no source is to be found."""
    closure = _Closure(module.split(".")[0])
    for name in entries:
        closure.reach(module, (name,))
    if not closure.dumps:
        return "unknown"
    return hashlib.sha256("\n".join(sorted(closure.dumps)).encode()).hexdigest()[:24]


def kernel_hash(variant: Variant) -> str:
    """The hash of a variant's code: kernels, callees, constants and launchers of both directions."""
    return module_hash(variant.module)
