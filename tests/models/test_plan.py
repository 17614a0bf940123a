"""Plans from scores against the rules written out patch by patch, their matrices, files and errors."""

import json
import math

import pytest
import torch

from pm_models import CompressionPlan, StagePlan


def written_out(scores, grid, keep_rate, prune_rate, layer_decay):
    """Section 3's rules with Python loops: per layer (kept, pruned, {kept patch: members})."""
    layers, patches, width = len(scores), grid[0] * grid[1], grid[1]
    decayed = []
    for layer, row in enumerate(scores.tolist()):
        norm = math.sqrt(sum(score * score for score in row))
        decayed.append([score / norm * (1 - layer_decay * layer) for score in row])
    everything = sorted(score for row in decayed for score in row)
    prune_threshold = everything[int(patches * prune_rate) * layers]
    keep_count = int(patches * keep_rate) * layers
    keep_threshold = everything[-keep_count] if keep_count else math.inf
    result = []
    for row in decayed:
        kept = [patch for patch in range(patches) if row[patch] >= keep_threshold]
        kept = kept or [max(range(patches), key=row.__getitem__)]
        pruned = {patch for patch in range(patches) if row[patch] < prune_threshold} - set(kept)
        segments, left = {}, 0
        for position, patch in enumerate(kept):
            right = patches
            if position + 1 < len(kept):
                right = math.ceil((patch + kept[position + 1]) / 2)
                right = min(right, (math.floor((patch + 1) / width) + 1) * width)
            segments[patch] = [member for member in range(left, right) if member not in pruned]
            left = right
        result.append((decayed, kept, pruned, segments))
    return result


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (5, 3), (4, 9), (14, 14)])
@pytest.mark.parametrize("rates", [(0.6, 0.1), (0.3, 0.7), (1.0, 0.0), (0.01, 0.0), (0.05, 0.9), (0.5, 0.5)])
def test_matrices_follow_the_rules(grid, rates, prefix):
    keep, prune = rates
    scores = torch.rand(3, grid[0] * grid[1], dtype=torch.float64).square()
    plan = CompressionPlan.from_scores(scores, grid, keep, prune, num_prefix_tokens=prefix)
    for layer, (decayed, kept, pruned, segments) in enumerate(written_out(scores, grid, keep, prune, 0.025)):
        merge = torch.zeros(prefix + len(kept), prefix + grid[0] * grid[1], dtype=torch.float64)
        merge[:prefix, :prefix] = torch.eye(prefix)
        for row, patch in enumerate(kept):
            for member in segments[patch]:
                merge[prefix + row, prefix + member] = decayed[layer][member] / decayed[layer][patch]
        mask = torch.tensor([1.0] * prefix + [0.0 if patch in pruned else 1.0 for patch in range(len(decayed[layer]))])
        assert plan.tokens[layer] == len(merge)
        torch.testing.assert_close(plan.merge_matrix(layer), merge.float())
        torch.testing.assert_close(plan.token_mask(layer), mask)
        torch.testing.assert_close(
            plan.reconstruct_matrix(layer), torch.linalg.pinv(merge).float(), rtol=1e-5, atol=1e-6
        )
        sizes = torch.tensor([1.0] * prefix + [float(len(segments[patch])) for patch in kept])
        torch.testing.assert_close(plan.token_sizes(layer), sizes)


def test_allocation_per_layer_applies_the_rates_in_every_layer():
    scores = torch.rand(4, 100) * torch.tensor([[1.0], [2.0], [0.1], [5.0]]) ** 3
    plan = CompressionPlan.from_scores(scores, (10, 10), 0.6, 0.1, allocation="layer", num_prefix_tokens=0)
    assert plan.tokens == (60, 60, 60, 60)
    assert [stage.pruned_patches for stage in plan.stages] == [10, 10, 10, 10]


def half_zeros():
    return torch.rand(4, 100) * (torch.arange(100) % 2)


TIED = {
    "half-zeros": half_zeros,
    "all-equal": lambda: torch.ones(4, 100),
    "all-zeros": lambda: torch.zeros(4, 100),
    "three-values": lambda: torch.randint(0, 3, (4, 100)).float(),
    "layers-of-zeros": lambda: torch.rand(4, 100) * torch.tensor([[0.0], [1.0], [0.0], [1.0]]),
}


@pytest.mark.parametrize("row_weights", ["sum", "average"])
@pytest.mark.parametrize("allocation", ["global", "layer"])
@pytest.mark.parametrize("scores", TIED)
@pytest.mark.parametrize("rates", [(0.6, 0.1), (0.25, 0.7), (0.5, 0.5), (1.0, 0.0), (0.02, 0.9)])
def test_rates_hold_where_scores_are_equal(rates, scores, allocation, row_weights):
    plan = CompressionPlan.from_scores(TIED[scores](), (10, 10), *rates, allocation=allocation, row_weights=row_weights)
    kept = torch.tensor([stage.merged_patches for stage in plan.stages])
    pruned = torch.tensor([stage.pruned_patches for stage in plan.stages])
    keep, prune = (int(100 * rate) for rate in rates)
    if allocation == "layer":
        assert kept.tolist() == 4 * [keep]
        assert pruned.tolist() == 4 * [prune]
    else:
        # A layer that ranks below all that is kept keeps one patch, which may be one that would be pruned.
        forced = int(kept.sum()) - 4 * keep
        assert 0 <= forced <= int((kept == 1).sum())
        assert 4 * prune - forced <= int(pruned.sum()) <= 4 * prune
    for block in range(4):
        merge, reconstruct = plan.merge_matrix(block).double(), plan.reconstruct_matrix(block).double()
        torch.testing.assert_close(reconstruct, torch.linalg.pinv(merge), rtol=1e-4, atol=1e-5)
        if row_weights == "average":
            torch.testing.assert_close(merge.sum(dim=1), torch.ones(len(merge)).double())


def test_of_equal_scores_the_earlier_is_the_higher():
    """All alike but for the decay: the first layers keep all they have, and in a layer the first patches."""
    plan = CompressionPlan.from_scores(torch.ones(4, 10), (2, 5), 0.4, 0.3)
    stages = [(stage.merged_patches, stage.pruned_patches) for stage in plan.stages]
    assert stages == [(10, 0), (6, 0), (1, 2), (1, 9)]
    assert plan.stages[1].segments == (0, 1, 2, 3, 4, 5, 5, 5, 5, 5)
    assert plan.stages[2].segments == (0, 0, 0, 0, 0, 0, 0, 0, -1, -1)
    assert plan.stages[2].weights == 8 * (1.0,) + (0.0, 0.0)
    for allocation in ("global", "layer"):
        even = CompressionPlan.from_scores(torch.ones(1, 10), (2, 5), 0.4, 0.3, allocation=allocation)
        assert even.stages[0].segments == (0, 1, 2, 3, 3, 3, 3, -1, -1, -1)


@pytest.mark.parametrize("row_weights", ["sum", "average"])
@pytest.mark.parametrize("scores", TIED)
def test_another_grid_keeps_the_shares_of_equal_scores(scores, row_weights):
    plan = CompressionPlan.from_scores(
        TIED[scores](), (10, 10), 0.5, 0.2, allocation="layer", row_weights=row_weights
    ).resize((20, 15))
    assert [(stage.merged_patches, stage.pruned_patches) for stage in plan.stages] == 4 * [(150, 60)]
    for block in range(4):
        assert plan.reconstruct_matrix(block).isfinite().all()


def test_average_rows_sum_to_one_in_the_same_segments():
    scores = torch.rand(2, 35)
    by_sum = CompressionPlan.from_scores(scores, (7, 5), 0.4, 0.2)
    average = CompressionPlan.from_scores(scores, (7, 5), 0.4, 0.2, row_weights="average")
    for block in range(2):
        merge = by_sum.merge_matrix(block)
        torch.testing.assert_close(average.merge_matrix(block), merge / merge.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("grid", [(7, 5), (1, 9), (9, 1), (4, 4)])
def test_nearest_segments(grid):
    height, width = grid
    scores = torch.rand(3, height * width)
    raster = CompressionPlan.from_scores(scores, grid, 0.3, 0.2)
    nearest = CompressionPlan.from_scores(scores, grid, 0.3, 0.2, segments="nearest")
    assert nearest.tokens == raster.tokens
    moved = 0
    for block, (stage, other) in enumerate(zip(nearest.stages, raster.stages, strict=True)):
        assert [s == -1 for s in stage.segments] == [s == -1 for s in other.segments]
        kept = [
            next(p for p, (s, w) in enumerate(zip(other.segments, other.weights, strict=True)) if s == t and w == 1)
            for t in range(stage.merged_patches)
        ]
        for patch, (segment, weight) in enumerate(zip(stage.segments, stage.weights, strict=True)):
            if segment == -1:
                continue
            row, column = divmod(patch, width)
            distances = [(row - k // width) ** 2 + (column - k % width) ** 2 for k in kept]
            assert segment == distances.index(min(distances))
            assert weight == pytest.approx(float(scores[block, patch] / scores[block, kept[segment]]))
            moved += segment != other.segments[patch]
    assert moved or min(grid) == 1


@pytest.mark.parametrize("row_weights", ["sum", "average"])
@pytest.mark.parametrize("grid", [(14, 10), (5, 3), (9, 13), (1, 35)])
def test_another_grid_keeps_the_shares(grid, row_weights):
    plan = CompressionPlan.from_scores(
        torch.rand(4, 35), (7, 5), 0.4, 0.3, num_prefix_tokens=2, row_weights=row_weights, stages=[(0, 1), (3, 3)]
    )
    resized = plan.resize(grid)
    patches = grid[0] * grid[1]
    assert (resized.grid, resized.depth, resized.num_prefix_tokens) == (grid, 4, 2)
    for stage, old in zip(resized.stages, plan.stages, strict=True):
        assert (stage.first, stage.last) == (old.first, old.last)
        assert stage.merged_patches == round(old.merged_patches * patches / 35)
        assert stage.pruned_patches == round(old.pruned_patches * patches / 35)
    sums = resized.merge_matrix(0)[2:].sum(dim=1)
    assert torch.allclose(sums, torch.ones_like(sums)) == (row_weights == "average")
    assert resized.resize(grid) is resized


def test_a_finer_grid_keeps_what_was_kept_where_it_was():
    """Twice as fine, each patch of a checkerboard is four: the inner ones do as it did."""
    board = torch.arange(64).view(8, 8)
    kept = ((board // 16 + board % 8 // 2) % 2).bool()  # squares of 2 x 2
    plan = CompressionPlan.from_scores(torch.where(kept, 1.0, 0.01).view(1, 64), (8, 8), 0.5, 0.0)
    finer = plan.resize((16, 16))
    centre = {
        (segment, weight) for segment, weight in zip(finer.stages[0].segments, finer.stages[0].weights, strict=True)
    }
    assert finer.stages[0].merged_patches == 128
    heads = torch.tensor(finer.stages[0].weights).view(16, 16) == 1
    wanted = kept.repeat_interleave(2, 0).repeat_interleave(2, 1)
    inner = torch.zeros(16, 16, dtype=torch.bool)
    for row in range(1, 16, 4):
        for column in range(1, 16, 4):
            inner[row : row + 2, column : column + 2] = True
    assert (heads[inner] == wanted[inner]).all()
    assert len(centre) > 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (0, 3)}, "grid must be two positive integers"),
        ({"grid": 7}, "grid must be two positive integers"),
        ({"grid": (7, 6), "segments": "rows"}, "segments must be one of 'raster', 'nearest', got 'rows'"),
    ],
)
def test_bad_grids_to_resize_to(arguments, message):
    plan = CompressionPlan.from_scores(torch.rand(2, 35), (7, 5), 0.4, 0.3)
    with pytest.raises(ValueError, match=message):
        plan.resize(**arguments)


def test_stages_share_the_scores_of_their_first_block():
    scores = torch.rand(6, 35)
    plan = CompressionPlan.from_scores(scores, (7, 5), 0.5, 0.2, stages=[(1, 2), (4, 4)], allocation="layer")
    alone = CompressionPlan.from_scores(scores, (7, 5), 0.5, 0.2, allocation="layer")
    assert plan.tokens == (36, alone.tokens[1], alone.tokens[1], 36, alone.tokens[4], 36)
    torch.testing.assert_close(plan.merge_matrix(2), alone.merge_matrix(1))
    torch.testing.assert_close(plan.merge_matrix(3), torch.eye(36))
    assert plan.stage_of(0) is None


def test_a_layer_of_zeros_keeps_one_patch():
    scores = torch.rand(3, 35)
    scores[1] = 0
    plan = CompressionPlan.from_scores(scores, (7, 5), 0.5, 0.0)
    assert plan.tokens[1] == 2
    assert torch.isfinite(plan.merge_matrix(1)).all()
    assert torch.isfinite(plan.reconstruct_matrix(1)).all()


def test_scores_of_other_kinds_are_the_same_scores():
    scores = torch.rand(2, 12)
    plan = CompressionPlan.from_scores(scores, (3, 4), 0.5, 0.25)
    assert CompressionPlan.from_scores(scores.numpy(), [3, 4], 0.5, 0.25) == plan
    assert CompressionPlan.from_scores(scores.clone().requires_grad_(), (3, 4), 0.5, 0.25) == plan


def test_saving_and_loading(tmp_path):
    plan = CompressionPlan.from_scores(
        torch.rand(4, 35), (7, 5), 0.5, 0.2, num_prefix_tokens=2, stages=[(0, 1), (3, 3)]
    )
    plan.save(tmp_path / "plan.json")
    assert CompressionPlan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_repr_tells_a_person():
    plan = CompressionPlan.from_scores(torch.rand(4, 35), (7, 5), 0.5, 0.2, stages=[(0, 1), (3, 3)], allocation="layer")
    text = repr(plan)
    assert "7 x 5 patches" in text
    assert "  0..1         18      17      11       7" in text
    assert "  2            36      35       0       0" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"scores": torch.rand(2, 36)},
            r"scores must have shape \(L, h\*w\) with h\*w = 35 for grid \(7, 5\), got \(2, 36\)",
        ),
        ({"scores": torch.rand(35)}, r"scores must have shape"),
        ({"scores": torch.rand(0, 35)}, r"scores must have shape"),
        (
            {"scores": torch.full((2, 35), math.nan)},
            r"finite and nonnegative, got NaN, infinite or negative in layer 0",
        ),
        ({"scores": torch.cat([torch.rand(1, 35), -torch.rand(1, 35)])}, r"negative in layer 1"),
        ({"scores": torch.full((1, 35), math.inf)}, r"in layer 0"),
        ({"keep_rate": 0.0}, r"keep_rate must be above 0 and at most 1, got 0.0"),
        ({"keep_rate": math.nan}, r"keep_rate must be above 0"),
        ({"prune_rate": -0.1}, r"prune_rate must be at least 0 and below 1, got -0.1"),
        ({"keep_rate": 0.8, "prune_rate": 0.3}, r"keep_rate \+ prune_rate must be at most 1, got 0.8 \+ 0.3 = 1.1"),
        ({"layer_decay": 1.0}, r"layer_decay must be at least 0 and below 1 / \(L - 1\) = 1 for 2 layers, got 1.0"),
        ({"grid": (7,)}, r"grid must be two positive integers"),
        ({"grid": 7}, r"grid must be two positive integers"),
        ({"grid": (7, -5)}, r"grid must be two positive integers"),
        ({"allocation": "block"}, r"allocation must be one of 'global', 'layer', got 'block'"),
        ({"segments": "rows"}, r"segments must be one of 'raster', 'nearest', got 'rows'"),
        ({"row_weights": "mean"}, r"row_weights must be one of 'sum', 'average', got 'mean'"),
        ({"stages": [(0, 2)]}, r"stages must be \(first, last\) blocks .* within 0..1, got \[\(0, 2\)\]"),
        ({"stages": [(1, 1), (0, 0)]}, r"in order, without overlap"),
        ({"stages": []}, r"stages must name at least one"),
        ({"num_prefix_tokens": -1}, r"num_prefix_tokens must be between 0 and 10000, got -1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    defaults = {"scores": torch.rand(2, 35), "grid": (7, 5), "keep_rate": 0.6, "prune_rate": 0.1}
    with pytest.raises(ValueError, match=message):
        CompressionPlan.from_scores(**(defaults | arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.update(format="something"), "not a compression plan"),
        (lambda plan: plan.update(version=99), "plan version must be 1, got 99"),
        (lambda plan: plan.pop("grid"), "a plan needs the field 'grid'"),
        (lambda plan: plan.update(grid=[3, 5]), "expected one for each of the 15 patches of the 3 x 5 grid"),
        (lambda plan: plan.update(depth="4"), "expected an integer, got '4'"),
        (lambda plan: plan.update(depth=1), "stages must be"),
        (lambda plan: plan.update(stages=7), "wrong type"),
        (lambda plan: plan["stages"][0]["weights"].pop(), "35 segments but 34 weights"),
        (
            lambda plan: plan["stages"][0]["weights"].__setitem__(3, math.nan),
            "weight of patch 3 must be finite, got nan",
        ),
        (lambda plan: plan["stages"][0]["segments"].__setitem__(0, -2), "segments must use every index"),
        (lambda plan: plan["stages"][0]["segments"].__setitem__(0, 99), "segments must use every index"),
        (lambda plan: plan["stages"][0].update(weights=[0.0] * 35), "has only zero weights"),
    ],
)
def test_bad_files_are_refused(tmp_path, change, message):
    values = CompressionPlan.from_scores(torch.rand(2, 35), (7, 5), 0.5, 0.2).to_dict()
    change(values)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        CompressionPlan.load(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "nonsense", "[" * 100_000])
def test_files_that_are_no_json(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match="plan.json"):
        CompressionPlan.load(tmp_path / "plan.json")


def test_pruned_patch_with_a_weight():
    with pytest.raises(ValueError, match=r"stage 0..0: patch 1 is pruned, its weight must be 0, got 0.5"):
        StagePlan(0, 0, (0, -1), (1.0, 0.5))
