"""Result files and the report: what is written, what is told apart, and the script that runs it all on a GPU."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from bench import report, results, tables, trust

ROOT = Path(__file__).parents[1]
COMMITTED = sorted(results.FOLDER.rglob("*.json"))


def test_an_edited_file_is_told_apart(tmp_path):
    path = tmp_path / "new" / "suite.json"
    results.write(path, {"device": "cpu: x"}, [{"case": "a", "ours_ms": 1.25}])
    content, wrong = results.read(path)
    assert not wrong
    assert content["records"] == [{"case": "a", "ours_ms": 1.25}]
    assert content["commit"]
    assert content["torch"]
    path.write_text(path.read_text().replace("1.25", "1.05"))
    assert results.read(path)[1] == results.EDITED


def test_a_record_is_a_line_and_the_layout_does_not_count(tmp_path):
    path, records = tmp_path / "suite.json", [{"kernel": "a", "blocks": {"ROWS": [1, 2]}}, {"kernel": "b"}]
    results.write(path, {"device": "cpu: x"}, records)
    lines = path.read_text().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[-4:-2]] == records
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    content, wrong = results.read(path)
    assert (content["records"], wrong) == (records, "")


FACTS = dict.fromkeys(("device", "threads", "torch", "triton", "timm", "commit", "date"), "x")


def test_another_commits_kernels_are_told_apart(tmp_path, monkeypatch):
    path = tmp_path / "suite.json"
    with monkeypatch.context() as patched:
        patched.setattr(results, "kernels_digest", lambda: "another")
        results.write(path, {}, [])
    assert results.read(path)[1] == results.OTHER_KERNELS
    text = report.origin({**FACTS, "records": [{}]}, results.OTHER_KERNELS)
    assert text.endswith("commit x, x. **This file was measured on other kernels than these.**")


def test_the_commits_of_runs_made_before_are_told():
    records = [{"commit": "b"}, {"commit": "a"}, {"commit": "b"}]
    assert report.origin({**FACTS, "records": records}, "").endswith("commit x, x. The runs in it are of commits a, b.")


def test_what_was_tried_is_counted(monkeypatch):
    monkeypatch.setenv("PM_VIT_CASES", "7")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    records = list(trust.tried(0, "tests/trust/test_plans.py::test_a_plan_is_a_value"))
    assert records == [{"test": "trust.test_plans::test_a_plan_is_a_value", "cases": 7, "passed": True}]


def test_what_is_tried_again_replaces_what_was(tmp_path, monkeypatch):
    path = tmp_path / "trust.json"
    first = [{"test": "a", "cases": 1, "passed": False}, {"versions": "torch 2", "tests": 3, "passed": True}]
    results.write(path, {}, trust.joined(path, first))
    again = {"test": "a", "cases": 2, "passed": True}
    *_, joined = records = trust.joined(path, [again])
    assert len(records) == 2
    assert joined.pop("commit")
    assert joined == again
    with monkeypatch.context() as patched:
        patched.setattr(results, "kernels_digest", lambda: "another")
        assert len(trust.joined(path, [again])) == 1


def test_the_report_tells_what_was_tried():
    errors = {"op": "mix", "dtype": "float16", "ours": 0.00123, "pytorch": 0.00211}
    cases = [{"test": f"trust.test_plans::test_a[{name}]", "cases": 3, "passed": name == "x"} for name in "xy"]
    versions = {"versions": "torch 2.11.0, triton 3.6.0", "tests": 5, "skipped": 1, "passed": True}
    text = tables.trust_tables({"records": [errors, *cases, versions]})
    assert "| mix | float16 | 1.2e-03 | 2.1e-03 |" in text
    assert "| trust.test_plans::test_a | 6 | no |" in text
    assert "| torch 2.11.0, triton 3.6.0 | 5 | 1 | yes |" in text


def test_the_report_sums_up_what_was_tried(tmp_path):
    names = ["test_kernels::test_mixes", "test_kernels::test_attention", "test_kills::test_of_what_comes_next[x]"]
    cases = [{"test": f"trust.{name}", "cases": 1000, "passed": "mixes" not in name} for name in names]
    versions = {"versions": "torch 2.11.0", "tests": 2000, "skipped": 1, "passed": True}
    records = trust.joined(tmp_path / "cpu" / "trust.json", [*cases, versions])
    text = tables.trust_tables({"records": records})
    assert "| random inputs of the kernels, against float64 | 2,000 | no |" in text
    assert "| test_kills | 1,000 | yes |" in text
    assert "| the tests on torch 2.11.0 | 2,000 | yes |" in text


def test_the_digest_is_of_code_not_of_comments(tmp_path, monkeypatch):
    """Of the sources beside the bench folder, without comments, docstrings and layout."""
    (tmp_path / "pm_kernels").mkdir()
    (tmp_path / "bench").mkdir()
    monkeypatch.setattr(results, "__file__", str(tmp_path / "bench" / "results.py"))
    source = tmp_path / "pm_kernels" / "kernel.py"
    source.write_text('"""A kernel."""\n\n\ndef kernel(x):\n    """Doubles."""\n    return 2 * x\n')
    first = results.kernels_digest()
    source.write_text('def kernel(\n    x):  # twice\n    """Twice."""\n    return 2 * x\n')
    assert results.kernels_digest() == first
    source.write_text("def kernel(x):\n    return 3 * x\n")
    assert results.kernels_digest() != first


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(results.FOLDER)))
def test_committed_files_are_as_they_were_written(path):
    content, wrong = results.read(path)
    assert wrong != results.EDITED
    assert content["records"]
    if path.parent.name == "static":
        assert path.read_text(encoding="utf-8") == results.written(content)


def test_the_report_is_that_of_the_files():
    assert (results.FOLDER / "README.md").read_text(encoding="utf-8") == report.whole_report(results.FOLDER) + "\n"
    for device in report.devices():
        for section in report.SECTIONS:
            for picture in section.pictures:
                assert (device / picture.file).exists() == (device / section.file).exists()


def test_plots_are_drawn(tmp_path):
    measured = [section for section in report.SECTIONS if (results.FOLDER / "cpu" / section.file).exists()]
    drawn = [(section, picture) for section in measured for picture in section.pictures if picture.draw]
    assert len(drawn) >= 6
    for section, picture in drawn:
        records = json.loads((results.FOLDER / "cpu" / section.file).read_text())["records"]
        picture.save(records, tmp_path)
        assert (tmp_path / picture.file).read_bytes().startswith(b"\x89PNG")


STAND_IN = """#!/usr/bin/env bash
echo "$0 $*" >> "$CALLS"
[[ "$*" != *attention-* ]] || { echo "no such kernel"; exit 3; }
echo "fine on an H200"
"""


def test_the_gpu_script_survives_a_part_that_fails(tmp_path):
    for name in ("python", "nvidia-smi", "compute-sanitizer"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    done = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", tmp_path / "out"], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "attention: failed (3)" in done.stdout
    assert "model: passed" in done.stdout
    assert (tmp_path / "out" / "attention.log").read_text() == "no such kernel\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{part}.log" for part in ("tests", "attention", "transition", "model", "memcheck", "predicted")
    }
    calls = (tmp_path / "calls").read_text()
    assert calls.count("--results") == 3
    assert f"-m bench.predict h200 --measured {tmp_path / 'out' / 'model.json'}" in calls
