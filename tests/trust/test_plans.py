"""Random plans against the rules written out patch by patch, and models of random plans against their equations."""

import copy

import pytest
import torch
from helpers import images_for, small_vit
from hypothesis import assume, given
from hypothesis import strategies as st
from trust.cases import SIDES, plan_options, plans, scores

from pm_models import CompressionPlan, compress

pytestmark = pytest.mark.fuzz


@given(st.data(), SIDES, SIDES, st.integers(1, 5))
def test_a_plan_is_what_the_rules_say(data, height, width, depth):
    options = data.draw(plan_options(depth))
    given_scores = data.draw(scores(depth, (height, width)))
    plan = CompressionPlan.from_scores(given_scores, (height, width), **options)
    assert plan.depth == depth
    prefix, patches = options["num_prefix_tokens"], height * width
    starts = [(index, index) for index in range(depth)] if "stages" not in options else options["stages"]
    assert [(stage.first, stage.last) for stage in plan.stages] == starts
    for stage in plan.stages:
        merge, reconstruct = plan.merge_matrix(stage.first).double(), plan.reconstruct_matrix(stage.first).double()
        mask = plan.token_mask(stage.first)
        tokens = plan.tokens[stage.first]
        assert merge.shape == (tokens, prefix + patches)
        assert all(plan.tokens[index] == tokens for index in range(stage.first, stage.last + 1))
        # Prefix tokens alone; every other token in one row at most, in none exactly where it is pruned.
        assert torch.equal(merge[:prefix, :prefix], torch.eye(prefix, dtype=torch.float64))
        assert (merge[:prefix, prefix:] == 0).all()
        assert (merge[prefix:, :prefix] == 0).all()
        rows_of = (torch.tensor(stage.segments) >= 0).long()
        assert torch.equal(mask[prefix:], rows_of.to(mask))
        assert ((merge != 0).sum(0) <= 1).all()
        assert ((merge != 0).any(0).float() <= mask).all()
        assert torch.isfinite(merge).all()
        assert (merge >= 0).all()
        # The kept patch of a row weighs 1, or its share; merged ones at most as much.
        assert ((merge != 0).any(1)).all()
        if options["row_weights"] == "average":
            torch.testing.assert_close(merge.sum(1), torch.ones(tokens, dtype=torch.float64), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(reconstruct, torch.linalg.pinv(merge), rtol=1e-4, atol=1e-5)
        if options["segments"] == "raster":
            in_order = [segment for segment in stage.segments if segment >= 0]
            assert in_order == sorted(in_order)
    check_rates(plan, given_scores, options)


def check_rates(plan, given_scores, options):
    """As many patches are kept and pruned as the rates say, whatever ties; but every stage keeps one."""
    firsts, patches = [stage.first for stage in plan.stages], plan.num_patches
    rows = given_scores[firsts].double()
    decay = 1 - 0.025 * torch.tensor(firsts)[:, None]
    rows = (rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300) * decay).tolist()
    places = [(-score, layer, patch) for layer, row in enumerate(rows) for patch, score in enumerate(row)]
    alone = [places[layer * patches :][:patches] for layer in range(len(rows))]
    kept, pruned = [set() for _ in rows], [set() for _ in rows]
    for ranking in map(sorted, [places] if options["allocation"] == "global" else alone):
        layers = len(ranking) // patches
        highest, lowest = (int(patches * options[rate]) * layers for rate in ("keep_rate", "prune_rate"))
        for place, (_, layer, patch) in enumerate(ranking):
            if place < highest:
                kept[layer].add(patch)
            elif place >= len(ranking) - lowest:
                pruned[layer].add(patch)
    for stage, row, leaders, skipping in zip(plan.stages, rows, kept, pruned, strict=True):
        leaders = leaders or {row.index(max(row))}
        assert {patch for patch, segment in enumerate(stage.segments) if segment == -1} == skipping - leaders
        assert stage.merged_patches == len(leaders)
        assert {stage.segments[patch] for patch in leaders} == set(range(len(leaders)))


@given(plans())
def test_a_plan_is_a_value(plan):
    again = CompressionPlan.from_dict(plan.to_dict())
    assert again == plan
    assert hash(again) == hash(plan)
    assert copy.deepcopy(plan) == plan
    height, width = plan.grid
    larger = plan.resize((height + 3, width + 2))
    assert larger.grid == (height + 3, width + 2)
    spans = [[(stage.first, stage.last) for stage in found.stages] for found in (larger, plan)]
    assert spans[0] == spans[1]
    for stage in larger.stages:
        assert 1 <= stage.merged_patches <= larger.num_patches


@given(
    plans(most_blocks=3, most_side=6),
    st.sampled_from(["support", "dense", None]),
    st.sampled_from(["pruned", "all"]),
    st.sampled_from(["block", "attention"]),
    st.sampled_from(["token", "avg", ""]),
    st.booleans(),
)
def test_a_model_folds_exactly(plan, train_matrices, shortcut, merge_site, pool, size_bias):
    """Folded is literal, with its gradients, and an image's logits do not depend on the others of its batch."""
    prefix = plan.num_prefix_tokens
    assume(pool != "token" or prefix > 0)
    height, width = plan.grid
    torch.manual_seed(0)
    dense = small_vit(
        img_size=(4 * height, 4 * width), depth=plan.depth, embed_dim=16, global_pool=pool, class_token=prefix > 0,
        reg_tokens=max(prefix - 1, 0), num_classes=3,
    ).double()  # fmt: skip
    model = compress(
        dense, plan, train_matrices=train_matrices, shortcut=shortcut, merge_site=merge_site, size_bias=size_bias
    )
    with torch.no_grad():
        for parameter in model.stages.parameters():
            if train_matrices == "support":
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    images = images_for(model).double()
    found = []
    for execution in ("folded", "literal"):
        model.execution = execution
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        out = model(images)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        found.append([out, *torch.autograd.grad(out, parameters, upstream, materialize_grads=True, allow_unused=True)])
    for folded, literal in zip(*found, strict=True):
        torch.testing.assert_close(folded, literal, rtol=1e-8, atol=1e-8)
    model.execution = "folded"
    with torch.inference_mode():
        together = model(images)
        for index in range(len(images)):
            torch.testing.assert_close(model(images[index : index + 1])[0], together[index], rtol=1e-10, atol=1e-10)
