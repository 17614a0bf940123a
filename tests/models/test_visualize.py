"""Pictures of plans: one panel per stage, the right colours at the right patches."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from pm_models import CompressionPlan, StagePlan
from pm_models.visualize import plan_figure

KEPT, MERGED, PRUNED = (to_rgb(colour) for colour in ("#2a9d8f", "#e9c46a", "#3d405b"))


def test_colours_and_outlines():
    #  kept, merged, pruned / merged, kept, kept: three segments
    stage = StagePlan(1, 2, (0, 0, -1, 1, 1, 2), (1.0, 0.5, 0.0, 0.2, 1.0, 1.0))
    figure = plan_figure(CompressionPlan((2, 3), 4, 1, (stage,)))
    (panel,) = figure.axes
    assert panel.get_title() == "blocks 1 to 2: 4 of 7 tokens"
    tint = panel.images[0].get_array()[..., :3]
    expected = np.array([[KEPT, MERGED, PRUNED], [MERGED, KEPT, KEPT]])
    np.testing.assert_allclose(tint, expected, atol=1e-6)
    outlines = {tuple(map(tuple, segment)) for segment in panel.collections[0].get_segments()}
    assert outlines == {
        ((2, 0), (2, 1)),  # merged | pruned
        ((2, 1), (2, 2)),  # kept | kept below
        ((0, 1), (1, 1)),
        ((1, 1), (2, 1)),
        ((2, 1), (3, 1)),
    }


@pytest.mark.parametrize("image", [None, np.random.default_rng(0).random((28, 20, 3)), np.zeros((28, 20))])
def test_saves_as_a_picture(tmp_path, image):
    plan = CompressionPlan.from_scores(torch.rand(5, 35), (7, 5), 0.5, 0.2)
    figure = plan_figure(plan, image)
    figure.savefig(tmp_path / "plan.png", dpi=50)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert sum(bool(panel.images) for panel in figure.axes) == 5


def test_a_plan_without_stages_is_an_empty_picture(tmp_path):
    plan_figure(CompressionPlan((2, 3), 4, 1, ())).savefig(tmp_path / "plan.png", dpi=20)
