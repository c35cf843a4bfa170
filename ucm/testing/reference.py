"""The tables in `docs/` that are made from the code: settings and metrics.

`python -m ucm.testing.reference` rewrites them in place; `tests/unit/test_docs.py` fails when they
are stale. A table stands between two comments, `<!-- NAME: begin -->` and `<!-- NAME: end -->`.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Final

from ucm.config import GIB, MIB, QuotaConfig
from ucm.config_loader import FIELD_TYPES, SECTIONS
from ucm.config_values import expected
from ucm.metrics import METRICS

DOCS: Final = Path(__file__).resolve().parents[2] / "docs"

_COMPUTED_DEFAULTS: Final = {
    "service.socket_path": "`$XDG_RUNTIME_DIR/ucm/ucm.sock`, else `/tmp/ucm-<uid>/ucm.sock`",
    "nvme.path": "`$XDG_CACHE_HOME/ucm/store`, else `~/.cache/ucm/store`",
}


def metrics_table() -> str:
    """Every metric, one row each."""
    rows = ["| metric | kind | unit | labels | meaning |", "|---|---|---|---|---|"]
    for spec in METRICS:
        labels = ", ".join(f"`{label}`" for label in spec.labels) or "-"
        rows.append(f"| `{spec.name}` | {spec.kind} | {spec.unit} | {labels} | {spec.help} |")
    return "\n".join(rows)


def configuration_table() -> str:
    """Every setting by section: default, what it takes, what it is."""
    parts = []
    for section, cls in {**SECTIONS, "quota.TENANT": QuotaConfig}.items():
        rows = [
            f"### [{section}]\n\n{inspect.getdoc(cls)}\n",
            "| key | default | takes | meaning |",
            "|---|---|---|---|",
        ]
        for field, text in _field_texts(cls).items():
            name = f"{section}.{field}"
            default = _COMPUTED_DEFAULTS.get(name) or f"`{_plain(name, getattr(cls(), field))}`"
            takes = expected(name, FIELD_TYPES.get(name, int))
            rows.append(f"| `{field}` | {default} | {takes} | {text} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _field_texts(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    field = ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            field = node.target.id
            texts[field] = ""
        elif field and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            texts[field] = " ".join(str(node.value.value).split())
    return texts


def _plain(name: str, value: object) -> str:
    if isinstance(value, int) and "_bytes" in name and value:
        return f"{value // GIB}GiB" if value % GIB == 0 else f"{value // MIB}MiB"
    if isinstance(value, tuple):
        return str(list(value))
    return str(value)


TABLES: Final = {
    "metrics.md": ("metrics", metrics_table),
    "configuration.md": ("settings", configuration_table),
}


def with_table(text: str, name: str, table: str) -> str:
    """`text` with `table` between the comments of `name`.

    Raises:
        ValueError: the comments are not there.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no {begin} ... {end}")
    return pattern.sub(lambda _match: f"{begin}\n{table}\n{end}", text)


def rewrite() -> None:
    """Bring every table up to date."""
    for file, (name, make) in TABLES.items():
        path = DOCS / file
        path.write_text(with_table(path.read_text(), name, make()))


if __name__ == "__main__":
    rewrite()
