"""The API reference: a page for each package, and one for each module that holds public names its package does not export."""

from __future__ import annotations

from pathlib import Path

import griffe

# The command line has a page of its own; how claims are measured stands on the papers' pages.
LEFT_OUT = frozenset({"papers", "cli"})
# Here the package's exports are all there is to call.
INTERNAL = frozenset({"report"})


def _exports(package: griffe.Module) -> list[str]:
    """What a package exports; of a single module, which lists nothing, its public names with a docstring."""
    names = [str(name) for name in package.exports or []]
    return names if names or package.is_init_module else _documented(package, set())


def _target(package: griffe.Module, name: str) -> str:
    """Where an exported name is defined."""
    member = package.members[name]
    if isinstance(member, griffe.Module):  # a name exported from the module of the same name: griffe sees the module alone
        return f"{member.path}.{name}"
    return str(member.target_path) if isinstance(member, griffe.Alias) else str(member.path)


def _entry(package: griffe.Module, name: str) -> str:
    """An exported name under the path by which people import it."""
    path = f"{package.path}.{name}"
    if isinstance(package.members[name], griffe.Module):
        return f"[](){{#{path}}}\n\n" + _directive(_target(package, name), f"heading: {path}", f"toc_label: {name}")
    return _directive(path)


def _documented(module: griffe.Module, shown: set[str]) -> list[str]:
    """Public names defined in the module, with a docstring, that no package page shows."""
    return [
        name
        for name, member in module.members.items()
        if not name.startswith("_")
        and isinstance(member, griffe.Class | griffe.Function)
        and member.docstring is not None
        and member.path not in shown
    ]


def reference_pages(root: Path) -> dict[str, str]:
    """Every page below ``reference/``, by its name.

    Args:
        root: the folder of the package ``corollary``.
    """
    top = griffe.load("corollary", search_paths=[root.parent], resolve_aliases=False)
    pages: dict[str, str] = {}
    summary = ["- [Overview](index.md)"]
    rows = []
    for package in sorted(top.modules.values(), key=lambda module: module.name):
        if package.name in LEFT_OUT:
            continue
        names = _exports(package)
        shown = {_target(package, name) for name in names}
        body = [f"# corollary.{package.name}\n", _directive(package.path, "members: false", "show_root_heading: false")]
        body += [_entry(package, name) for name in names]
        pages[f"reference/{package.name}.md"] = "\n".join(body)
        first = package.docstring.value.splitlines()[0] if package.docstring else ""
        rows.append(f"| [`corollary.{package.name}`]({package.name}.md) | {first} |")
        below = []
        for module in sorted(package.modules.values(), key=lambda module: module.name):
            hidden = module.name.startswith("_") or package.name in INTERNAL
            own = [] if hidden else _documented(module, shown)
            if own:
                page = f"{package.name}.{module.name}.md"
                listed = "[" + ", ".join(own) + "]"
                pages[f"reference/{page}"] = f"# {module.path}\n\n" + _directive(
                    module.path, f"members: {listed}", "show_root_heading: false"
                )
                below.append(f"    - [{module.name}]({page})")
        summary.append(f"- [{package.name}]({package.name}.md)")
        summary += below
    pages["reference/SUMMARY.md"] = "\n".join(summary) + "\n"
    pages["reference/index.md"] = "# API reference\n\n| Package | |\n| --- | --- |\n" + "\n".join(rows) + "\n"
    return pages


def _directive(path: str, *options: str) -> str:
    lines = [f"::: {path}"]
    if options:
        lines += ["    options:", *(f"      {option}" for option in options)]
    return "\n".join(lines) + "\n"
