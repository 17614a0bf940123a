"""The README: its tables and its headline are the result files'."""

from pathlib import Path

from bench import report

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_the_result_files():
    assert report.with_tables(README) == README
    assert README.count(" of bench/results -->") == 4
    assert len(README.splitlines()) <= 150
