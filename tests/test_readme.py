"""The README: its tables are the result files', its Python runs."""

import re
from pathlib import Path

import torch
from helpers import images_for, small_vit

import pm_models
from bench import report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_the_result_files():
    assert report.with_tables(README) == README
    assert len([section for section in report.SECTIONS if section.marker]) == README.count(" of bench/results -->") == 5


def test_the_three_lines_compress_a_model():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    model = small_vit(img_size=56, depth=2)
    loader = [(images_for(model, 2), torch.randint(0, 7, (2,))) for _ in range(16)]
    names = {"pm_models": pm_models, "model": model, "loader": loader}
    exec(code, names)
    assert isinstance(names["model"], pm_models.PMVisionTransformer)
    assert names["model"](images_for(model)).shape == (3, 7)
