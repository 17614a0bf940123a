"""What the transitions of a model move through memory, counted for the bench's report."""

import timm
import torch

from bench.transition import SMALL, traffic
from pm_kernels.mixing_plan import whole_rows
from pm_models import CompressionPlan, compress


def test_transitions_move_little_more_than_they_must():
    """At keep rate 0.6, prune rate 0.1: at most 1.15 times the state once, the next state and the normed rows."""
    torch.manual_seed(0)
    dense = timm.create_model("deit_small_patch16_224")
    smooth = torch.nn.functional.interpolate(torch.rand(12, 1, 4, 4), (14, 14), mode="bilinear").flatten(1)
    per_program = whole_rows(SMALL.width, 2048)["ROWS"]
    for scores in (torch.rand(12, 196), smooth):
        compressed = compress(dense, CompressionPlan.from_scores(scores, (14, 14), 0.6, 0.1)).eval()
        counted = traffic(compressed)
        state = 197
        for record, matrix, tokens in zip(counted, compressed.transitions(), compressed.plan.tokens, strict=True):
            nonzero = matrix.to_dense(state) != 0
            read = sum(int(block.any(0).sum()) for block in nonzero.split(per_program))
            least = state + len(nonzero) + tokens
            assert record["least_rows"] == least
            assert read + len(nonzero) + tokens <= record["moved_rows"] <= 1.15 * least
            state = len(nonzero)
