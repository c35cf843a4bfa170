"""What the documentation says is what the code does."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

from ucm.config_loader import FIELD_TYPES, env_name
from ucm.metrics import METRICS
from ucm.sockets import FOLDER_MODE, MAX_PATH_BYTES
from ucm.testing.reference import DOCS, TABLES, with_table


@pytest.mark.parametrize("file", TABLES)
def test_tables_are_up_to_date(file: str) -> None:
    name, make = TABLES[file]
    text = (DOCS / file).read_text()
    assert with_table(text, name, make()) == text, "run `python -m ucm.testing.reference`"


def test_every_setting_and_metric_is_explained() -> None:
    configuration = (DOCS / "configuration.md").read_text()
    for name in FIELD_TYPES:
        section, field = name.split(".")
        part = configuration.partition(f"### [{section}]")[2].partition("\n### ")[0]
        row = re.search(rf"^\| `{field}` \|.*\| (.+) \|$", part, re.MULTILINE)
        assert row, f"{name} has no row, or no docstring in ucm/config.py"
    metrics = (DOCS / "metrics.md").read_text()
    for spec in METRICS:
        assert f"| `{spec.name}` |" in metrics


def test_metrics_that_the_text_names_exist() -> None:
    names = {spec.name for spec in METRICS}
    assert set(re.findall(r"ucm_[a-z_]+", (DOCS / "metrics.md").read_text())) <= names


def test_settings_that_the_text_names_exist() -> None:
    text = (DOCS / "configuration.md").read_text()
    variables = {env_name(name) for name in FIELD_TYPES}
    assert set(re.findall(r"UCM_[A-Z_]+[A-Z]\b(?==)", text)) <= variables
    assert set(re.findall(r"\b(?:service|memory|nvme|log)\.[a-z_]+", text)) <= set(FIELD_TYPES)
    assert str(MAX_PATH_BYTES) in text
    assert f"{FOLDER_MODE:04o}" in text


def test_a_table_without_its_comments_is_an_error() -> None:
    with pytest.raises(ValueError, match="begin"):
        with_table("no comments", "metrics", "")


def test_the_example_unit_is_a_unit_of_ours() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # keys keep their case
    unit.read(Path(DOCS / "examples" / "ucm.service"))
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert " ucm serve --socket " in service["ExecStart"]
    assert service["RuntimeDirectoryMode"] == f"{FOLDER_MODE:04o}"
