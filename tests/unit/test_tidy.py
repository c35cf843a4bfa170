"""The house rules that a machine can check: layers, import spelling, sizes, names, packaging."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAPPED = ("storage", "kernels", "connectors", "protos", "bench")
SOURCE_FOLDERS = ("ucm", *MAPPED)
MAX_FUNCTION_LINES = 70
MAX_FILE_LINES = 500
MAX_PARAMETERS = 6
MAX_NESTING = 3
MAX_FOLDER_README_LINES = 40
MAX_ADR_LINES = 60

# What may import what: a module imports from its own layer or below. Longest prefix wins.
LAYERS = {
    "ucm.cli": 6,
    "ucm.bench": 6,
    "ucm.connectors": 5,
    "ucm.engine": 5,
    "ucm.sparse": 5,
    "ucm.reuse": 5,
    "ucm.model_hub": 5,
    "ucm.text_files": 5,
    "ucm.call_guard": 4,
    "ucm.row_uses": 3,
    "ucm.service": 4,
    "ucm.answers": 4,
    "ucm.rpc": 4,
    "ucm.door_wire": 4,
    "ucm.daemon": 4,
    "ucm.client": 4,
    "ucm.admin": 4,
    "ucm.door": 4,
    "ucm.embedded": 4,
    "ucm.collection_service": 4,
    "ucm.collection_client": 4,
    "ucm.collection_wire": 4,
    "ucm.sd_notify": 4,
    "ucm.config_loader": 4,
    "ucm.config_values": 4,
    "ucm.door_client": 4,
    "ucm.device_load": 4,
    "ucm.device_plan": 4,
    "ucm.doctor": 4,
    "ucm.sockets": 4,
    "ucm.wire": 4,
    "ucm.status_wire": 4,
    "ucm.plan_wire": 4,
    "ucm.segment_files": 4,
    "ucm.remote_plans": 4,
    "ucm.remote_leases": 4,
    "ucm.remote_selections": 4,
    "ucm.select_wire": 4,
    "ucm.layer_reader": 4,
    "ucm.load_steps": 4,
    "ucm.slab_ledger": 4,
    "ucm.slab_mover": 4,
    "ucm.reader_io": 4,
    "ucm.manager": 3,
    "ucm.manager_state": 3,
    "ucm.manager_status": 3,
    "ucm.summaries": 3,
    "ucm.summary_fills": 3,
    "ucm.namespaces": 3,
    "ucm.grants": 3,
    "ucm.plan_grants": 3,
    "ucm.layer_loads": 3,
    "ucm.mapped_loads": 3,
    "ucm.progress": 3,
    "ucm.loads": 3,
    "ucm.loads_at_once": 3,
    "ucm.load_board": 3,
    "ucm.token_pipe": 3,
    "ucm.load_gate": 3,
    "ucm.rechecks": 3,
    "ucm.credits": 3,
    "ucm.stores": 3,
    "ucm.pins": 3,
    "ucm.shrink": 3,
    "ucm.staging": 3,
    "ucm.write_behind": 3,
    "ucm.transfer": 3,
    "ucm.placement": 3,
    "ucm.eviction": 3,
    "ucm.eviction_gdsf": 3,
    "ucm.eviction_s3fifo": 3,
    "ucm.eviction_policies": 3,
    "ucm.admission": 3,
    "ucm.ghost": 3,
    "ucm.reuse_ages": 3,
    "ucm.leases": 3,
    "ucm.cost_model": 3,
    "ucm.load_decision": 3,
    "ucm.load_pipeline": 3,
    "ucm.robust_fit": 3,
    "ucm.selection": 3,
    "ucm.summary_tables": 3,
    "ucm.layer_choice": 3,
    "ucm.block_columns": 3,
    "ucm.block_index": 3,
    "ucm.tier_view": 3,
    "ucm.collection_desk": 3,
    "ucm.collection_lists": 3,
    "ucm.deletion": 3,
    "ucm.deletion_rounds": 3,
    "ucm.storage": 2,
    "ucm.api": 2,
    "ucm.leased_blocks": 2,
    "ucm.collection_api": 2,
    "ucm.load_plan": 2,
    "ucm.select_api": 2,
    "ucm.copying": 2,
    "ucm.layer_pipeline": 2,
    "ucm.kernels": 1,
    "ucm.protos": 1,
    "ucm.errors": 0,
    "ucm.types": 0,
    "ucm.enum_words": 0,
    "ucm.path_errors": 0,
    "ucm.plurals": 0,
    "ucm.machine_memory": 0,
    "ucm.joint_work": 0,
    "ucm.layout": 0,
    "ucm.hashing": 0,
    "ucm.config": 0,
    "ucm.shares": 0,
    "ucm.clock": 0,
    "ucm.tracing": 0,
    "ucm.metrics": 0,
    "ucm.block_rows": 0,
    "ucm.checksum": 0,
    "ucm.mapping": 0,
    "ucm.testing": 7,
}
# The process boundary is the import boundary: an engine's side never sees the daemon's.
FORBIDDEN = {
    "ucm.connectors": ("ucm.storage", "ucm.manager", "ucm.embedded", "ucm.daemon", "ucm.service"),
    "ucm.engine": ("ucm.api", "ucm.client", "ucm.connectors", "ucm.storage", "ucm.manager"),
    "ucm.sparse": ("ucm.api", "ucm.client", "ucm.connectors", "ucm.storage", "ucm.engine"),
    "ucm.reuse": ("ucm.api", "ucm.client", "ucm.connectors", "ucm.storage", "ucm.engine"),
}
HEAVY_IMPORTS = {
    "torch": (
        "ucm.engine",
        "ucm.sparse",
        "ucm.reuse",
        "ucm.kernels",
        "ucm.connectors",
        "ucm.bench",
        "ucm.cli",
        "ucm.testing",
    ),
    "lmdb": (
        "ucm.storage.index",
        "ucm.storage.registry",
        "ucm.storage.registry_change",
        "ucm.bench.storage_peers",
        "ucm.testing.faulty_index",
    ),
    "grpc": (
        "ucm.protos",
        "ucm.call_guard",
        "ucm.rpc",
        "ucm.collection_service",
        "ucm.collection_client",
        "ucm.service",
        "ucm.daemon",
        "ucm.client",
        "ucm.admin",
        "ucm.testing",
    ),
    "transformers": ("ucm.bench",),
    "matplotlib": ("ucm.bench.gsa_plot",),
    "kvikio": ("ucm.storage.gds", "ucm.storage.gpu_probe"),
}
BANNED_NAMES = re.compile(r"(^|_)(utils?|common|helpers?|misc|manager2)$|_v[0-9]+$|_new$")
BANNED_CALLS = re.compile(
    r"\b(pickle|marshal|shelve|dill)\.\w+\(|^\s*import (pickle|marshal|shelve)\b"
    r"|torch\.load\(|yaml\.load\(|(?<![\w.])eval\(",
    re.MULTILINE,
)


def python_files(*folders: str) -> Iterator[Path]:
    """Source files below `folders`, each once (the links in ucm/ are not followed)."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            below_link = folder == "ucm" and path.relative_to(ROOT / "ucm").parts[0] in MAPPED
            if not below_link and "_pb2" not in path.name:
                yield path


SOURCES = tuple(python_files(*SOURCE_FOLDERS))
TESTS = tuple(python_files("tests"))


def module_name(path: Path) -> str:
    """The import name of a source file: storage/nvme.py is ucm.storage.nvme."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in MAPPED:
        parts.insert(0, "ucm")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(path: Path) -> str:
    """The package that relative imports in `path` start from."""
    name = module_name(path)
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> Iterator[tuple[int, str, int]]:
    """(line, absolute module imported, relative level) for every import in the file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(node, path)
            names_modules = node.module is None or base == "ucm"
            targets = [f"{base}.{alias.name}" for alias in node.names] if names_modules else [base]
            yield from ((node.lineno, target, node.level) for target in targets)


def absolute_base(node: ast.ImportFrom, path: Path) -> str:
    """What `from X import` names, with the dots resolved."""
    if not node.level:
        return node.module or ""
    package = package_of(path).split(".")
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, node.module] if node.module else package)


def lookup(table: dict[str, int], name: str) -> int | None:
    """The value of the longest dotted prefix of `name` in `table`."""
    while name:
        if name in table:
            return table[name]
        name = name.rpartition(".")[0]
    return None


def starts_with(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def test_every_module_has_a_layer() -> None:
    missing = [
        module_name(path)
        for path in SOURCES
        if module_name(path) != "ucm" and lookup(LAYERS, module_name(path)) is None
    ]
    assert not missing, f"add these to LAYERS (and to ucm/README.md): {missing}"


def test_imports_go_downwards() -> None:
    wrong = []
    for path in SOURCES:
        own = lookup(LAYERS, module_name(path))
        for line, target, _ in imports_of(path):
            layer = lookup(LAYERS, target)
            if own is not None and layer is not None and layer > own:
                wrong.append(
                    f"{path.relative_to(ROOT)}:{line} (L{own}) imports {target} (L{layer})"
                )
    assert not wrong, "\n".join(wrong)


def test_process_boundary_is_import_boundary() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in SOURCES
        for owner, targets in FORBIDDEN.items()
        if starts_with(module_name(path), (owner,))
        for line, target, _ in imports_of(path)
        if starts_with(target, targets)
    ]
    assert not wrong, "\n".join(wrong)


def test_heavy_imports_stay_where_they_are_needed() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in SOURCES
        for line, target, _ in imports_of(path)
        for heavy, allowed in HEAVY_IMPORTS.items()
        if starts_with(target, (heavy,)) and not starts_with(module_name(path), allowed)
    ]
    assert not wrong, "\n".join(wrong)


def test_import_spelling() -> None:
    wrong = []
    for path in SOURCES:
        package = package_of(path)
        for line, target, level in imports_of(path):
            where = f"{path.relative_to(ROOT)}:{line} {target}"
            same_folder = target.rpartition(".")[0] == package
            if level > 1:
                wrong.append(f"{where}: never upwards, write `from ucm...`")
            elif level == 0 and same_folder and package != "ucm":
                wrong.append(f"{where}: relative inside a folder")
    assert not wrong, "\n".join(wrong)


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Deepest block inside `node`; an `elif` is not deeper than its `if`."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        opens = isinstance(child, (ast.If, ast.For, ast.While, ast.Try, ast.With, ast.Match))
        deepest = max(deepest, nesting(child, depth + (1 if opens and not is_elif else 0)))
    return deepest


def functions(paths: tuple[Path, ...]) -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in paths:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


@pytest.mark.timeout(90)
def test_functions_are_small() -> None:
    wrong = []
    for where, node in functions(SOURCES + TESTS):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            wrong.append(f"{where}: {lines} lines, at most {MAX_FUNCTION_LINES}")
        if nesting(node) > MAX_NESTING:
            wrong.append(f"{where}: nested {nesting(node)} deep, at most {MAX_NESTING}")
    assert not wrong, "\n".join(wrong)


def test_functions_take_few_parameters() -> None:
    wrong = []
    for where, node in functions(SOURCES):
        names = [
            arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        ]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > MAX_PARAMETERS:
            wrong.append(f"{where}: {count} parameters, at most {MAX_PARAMETERS}")
    assert not wrong, "\n".join(wrong)


def test_files_are_small() -> None:
    wrong = []
    for path in SOURCES + TESTS:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            wrong.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {MAX_FILE_LINES}")
    assert not wrong, "\n".join(wrong)


def test_names_say_something() -> None:
    wrong = [str(path.relative_to(ROOT)) for path in SOURCES if BANNED_NAMES.search(path.stem)]
    assert not wrong, wrong


def test_no_print_outside_the_command_line() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        if not starts_with(module_name(path), ("ucm.cli", "ucm.bench"))
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not wrong, wrong


def test_nothing_executes_data() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {match.group().strip()}"
        for path in SOURCES
        for match in BANNED_CALLS.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, wrong


def test_no_todo_without_an_issue() -> None:
    pattern = re.compile(r"#.*\b(TODO|FIXME|XXX)\b(?!\(#\d+\))")
    wrong = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in SOURCES + TESTS
        if path != Path(__file__).resolve()
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, wrong


def test_links_map_the_root_folders() -> None:
    for folder in MAPPED:
        link = ROOT / "ucm" / folder
        assert link.is_symlink(), f"ucm/{folder} must be a link to ../{folder}"
        assert link.readlink() == Path("..") / folder
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/ is a namespace part"


def test_package_list_equals_the_tree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = settings["tool"]["setuptools"]["packages"]
    found = {package_of(path) for path in SOURCES} | {f"ucm.{folder}" for folder in MAPPED}
    assert sorted(declared) == sorted(found)


def test_no_init_in_tests_and_no_conftest_at_the_root() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()


@pytest.mark.parametrize("folder", [*SOURCE_FOLDERS, "tests"])
def test_folder_readme(folder: str) -> None:
    readme = ROOT / folder / "README.md"
    assert readme.is_file(), f"{folder}/ needs a README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= MAX_FOLDER_README_LINES


def test_adrs_are_short() -> None:
    for path in (ROOT / "docs" / "adr").glob("*.md"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_ADR_LINES, path.name


def test_import_ucm_is_light() -> None:
    program = (
        "import sys, time; start = time.perf_counter(); import ucm; "
        "took = time.perf_counter() - start; "
        "heavy = {'torch', 'grpc', 'lmdb', 'numpy'} & set(sys.modules); "
        "print(took, sorted(heavy))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/"
        ).stdout.split(" ", 1)
        for _ in range(3)
    ]
    assert {heavy.strip() for _, heavy in runs} == {"[]"}
    assert min(float(took) for took, _ in runs) < 0.2
