"""Who may import whom: the layers of docs/architecture.md, read from the sources with ast.

Imports inside functions count, imports under ``if TYPE_CHECKING`` do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "thor_fast"

VOCABULARY = {"types", "errors", "config", "observability"}
LOOP = VOCABULARY | {"_core", "sandbox", "tools", "engines.base"}
SCORED = LOOP | {"kernels", "rollout", "rewards", "rl", "engines"}

# Beside the row's own name. The longest name that matches a module counts.
MAY_IMPORT = {
    **dict.fromkeys(VOCABULARY, VOCABULARY),
    "kernels": set(),
    "sandbox": VOCABULARY | {"_core"},
    "sandbox.guest": set(),  # runs where the package cannot be imported
    "tools": VOCABULARY,
    "engines.base": VOCABULARY,
    "engines": VOCABULARY | {"kernels"},
    "rollout": LOOP,
    "rewards": LOOP | {"rollout"},
    "rl": LOOP | {"kernels", "rollout", "rewards"},
    **dict.fromkeys(("tirgen", "inference", "evaluation", "synthetic"), SCORED),
    **dict.fromkeys(("integrations", "cli", "viewer"), None),  # None: anything
}
NOBODY_IMPORTS = {"integrations", "cli", "viewer"}

TORCH = {"torch", "transformers", "triton", "safetensors"}
MAY_USE_TORCH = {"kernels", "engines", "rewards", "rl", "synthetic", "inference", "evaluation"}
MAY_USE_TORCH |= {"tirgen", "integrations", "cli", "viewer"}
NEVER_TORCH = {"engines.base", "engines.scripted", "engines.openai"}


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            continue
        yield child
        yield from _statements(child)


def imported(source: str, module: str) -> set[str]:
    """Dotted names that ``source``, the text of ``module``, imports when run."""
    names: set[str] = set()
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: -node.level]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            # `from thor_fast.engines import base` imports thor_fast.engines.base.
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def _modules() -> dict[str, str]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts)] = path.read_text()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        found[f"kernels.{path.stem}"] = path.read_text()
    return found


MODULES = _modules()
LAYERED = sorted(MODULES.keys() - {"__init__"})


def _owner(module: str, table: dict[str, object] | set[str]) -> str | None:
    matches = [name for name in table if module == name or module.startswith(f"{name}.")]
    return max(matches, key=len, default=None)


def _ours(module: str) -> set[str]:
    names = imported(MODULES[module], f"thor_fast.{module}")
    return {n.removeprefix("thor_fast.") for n in names if n.split(".")[0] == "thor_fast"}


@pytest.mark.parametrize("module", LAYERED)
def test_imports_follow_the_layers(module):
    owner = _owner(module, MAY_IMPORT)
    assert owner is not None, f"{module} is in no layer: give it one here"
    allowed = MAY_IMPORT[owner]
    for name in _ours(module):
        if allowed is not None:
            expected = allowed | {owner}
            assert _owner(name, expected), f"{module} imports {name}, expected only {expected}"
        target = name.split(".")[0]
        assert target not in NOBODY_IMPORTS - {module.split(".")[0]}, f"{module} imports {name}"


@pytest.mark.parametrize("module", LAYERED)
def test_torch_only_where_it_may_be(module):
    outside = {name.split(".")[0] for name in imported(MODULES[module], f"thor_fast.{module}")}
    if _owner(module, NEVER_TORCH) or not _owner(module, MAY_USE_TORCH):
        assert not outside & TORCH
    if module.split(".")[0] != "integrations" and not module.startswith("engines.vllm"):
        assert not outside & {"vllm", "verl", "trl", "ray"}


def test_kernels_know_nothing_of_the_package():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level in (0, 1), path
                assert (node.module or "").split(".")[0] != "thor_fast", path
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != "thor_fast" for alias in node.names), path


def test_the_package_itself_imports_nothing_of_ours_eagerly():
    assert _ours("__init__") == set()


def test_packages_do_not_import_each_other_both_ways():
    edges = {
        (module.split(".")[0], name.split(".")[0]) for module in LAYERED for name in _ours(module)
    }
    both = {(a, b) for a, b in edges if a < b and (b, a) in edges}
    assert both == set()


def test_the_parser_sees_what_runs_and_skips_what_does_not():
    source = """
if TYPE_CHECKING:
    import torch
from . import base
from ..errors import DataError
def late():
    import numpy.linalg
"""
    assert imported(source, "thor_fast.engines.paged") == {
        "thor_fast.engines.base",
        "thor_fast.errors.DataError",
        "numpy.linalg",
    }
