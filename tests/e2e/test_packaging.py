"""The distribution, three ways: an editable install, a plain install, a wheel from the sdist."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROBE = (
    "import ucm, ucm.api, ucm.storage.tier, ucm.protos.cache_pb2, ucm.engine.hook, ucm.cli; "
    "import ucm.storage.tier as tier; print(tier.__file__)"
)
pytestmark = pytest.mark.timeout(180)


def run(*command: str, env: dict[str, str] | None = None) -> str:
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**os.environ, **(env or {})},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(out), str(ROOT))
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--disable-pip-version-check", "-w", str(out), str(sdist)),
    )
    (path,) = out.glob("*.whl")
    return path


def test_sdist_holds_each_file_once(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert sum(name.endswith("/tier.py") for name in names) == 1
    assert any(name.endswith("/protos/cache.proto") for name in names)


def test_wheel_from_sdist_has_one_top_level_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/", 1)[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ucm"}
    assert "ucm/storage/tier.py" in names
    assert "ucm/protos/cache.proto" in names
    assert "ucm/py.typed" in names
    assert {"ucm/kernels/cuda/xxh3.cuh", "ucm/kernels/cuda/slab_checksum.cu"} <= set(names)


def test_plain_install_imports_from_where_it_was_put(wheel: Path, tmp_path: Path) -> None:
    run(
        *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)),
        *("--disable-pip-version-check", str(wheel)),
    )
    found = run(sys.executable, "-c", PROBE, env={"PYTHONPATH": str(tmp_path)})
    assert Path(found.strip()).is_relative_to(tmp_path)
    script = run(sys.executable, "-m", "ucm.cli", "--help", env={"PYTHONPATH": str(tmp_path)})
    assert "serve" in script


def test_editable_install_imports_the_checkout() -> None:
    found = run(sys.executable, "-c", PROBE)
    assert Path(found.strip()).resolve() == ROOT / "storage" / "tier.py"
