"""Signatures and first docstring lines of components, read from their source. Nothing is imported, so no torch is loaded."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_LONGEST_LINE = 76


@dataclass(frozen=True)
class Signature:
    """How an object is called and what its docstring says first; both empty where the source does not tell."""

    call: str = ""
    doc: str = ""


@dataclass(frozen=True)
class _Found:
    node: ast.ClassDef | _Function
    module: str


def read_signature(dotted: str, root: Path | None = None) -> Signature:
    """The signature of an object by its dotted name, following re-exports and inherited constructors.

    Args:
        dotted: e.g. ``corollary.claims.Trial``.
        root: folder in which the top package lies; by default where Python would find it.

    Example:
        >>> found = read_signature("corollary.claims.Paired")
        >>> print(found.call)
        Paired(ours: float, baseline: float)
        >>> found.doc
        'Ours against a tuned baseline on the same seed, split and start; both are the metric of the record.'
    """
    module, _, name = dotted.rpartition(".")
    root = root or _root_of(dotted.partition(".")[0])
    if root is None or not module:
        return Signature()
    source = _Source(root)
    found = source.find(module, name)
    if found is None:
        return Signature()
    doc = (ast.get_docstring(found.node) or "").strip()
    first = " ".join(doc.split("\n\n")[0].split())
    if isinstance(found.node, ast.ClassDef):
        parameters, returns = source.constructor(found), ""
        if parameters is None:
            return Signature(f"{name}(…)", first)
    else:
        parameters = _parameters(found.node)
        returns = f" -> {ast.unparse(found.node.returns)}" if found.node.returns else ""
    return Signature(_layout(name, parameters, returns), first)


def _root_of(package: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]).parent if places else None


def _layout(name: str, parameters: list[str], returns: str) -> str:
    one_line = f"{name}({', '.join(parameters)}){returns}"
    if len(one_line) <= _LONGEST_LINE:
        return one_line
    inner = "".join(f"    {p},\n" for p in parameters)
    return f"{name}(\n{inner}){returns}"


def _parameters(node: _Function, *, method: bool = False) -> list[str]:
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    parts = [_spell(a, d) for a, d in zip(plain, defaults, strict=True)]
    if args.posonlyargs:
        parts.insert(len(args.posonlyargs), "/")
    if method:
        parts = parts[1:]
    if args.vararg:
        parts.append("*" + _spell(args.vararg, None))
    elif args.kwonlyargs:
        parts.append("*")
    parts += [_spell(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        parts.append("**" + _spell(args.kwarg, None))
    return parts


def _spell(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    if default is None:
        return argument.arg + annotation
    equals = " = " if annotation else "="
    return f"{argument.arg}{annotation}{equals}{ast.unparse(default)}"


@lru_cache(maxsize=512)
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, those under ``if`` and ``try`` included."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            yield from _statements([*statement.body, *statement.orelse])
        elif isinstance(statement, ast.Try):
            yield from _statements([*statement.body, *statement.orelse, *(s for e in statement.handlers for s in e.body)])


def _last_name(expression: ast.expr) -> str:
    if isinstance(expression, ast.Call):
        expression = expression.func
    if isinstance(expression, ast.Subscript):
        expression = expression.value
    if isinstance(expression, ast.Attribute):
        return expression.attr
    return expression.id if isinstance(expression, ast.Name) else ""


class _Source:
    def __init__(self, root: Path) -> None:
        self.root = root

    def _path(self, module: str) -> Path | None:
        base = self.root.joinpath(*module.split("."))
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if path.is_file():
                return path
        return None

    def find(self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> _Found | None:
        """The definition behind a name of a module, through imports, aliases and lazily loaded names."""
        path = self._path(module)
        if path is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        try:
            tree = _parse(path)
        except (SyntaxError, UnicodeDecodeError, OSError):
            return None
        last: _Found | None = None
        for statement in _statements(tree.body):
            match statement:
                case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef() if statement.name == name:
                    last = _Found(statement, module)  # the last one counts: overloads come first
                case ast.ImportFrom(names=names):
                    for alias in names:
                        if (alias.asname or alias.name) == name:
                            origin = self._origin(module, path, statement)
                            last = self.find(origin, alias.name, seen) or last
                case ast.Assign(targets=[ast.Name(id=target)], value=ast.Name(id=other)) if target == name:
                    last = self.find(module, other, seen) or last
        if last is None and path.name == "__init__.py":
            for sibling in sorted(path.parent.glob("*.py")):  # a package that loads its names on first use
                if sibling.name != "__init__.py":
                    last = last or self._defined(f"{module}.{sibling.stem}", sibling, name)
        return last

    @staticmethod
    def _defined(module: str, path: Path, name: str) -> _Found | None:
        try:
            tree = _parse(path)
        except (SyntaxError, UnicodeDecodeError, OSError):
            return None
        for statement in tree.body:
            if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and statement.name == name:
                return _Found(statement, module)
        return None

    @staticmethod
    def _origin(module: str, path: Path, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for _ in range(statement.level - 1):
            package = package.rpartition(".")[0]
        return f"{package}.{statement.module}" if statement.module else package

    def constructor(self, found: _Found, depth: int = 0) -> list[str] | None:
        """Parameters of a class: its own ``__init__``, a dataclass's fields, or what the first known base takes."""
        if not isinstance(found.node, ast.ClassDef) or depth > 8:
            return None
        for statement in found.node.body:
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)) and statement.name == "__init__":
                return _parameters(statement, method=True)
        bases = [base for name in map(_last_name, found.node.bases) if name and (base := self.find(found.module, name))]
        inherited = next((p for base in bases if (p := self.constructor(base, depth + 1)) is not None), None)
        dataclass_ = any(_last_name(d) == "dataclass" for d in found.node.decorator_list)
        if dataclass_ or any(_last_name(b) == "NamedTuple" for b in found.node.bases):
            return [*(inherited or []), *self._fields(found.node)]
        return inherited

    @staticmethod
    def _fields(node: ast.ClassDef) -> list[str]:
        parts = []
        for statement in node.body:
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            annotation = ast.unparse(statement.annotation)
            if "ClassVar" in annotation:
                continue
            default = statement.value
            if isinstance(default, ast.Call) and _last_name(default) == "field":
                given = {k.arg: k.value for k in default.keywords}
                if isinstance(given.get("init"), ast.Constant) and given["init"].value is False:  # type: ignore[attr-defined]
                    continue
                factory = given.get("default_factory")
                default = given.get("default") or (ast.Call(factory, [], []) if factory else None)
            parts.append(_spell(ast.arg(statement.target.id, statement.annotation), default))
        return parts
