"""The benchmarks' opponents against their papers' definitions, written out."""

import math

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


@pytest.mark.parametrize("energy", [0.5, 0.9, -0.2], ids="margin{}".format)
@pytest.mark.parametrize("r", [1, 3, 5])
def test_the_patches_of_high_energy_merge_in_pairs(r, energy):
    """PiToMe's definition, patch by patch: 11 patches after a class token."""
    metric = torch.randn(3, 12, 3)
    matching = peers.match_energetic(metric, r, energy)
    for image in range(3):
        similar = {
            (i, j): torch.cosine_similarity(metric[image, i], metric[image, j], dim=0).item()
            for i in range(1, 12)
            for j in range(1, 12)
        }
        energies = {}
        for i in range(1, 12):
            values = [similar[i, j] for j in range(1, 12)]
            energies[i] = sum(s if s >= energy else math.exp(s - energy) - 1 for s in values) / 11
        order = sorted(energies, key=energies.get, reverse=True)
        sources, receiving = order[: 2 * r : 2], order[1 : 2 * r : 2]
        assert pairs_of(matching, image) == {(i, max(receiving, key=lambda j: similar[i, j])) for i in sources}
        assert matching.receiving[image, :, 0].tolist() == receiving
        assert matching.kept[image, :, 0].tolist() == [0, *sorted(order[2 * r :])]
        best = {i: max(order[1::2], key=lambda j: similar[i, j]) for i in order[::2]}
        edges = sorted(best.items(), key=lambda edge: similar[edge], reverse=True)[:r]
        assert pairs_of(peers.match_by_rank(metric, r, energy), image) == set(edges)


@pytest.mark.parametrize("patches", [4, 11, 12])
def test_the_smaller_half_merges_into_the_larger(patches):
    metric, sizes = torch.randn(3, patches + 1, 4), torch.randint(1, 4, (3, patches + 1)).float()
    r = patches // 2 - 1
    matching = peers.match_by_size(metric, sizes, r)
    for image in range(3):
        order = sorted(range(1, patches + 1), key=lambda i: (sizes[image, i].item(), i % 2, i))
        small, large = order[: patches // 2], sorted(order[patches // 2 :])
        assert max(sizes[image, small]) <= min(sizes[image, large])
        proposals = []
        for i in small:
            likeness = {j: torch.cosine_similarity(metric[image, i], metric[image, j], dim=0).item() for j in large}
            best = max(likeness, key=likeness.get)
            proposals.append((likeness[best], i, best))
        assert pairs_of(matching, image) == {(i, j) for _, i, j in sorted(proposals, reverse=True)[:r]}
        merged = {i for i, _ in pairs_of(matching, image)}
        assert matching.kept[image, :, 0].tolist() == [0, *(i for i in sorted(small) if i not in merged)]


ROUNDS = {
    "tome": lambda tokens, r: peers.match(tokens.x, r),
    "pitome": lambda tokens, r: peers.match_energetic(tokens.x, r, 0.4),
    "pitome_by_rank": lambda tokens, r: peers.match_by_rank(tokens.x, r, 0.4),
    "atm": lambda tokens, r: peers.match_by_size(tokens.x, tokens.sizes.squeeze(-1), r),
}


@pytest.mark.parametrize("method", ROUNDS)
def test_merged_tokens_are_the_means_of_their_members(method):
    """Three rounds of merging: which tokens are in which is followed by merging the identity alike.

    In the full map every token has what the matrix of members gives it.
    """
    x = torch.randn(2, 17, 6, dtype=torch.float64)
    tokens, members = peers.Tokens(x), torch.eye(17).double().expand(2, -1, -1)
    for r in (4, 5, 2):
        matching = ROUNDS[method](tokens, r)
        members = peers.merge_by(matching, members)
        tokens.merge(matching)
    assert tokens.x.shape == (2, 6, 6)
    assert set(members.unique().tolist()) == {0, 1}
    torch.testing.assert_close(members.sum(1), torch.ones(2, 17).double())  # every token is in one
    torch.testing.assert_close(members.sum(2, keepdim=True), tokens.sizes)
    torch.testing.assert_close(tokens.x, members @ x / tokens.sizes)
    torch.testing.assert_close(tokens.x[:, 0], x[:, 0])  # the class token stays as it is
    torch.testing.assert_close(tokens.full_map(), members.mT @ tokens.x, rtol=0, atol=0)
    assert peers.Tokens(x, tracked=False).full_map() is x


def test_attention_is_in_proportion_to_sizes(model):
    """A token of size three is attended to as three tokens are."""
    block, x = model.blocks[0], torch.randn(2, 6, 32)
    sizes = torch.tensor([1.0, 1.0, 3.0, 1.0, 2.0, 1.0])
    repeated = x[:, torch.arange(6).repeat_interleave(sizes.long())]
    ours = peers.attend(block, x, sizes.log().expand(2, 6)).out
    rows = [0, 1, 2, 5, 6, 8]  # one of each token's copies
    torch.testing.assert_close(ours, peers.attend(block, repeated).out[:, rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [peers.tome, peers.evit, peers.dynamic_vit, peers.pitome, peers.atm])
def test_nothing_removed_is_the_dense_model(model, make):
    images = images_for(model)
    setting = 0 if make in (peers.tome, peers.atm) else 1.0
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
    assert tokens_into(peers.atm(model, 13), images) == [197 - 13 * block for block in range(1, 13)]
    kept = [196]
    for _ in range(12):
        kept.append(kept[-1] - int(0.07 * kept[-1]))
    assert tokens_into(peers.pitome(model, 0.93), images) == [count + 1 for count in kept[1:]]
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


@torch.no_grad()
@pytest.mark.parametrize("make", [peers.tome, peers.pitome, peers.atm])
def test_every_patch_gets_the_token_that_it_is_in(make):
    """A model of one merge: the full map against the merged tokens and their members."""
    model = small_vit(depth=1, num_classes=0, global_pool="").double()
    images, setting = images_for(model), 0.7 if make is peers.pitome else 11
    merged, full = make(model, setting)(images), make(model, setting, full_map=True)(images)
    assert full.shape == (3, 36, 32)
    assert merged.shape[1] < 36 - 9
    distances = (full.unsqueeze(2) - merged.unsqueeze(1)).abs().amax(-1)
    assert distances.amin(-1).max() == 0  # each is one of the merged
    assert distances.amin(1).max() == 0  # and each of those is some patch's
    block, x = model.blocks[0], model._pos_embed(model.patch_embed(images))
    attended = peers.attend(block, x)
    sums = (x + attended.out).sum(1)
    sizes = (distances == 0).double().sum(1, keepdim=True)  # how many patches are in each
    before = make(model, setting).blocks[0]
    before.blocks[0].mlp = torch.nn.Identity()
    before.blocks[0].norm2 = torch.nn.Identity()
    before.blocks[0].ls2 = torch.nn.Identity()
    torch.testing.assert_close((sizes @ before(x)).squeeze(1) / 2, sums)  # with x + x for the MLP


@torch.no_grad()
def test_algm_merges_once_more_after_half_of_the_blocks():
    """On a grid of 4 x 6 with a class token: two windows, then five of the 19 tokens, image by image."""
    torch.manual_seed(0)
    dense = small_vit(num_classes=0, global_pool="", depth=4, img_size=(16, 24)).double()
    images = torch.randn(3, 3, 16, 24, dtype=torch.float64)
    found = peers.local_merge(dense, 2, later=5)(images)
    first = peers.local_merge(dense, 2).blocks[0]
    for image in images:
        x = dense.blocks[0](dense._pos_embed(dense.patch_embed(image[None])))
        matching = peers.match_windows(x, first.windows, 2)
        x, whose = peers.merge_by(matching, x), peers.merge_by(matching, torch.eye(25).double()[None])[0]
        assert sorted(whose.sum(1).tolist()) == [1] * 17 + [4, 4]
        x = dense.blocks[1](x / whose.sum(1)[None, :, None])[0]
        matching = peers.match(x[None], 5)
        groups = {j: [j] for j in range(19)}
        for i, j in pairs_of(matching, 0):
            groups[j] += groups.pop(i)
        sizes = whose.sum(1)
        tokens = [sum(x[i] * sizes[i] for i in group) / sum(sizes[i] for i in group) for group in groups.values()]
        merged = dense.norm(dense.blocks[3](dense.blocks[2](torch.stack(tokens)[None])))[0]
        expected = torch.empty(25, 32, dtype=torch.float64)
        for token, group in zip(merged, groups.values(), strict=True):
            for member in group:
                expected[whose[member].bool()] = token
        torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)
        found = found[1:]


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
