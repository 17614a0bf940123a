"""The wheel that users install: what it holds, and that the packages and the command run from it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "results")
# Run in a process of its own: the script that pip wrote for pm-vit, then where the packages came from.
RUNS = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
import pm_kernels, pm_models
from importlib.metadata import version
print(pm_kernels.__file__, pm_models.__file__, version("pm-vit"), sep="\\n")
"""


def run(*words, **options):
    return subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True, **options).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by the setuptools that are here, so without a network, from a copy: a build leaves folders behind."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    run("-c", "from setuptools import build_meta; build_meta.build_wheel('..')", cwd=folder / "source")
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_the_packages_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = ("pm_kernels", "pm_models")
    shipped = (".py", ".yaml", ".html", "py.typed")
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.name.endswith(shipped)
    }
    assert {"pm_kernels/py.typed", "pm_models/py.typed", "pm_models/recipes/deit_small.yaml"} < wanted
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert sum(name.endswith(".dist-info/licenses/LICENSE") for name in names) == 1


def test_it_runs_where_it_is_installed(wheel, tmp_path):
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    script = tmp_path / "site" / "bin" / "pm-vit"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    *shown, kernels, models, version = run("-c", RUNS, script, cwd=tmp_path, env=environment).splitlines()
    assert shown[0].startswith("usage: pm-vit")
    assert [kernels, models] == [str(tmp_path / "site" / name / "__init__.py") for name in ("pm_kernels", "pm_models")]
    assert wheel.name.startswith(f"pm_vit-{version}-")
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
