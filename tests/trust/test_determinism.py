"""The same bits in every run, alone and in a batch, with PyTorch's deterministic algorithms asked for."""

import copy

import pytest
import torch
from helpers import ON_KERNELS, images_for, plan_for, skip_without_kernels, small_vit

from pm_kernels import SparseRows, backend, fused_merge_attention, transition
from pm_models import compress

pytestmark = [pytest.mark.fuzz, *ON_KERNELS]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def attention(images):
    """Outputs and the gradients of what belongs to an image, of all images' packed projections."""
    torch.manual_seed(1)
    merge, bias = torch.rand(9, 21, device=DEVICE), torch.randn(9, device=DEVICE)
    qkv = images.detach().requires_grad_()
    q, k, v = qkv.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
    out = fused_merge_attention(q, k, v, merge, key_bias=bias)
    return out, torch.autograd.grad(out.square().sum(), qkv)[0]


def mixes(images):
    torch.manual_seed(1)
    width = images.shape[-1]
    matrix = torch.rand(15, 21, device=DEVICE) * (torch.rand(15, 21, device=DEVICE) < 0.2)
    norm = torch.randn(width, device=DEVICE), torch.randn(width, device=DEVICE), 1e-6
    found = []
    for kind in (SparseRows.from_dense(matrix), matrix + 0.1):
        x = images.detach().requires_grad_()
        y, rest, normed = transition(x[:, :16], x[:, 16:], kind, 10, norm=norm)
        total = y.square().sum() + rest.square().sum() + normed.pow(3).sum()
        found += [y, rest, normed, torch.autograd.grad(total, x)[0]]
    return found


@pytest.mark.parametrize("run", [attention, mixes])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("deterministic")
def test_kernels_give_the_same_bits(run, dtype):
    skip_without_kernels()
    images = torch.randn(5, 21, 96, device=DEVICE)
    with backend("triton"):
        together = run(images)
        for again in (run(images), run(images.clone())):
            assert all(torch.equal(first, second) for first, second in zip(together, again, strict=True))
        for index in range(5):
            for alone, whole in zip(run(images[index : index + 1]), together, strict=True):
                assert torch.equal(alone[0], whole[index])
        for alone, whole in zip(run(images[1:4]), together, strict=True):
            assert torch.equal(alone, whole[1:4])


@pytest.mark.parametrize("kind", [{"train_matrices": "dense"}, {"shortcut": "all", "size_bias": True}, {}])
@pytest.mark.usefixtures("deterministic")
def test_models_do_the_same_in_every_run(kind):
    dense = small_vit(depth=3).to(DEVICE)
    model = compress(dense, plan_for(dense), **kind)
    images = images_for(model).to(DEVICE)
    found = []
    for _ in range(2):
        trained = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            trained(images).square().sum().backward()
            optimizer.step()
        with torch.inference_mode():
            found.append([trained.eval()(images), *trained.state_dict().values()])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_threads_and_batches_change_rounding_at_most():
    """PyTorch's own products may round otherwise for another batch or number of threads; nothing more may change."""
    dense = small_vit(depth=3)
    model = compress(dense, plan_for(dense))
    images = torch.randn(8, *images_for(model).shape[1:])
    threads = torch.get_num_threads()
    try:
        with torch.inference_mode():
            torch.set_num_threads(1)
            one = model(images)
            torch.set_num_threads(2)
            torch.testing.assert_close(model(images), one, rtol=1e-5, atol=1e-5)
            alone = torch.cat([model(image[None]) for image in images])
            torch.testing.assert_close(alone, one, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(threads)
