"""Models compiled before the first request."""

import pytest
import torch
from helpers import images_for, plan_for, small_vit

from pm_models import compress, warmup


@pytest.mark.fuzz
@pytest.mark.exhaustive
def test_no_batch_is_compiled_for_twice():
    model = small_vit(depth=2)
    model = compress(model, plan_for(model)).train()
    serve = warmup(model, (4, 1))
    assert not model.training
    images = images_for(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (1, 3, 2, 7):
            batch = images[:1].expand(count, -1, -1, -1) + torch.randn(count, 1, 1, 1)
            logits = serve(batch)
            assert not logits.requires_grad
            with torch.inference_mode():
                torch.testing.assert_close(logits, model(batch), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("batch_sizes", [(), (0, 4)])
def test_batch_sizes_are_checked(batch_sizes):
    with pytest.raises(ValueError, match="batch_sizes must be at least one number, each at least 1"):
        warmup(small_vit(), batch_sizes)
