"""Whole-model inference under pytest-benchmark: ``pytest bench/ --benchmark-only``."""

import pytest
import torch

from .models import compared_models


@pytest.fixture(scope="session")
def models():
    return compared_models("deit_small_patch16_224")


@pytest.mark.parametrize("name", ["dense_eager", "folded", "literal", "ideal"])
@pytest.mark.parametrize("batch", [1, 8])
def test_deit_small_inference(benchmark, models, batch, name):
    images = torch.randn(batch, 3, 224, 224)
    benchmark.group = f"deit_small/inference/b{batch}-float32"
    benchmark.extra_info.update(shape=list(images.shape), dtype="float32", torch=torch.__version__)
    with torch.inference_mode():
        benchmark.pedantic(models[name], args=(images,), warmup_rounds=2, rounds=10)
