"""The numbers that the paper authors' own code computed, where that case lies beside the checkout."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from pm_models import CompressionPlan, compress, load_authors_checkpoint, score_tokens

CASES = Path(__file__).parents[3] / "shared" / "cases"
pytestmark = pytest.mark.skipif(
    not (CASES / "authors_tiny.npz").is_file(), reason="the authors' case is not beside this checkout"
)


@pytest.fixture(scope="module")
def case():
    with np.load(CASES / "authors_tiny.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "config"} | {
            "config": json.loads(str(arrays["config"]))
        }


@pytest.fixture(scope="module")
def dense(case):
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    model = VisionTransformer(**{name: case["config"][name] for name in names})
    model.load_state_dict(torch.load(CASES / "authors_tiny_dense.pth", weights_only=True))
    return model.eval()


@pytest.fixture(scope="module")
def plan(case):
    config = case["config"]
    return CompressionPlan.from_scores(
        case["scores"], (8, 8), config["keep_rate"], config["prune_rate"], config["layer_decay"]
    )


def relative_error(actual, expected):
    return (actual - expected).norm() / expected.norm()


def test_dense_logits(case, dense):
    torch.testing.assert_close(dense(case["images"][0]), case["dense_logits"], rtol=0, atol=1e-5)


def test_scores(case, dense):
    scores = score_tokens(dense, zip(case["images"], case["targets"], strict=True), batches=3)
    torch.testing.assert_close(scores, case["scores"], rtol=1e-4, atol=0)


def test_matrices(case, plan):
    assert list(plan.tokens) == case["tokens"].tolist()
    for block in range(4):
        for name, matrix in (
            ("merge", plan.merge_matrix(block)),
            ("reconstruct", plan.reconstruct_matrix(block)),
            ("token_mask", plan.token_mask(block)),
        ):
            torch.testing.assert_close(matrix, case[f"{name}_{block}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("execution", ["folded", "literal"])
@pytest.mark.parametrize("train_matrices", ["support", "dense"])
def test_compressed_logits_and_gradients(case, dense, plan, train_matrices, execution):
    model = compress(dense, plan, train_matrices=train_matrices)
    model.execution = execution
    logits = model(case["images"][0])
    torch.testing.assert_close(logits, case["compressed_logits"], rtol=0, atol=1e-4)
    loss = F.cross_entropy(logits, case["targets"][0])
    torch.testing.assert_close(loss, case["loss"], rtol=0, atol=1e-5)
    loss.backward()
    for block, stage in enumerate(model.stages.values()):
        for name, rows, columns in (("merge", stage.rows, stage.columns), ("reconstruct", stage.columns, stage.rows)):
            expected = case[f"grad_{name}_{block}"]
            trained = expected if train_matrices == "dense" else expected[rows, columns]
            assert (getattr(stage, name).grad - trained).norm() <= 1e-4 * expected.norm()
    assert relative_error(model.blocks[0].attn.qkv.weight.grad, case["grad_qkv_0"]) <= 1e-4
    assert relative_error(model.pos_embed.grad, case["grad_pos_embed"]) <= 1e-4


@pytest.mark.parametrize("execution", ["folded", "literal"])
def test_tuned_checkpoint(case, plan, execution):
    model = load_authors_checkpoint(CASES / "authors_tiny.pth")
    model.execution = execution
    with torch.no_grad():
        torch.testing.assert_close(model(case["images"][0]), case["tuned_logits"], rtol=0, atol=1e-4)
    # The step that tuned it left the heaviest entry of each column where the plan had it.
    assert [stage.segments for stage in model.plan.stages] == [stage.segments for stage in plan.stages]
