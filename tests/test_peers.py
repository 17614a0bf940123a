"""The benchmarks' opponents against their papers' definitions, written out."""

import pytest
import timm
import torch
from helpers import images_for, small_vit

from bench import peers
from pm_models import Segmenter
from pm_models.measure import count_gmacs


@pytest.fixture
def model():
    return small_vit(depth=4)


def pairs_of(matching, image):
    """(place of the token that merges, place of the token that takes it in) of one image."""
    merged, receiving = matching.merged[image, :, 0].tolist(), matching.receiving[image, :, 0].tolist()
    return {(i, receiving[j]) for i, j in zip(merged, matching.targets[image, :, 0].tolist(), strict=True)}


@pytest.mark.parametrize("tokens", [2, 3, 12, 17])
def test_matching_is_the_most_similar_pairs(tokens):
    """Each token at an even place but the first with its most similar one at an odd place; the r best pairs merge."""
    metric = torch.randn(3, tokens, 8)
    for r in range((tokens - 1) // 2 + 1):
        matching = peers.match(metric, r)
        for image in range(3):
            pairs = []
            for i in range(2, tokens, 2):
                similarities = [
                    torch.cosine_similarity(metric[image, i], metric[image, j], dim=0).item()
                    for j in range(1, tokens, 2)
                ]
                best = max(range(len(similarities)), key=similarities.__getitem__)
                pairs.append((similarities[best], i, 2 * best + 1))
            expected = {(i, j) for _, i, j in sorted(pairs, reverse=True)[:r]}
            assert pairs_of(matching, image) == expected
            assert matching.receiving[image, :, 0].tolist() == list(range(1, tokens, 2))
            merged = {i for i, _ in expected}
            assert matching.kept[image, :, 0].tolist() == [i for i in range(0, tokens, 2) if i not in merged]


def test_merged_tokens_are_the_means_of_their_members():
    """Three rounds of merging: which tokens are in which is followed by merging the identity alike."""
    x = torch.randn(2, 17, 6, dtype=torch.float64)
    sizes, members = torch.ones(2, 17, 1).double(), torch.eye(17).double().expand(2, -1, -1)
    merged = x
    for r in (4, 5, 2):
        matching = peers.match(merged, r)
        total, members = peers.merge_by(matching, merged * sizes), peers.merge_by(matching, members)
        sizes = peers.merge_by(matching, sizes)
        merged = total / sizes
    assert merged.shape == (2, 6, 6)
    assert set(members.unique().tolist()) == {0, 1}
    torch.testing.assert_close(members.sum(1), torch.ones(2, 17).double())  # every token is in one
    torch.testing.assert_close(members.sum(2, keepdim=True), sizes)
    torch.testing.assert_close(merged, members @ x / sizes)
    torch.testing.assert_close(merged[:, 0], x[:, 0])  # the class token stays as it is


def test_attention_is_in_proportion_to_sizes(model):
    """A token of size three is attended to as three tokens are."""
    block, x = model.blocks[0], torch.randn(2, 6, 32)
    sizes = torch.tensor([1.0, 1.0, 3.0, 1.0, 2.0, 1.0])
    repeated = x[:, torch.arange(6).repeat_interleave(sizes.long())]
    ours = peers.attend(block, x, sizes.log().expand(2, 6)).out
    rows = [0, 1, 2, 5, 6, 8]  # one of each token's copies
    torch.testing.assert_close(ours, peers.attend(block, repeated).out[:, rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [peers.tome, peers.evit, peers.dynamic_vit])
def test_nothing_removed_is_the_dense_model(model, make):
    images = images_for(model)
    setting = 0 if make is peers.tome else 1.0
    with torch.no_grad():
        torch.testing.assert_close(make(model, setting).eval()(images).sort().values, model(images).sort().values,
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


def tokens_into(model, images):
    """Tokens that each block's MLP sees."""
    seen = []
    handles = [
        module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
        for name, module in model.named_modules()
        if name.endswith(".mlp")
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


def test_tokens_of_every_block():
    model = timm.create_model("deit_tiny_patch16_224").eval()
    images = torch.randn(1, 3, 224, 224)
    assert tokens_into(peers.tome(model, 13), images) == [197 - 13 * block for block in range(1, 13)]
    # The class token, 0.7 of the patches rounded up, and one for the rest.
    assert tokens_into(peers.evit(model, 0.7), images) == [197] * 3 + [140] * 3 + [100] * 3 + [72] * 3
    assert tokens_into(peers.dynamic_vit(model, 0.7), images) == [197] * 3 + [138] * 3 + [97] * 3 + [68] * 3


@torch.no_grad()
def test_attentive_tokens_stay_and_the_others_become_their_weighted_sum(model):
    block, x = model.blocks[0], torch.randn(2, 11, 32)
    attended = peers.attend(block, x)
    weights = peers.class_attention(block, attended)
    attention = block.attn
    q, k, _ = attention.qkv(block.norm1(x)).view(2, 11, 3, 2, 16).permute(2, 0, 3, 1, 4)
    expected = torch.softmax(q @ k.mT / 4, dim=-1)[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(weights, expected)
    reduced = peers.keep_attentive(x, weights, 0.35)
    assert reduced.shape == (2, 6, 32)
    for image in range(2):
        order = sorted(range(10), key=lambda i: -float(weights[image, i]))
        torch.testing.assert_close(reduced[image, 0], x[image, 0])
        torch.testing.assert_close(reduced[image, 1:5], x[image, [i + 1 for i in order[:4]]])
        rest = sum(weights[image, i] * x[image, i + 1] for i in order[4:])
        torch.testing.assert_close(reduced[image, 5], rest)


def test_highest_scores_stay():
    x, scores = torch.randn(2, 7, 4), torch.randn(2, 6)
    kept = peers.keep_highest(x, scores, 3)
    for image in range(2):
        order = sorted(range(6), key=lambda i: -float(scores[image, i]))[:3]
        torch.testing.assert_close(kept[image], x[image, [0, *(i + 1 for i in order)]])


@pytest.mark.parametrize(("make", "settings"), [(peers.tome, list(range(9))),
                                                (peers.evit, [n / 20 for n in range(2, 21)])])  # fmt: skip
def test_settings_are_matched_to_gmacs(model, make, settings):
    size = (3, *model.patch_embed.img_size)
    counted = [count_gmacs(make(model, setting), size) for setting in settings]
    for gmacs in (counted[2], 0.5 * (counted[3] + counted[4]) + 1e-9, 0.0, 100.0):
        _, setting = peers.matched(make, model, settings, gmacs)
        distances = [abs(value - gmacs) for value in counted]
        assert distances[settings.index(setting)] == min(distances)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_alike_windows_become_their_mean_and_every_patch_comes_back(count):
    """One image at a time, window by window, on a grid of 4 x 6."""
    torch.manual_seed(0)
    dense = Segmenter(small_vit(num_classes=0, depth=2, img_size=(16, 24)), 5).double().eval()
    model = peers.local_merge(dense, count)
    images = torch.randn(3, 3, 16, 24, dtype=torch.float64)
    encoder = dense.encoder
    for image in images:
        x = encoder.blocks[0](encoder._pos_embed(encoder.patch_embed(image[None])))[0]
        members = [
            [1 + 6 * (2 * row + i) + 2 * column + j for i in (0, 1) for j in (0, 1)]
            for row in range(2)
            for column in range(3)
        ]
        alike = [
            sum(torch.cosine_similarity(x[a], x[b], dim=0) for a in window for b in window).item() for window in members
        ]
        chosen = sorted(range(6), key=lambda index: -alike[index])[:count]
        tokens = [x[0], *(x[members[index]].mean(dim=0) for index in chosen)]
        whose = [[0], *(members[index] for index in chosen)]
        for index in range(6):
            if index not in chosen:
                tokens += [x[token] for token in members[index]]
                whose += [[token] for token in members[index]]
        merged = encoder.blocks[1](torch.stack(tokens)[None])[0]
        full = torch.empty_like(x)
        for token, places in zip(merged, whose, strict=True):
            full[places] = token
        expected = dense.decoder(encoder.norm(full)[None, 1:])[0]
        found = model.patch_logits(image[None])[0].flatten(1).T
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
