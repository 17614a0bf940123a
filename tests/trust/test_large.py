"""Tensors past 2^31 elements, against the same op on a part of them. On a GPU with memory for them."""

import pytest
import torch

from pm_kernels import SparseRows, backend, fused_merge_attention_qkv, token_mix

NEEDED = 40 * 2**30
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < NEEDED, reason="needs 40 GiB of GPU memory"
)


def test_attention_of_many_images():
    """(B, N, 3, H, d) of more than 2^31 elements: the last images are what they are alone."""
    images = 2**31 // (197 * 3 * 6 * 64) + 2
    qkv = torch.randn(images, 197, 3, 6, 64, device="cuda", dtype=torch.float16)
    assert qkv.numel() > 2**31
    with backend("triton"), torch.inference_mode():
        out = fused_merge_attention_qkv(qkv)
        assert torch.equal(out[-2:], fused_merge_attention_qkv(qkv[-2:].clone()))
        assert torch.equal(out[:2], fused_merge_attention_qkv(qkv[:2].clone()))


@pytest.mark.parametrize("sparse", [True, False])
def test_mix_of_many_images(sparse):
    images = 2**31 // (197 * 384) + 2
    x = torch.randn(images, 197, 384, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    matrix = torch.eye(197, device="cuda", dtype=torch.float16)[::2].contiguous()
    matrix = SparseRows.from_dense(matrix) if sparse else matrix
    with backend("triton"), torch.inference_mode():
        mixed = token_mix(x, matrix)
        assert torch.equal(mixed[-2:], x[-2:, ::2])
        assert torch.equal(mixed[:2], x[:2, ::2])
