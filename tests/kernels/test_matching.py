"""Which tokens merge, against a loop over images and tokens, and the merge against explicit matrices."""

import math

import pytest
import torch
from covering import REST
from helpers import ON_KERNELS, matched_one_by_one, skip_without_kernels

from pm_kernels import backend, match, match_tokens, merge_segments
from pm_kernels.reference import merges_by_round

pytestmark = ON_KERNELS


@pytest.fixture(params=["reference", "triton"])
def device(request):
    """Where the implementation runs."""
    if request.param == "triton":
        skip_without_kernels()
    with backend(request.param):
        yield "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("root_sizes", [False, True], ids=["sizes", "roots"])
@pytest.mark.parametrize(
    ("tokens", "width", "left", "prefix", "rounds"),
    [
        (1, 3, 1, 0, 2),
        (1, 3, 1, 1, 2),
        (2, 3, 2, 1, 2),
        (3, 5, 2, 1, 1),
        (5, 1, 3, 2, 2),
        (5, 4, 5, 5, 2),
        (17, 5, 9, 1, 2),
        (31, 6, 8, 0, 2),
        (31, 6, 4, 0, 3),
        (31, 6, 31, 0, 1),
        (40, 7, 13, 3, 2),
        (129, 33, 70, 1, 2),
        (33, 5, 3, 1, 40),
        pytest.param(129, 33, 3, 1, 40, marks=REST),
    ],
    ids=lambda value: str(value),
)
def test_matching(device, tokens, width, left, prefix, rounds, root_sizes):
    torch.manual_seed(tokens)
    features = torch.randn(3, tokens, width)
    sizes = torch.randint(1, 6, (3, tokens)).float()
    options = {"num_prefix_tokens": prefix, "rounds": rounds, "root_sizes": root_sizes}
    found = match_tokens(features.to(device), sizes.to(device), left, **options)
    segments, merged = (result.cpu() for result in found)
    expected, expected_sizes = matched_one_by_one(features, sizes, left, prefix, rounds, root_sizes)
    assert segments.dtype == torch.int32
    assert torch.equal(segments, expected)
    assert torch.equal(merged, expected_sizes)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e4])
def test_equal_tokens_merge_by_their_places(device, value):
    features = value * torch.randn(1, 1, 48).expand(2, 30, 48)
    sizes = torch.ones(2, 30)
    segments, _ = match_tokens(features.to(device), sizes.to(device), 12)
    assert torch.equal(segments.cpu(), matched_one_by_one(features, sizes, 12, 1, 2)[0])


def test_what_is_no_number_merges_last(device):
    torch.manual_seed(0)
    features, sizes = torch.randn(2, 21, 8), torch.ones(2, 21)
    features[0, 7] = math.nan
    features[1, 4] = math.inf
    segments = match_tokens(features.to(device), sizes.to(device), 12)[0].cpu()
    assert torch.equal(segments, matched_one_by_one(features, sizes, 12, 1, 2)[0])
    assert (segments[0] == segments[0, 7]).sum() == 1
    assert (segments[1] == segments[1, 4]).sum() == 1


def test_autocast_changes_nothing(device):
    """Tokens close to each other and far from 0, whose distances half precision cannot tell."""
    torch.manual_seed(0)
    features, sizes = 2 + 0.1 * torch.randn(2, 64, 32), torch.ones(2, 64)
    with torch.autocast("cuda" if device == "cuda" else "cpu", torch.bfloat16):
        segments, merged = match_tokens(features.to(device), sizes.to(device), 30)
    expected, expected_sizes = matched_one_by_one(features, sizes, 30, 1, 2)
    assert torch.equal(segments.cpu(), expected)
    assert torch.equal(merged.cpu(), expected_sizes)


def test_shares_of_the_rounds():
    assert merges_by_round(100, 40, 2) == [30, 30]
    assert merges_by_round(100, 41, 2) == [30, 29]
    assert merges_by_round(100, 25, 2) == [49, 26]  # half of 51 is the most that then can go
    assert merges_by_round(7, 1, 3) == [2, 2, 2]
    for patches in range(1, 40):
        for rounds in (1, 2, 3):
            for left in range(max(1, patches >> rounds), patches + 1):
                count = patches
                for merges in merges_by_round(patches, left, rounds):
                    assert 0 <= merges <= count - count // 2
                    count -= merges
                assert count == left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_image_does_not_depend_on_its_batch(device, dtype, request):
    if "triton" in request.node.name and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    torch.manual_seed(0)
    features, sizes = torch.randn(7, 65, 40).to(device, dtype), torch.ones(7, 65, device=device)
    segments, merged = match_tokens(features, sizes, 37)
    for image in range(7):
        alone = match_tokens(features[image : image + 1], sizes[:1], 37)
        assert torch.equal(alone[0][0], segments[image])
        assert torch.equal(alone[1][0], merged[image])


def explicit_means(segments, sizes, tokens):
    """(B, C, N) float64."""
    members = (segments.long().unsqueeze(1) == torch.arange(tokens).unsqueeze(1)) * sizes.double().unsqueeze(1)
    return members / members.sum(dim=2, keepdim=True)


def test_merging_and_its_gradient():
    torch.manual_seed(0)
    x, sizes = torch.randn(3, 33, 10, dtype=torch.float64), torch.randint(1, 9, (3, 33)).double()
    segments, merged = match_tokens(x, sizes, 17, num_prefix_tokens=2)
    matrix = explicit_means(segments, sizes, 17)
    assert torch.allclose(matrix @ x, merge_segments(x, segments, sizes, 17), rtol=0, atol=1e-12)
    assert torch.equal(merged.sum(dim=1), sizes.sum(dim=1))
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: merge_segments(x, segments, sizes, 17), x)


def test_the_sum_and_the_norm_before_a_match(device):
    torch.manual_seed(0)
    x, update, sizes = (tensor.to(device) for tensor in (*torch.randn(2, 2, 29, 12), torch.ones(2, 29)))
    norm = (*torch.randn(2, 12).to(device), 1e-6)
    matching = match(x, sizes, 16, update=update, norm=norm)
    features = torch.nn.functional.layer_norm(x + update, (12,), *norm)
    segments, merged = match_tokens(features, sizes, 16)
    assert torch.equal(matching.segments, segments)
    assert torch.allclose(matching.log_sizes, merged.log(), rtol=0, atol=1e-6)
    dense = explicit_means(segments.cpu(), sizes.cpu(), 16).float()
    assert torch.allclose(matching.matrix.to_dense(29).cpu(), dense, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"features": torch.zeros(2, 9)}, ValueError, r"features must have shape \(B, N, D\), got \(2, 9\)"),
        ({"features": torch.zeros(2, 9, 4).int()}, TypeError, "features must be floating point, got torch.int32"),
        ({"sizes": torch.ones(2, 8)}, ValueError, r"sizes must have shape \(B, N\) = \(2, 9\), got \(2, 8\)"),
        ({"tokens": 2}, ValueError, "tokens must be between 3 and 9, got 2"),
        ({"tokens": 10}, ValueError, "tokens must be between 3 and 9, got 10"),
        ({"tokens": 4.0}, TypeError, "tokens must be a whole number, got float"),
        ({"root_sizes": 1}, TypeError, "root_sizes must be a bool, got int"),
        ({"rounds": 0}, ValueError, "rounds must be at least 1, got 0"),
        ({"num_prefix_tokens": 10}, ValueError, "num_prefix_tokens must be between 0 and 9, got 10"),
    ],
)
def test_what_does_not_fit_is_refused(changed, error, message):
    arguments = {"features": torch.zeros(2, 9, 4), "sizes": torch.ones(2, 9), "tokens": 5} | changed
    with pytest.raises(error, match=message):
        match_tokens(**arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"segments": torch.zeros(2, 9)}, TypeError, "segments must be a tensor of int32 or int64, got torch.float32"),
        ({"segments": torch.zeros(2, 8).int()}, ValueError, r"segments must have shape \(B, N\) = \(2, 9\)"),
        ({"x": torch.zeros(9, 4)}, ValueError, r"x must have shape \(B, N, D\), got \(9, 4\)"),
        ({"tokens": 0}, ValueError, "tokens must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_merged_is_refused(changed, error, message):
    arguments = {
        "x": torch.zeros(2, 9, 4), "segments": torch.zeros(2, 9).int(), "sizes": torch.ones(2, 9), "tokens": 1
    } | changed  # fmt: skip
    with pytest.raises(error, match=message):
        merge_segments(**arguments)
