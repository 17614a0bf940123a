"""The transition under pytest-benchmark: ``pytest bench/ --benchmark-only``; device time is ``bench.transition``'s."""

from functools import partial

import pytest
import torch

from .transition import BLOCK, WIDTH, Boundary, constants_of, embedding_bag, matmul, model, ours, work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUNCTIONS = {"ours": ours, "matmul": matmul, "embedding_bag": embedding_bag}


@pytest.fixture(scope="module")
def compressed():
    return model()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("case", ["forward", "backward"])
def test_transition(benchmark, compressed, case, name):
    batch, dtype = (256, torch.bfloat16) if DEVICE == "cuda" else (8, torch.float32)
    constants = constants_of(compressed, dtype, DEVICE)
    tokens, rows = compressed.plan.tokens[BLOCK - 1], len(constants.folded.starts)
    carried = len(constants.folded.by_column.starts) - tokens

    def random(*shape):
        return torch.randn(*shape, device=DEVICE, dtype=dtype)

    parts = [random(batch, count, WIDTH) for count in (tokens, tokens, carried)]
    given = Boundary(*parts, constants.folded.values, random(WIDTH), random(WIDTH))
    counts = (constants.rows, rows - constants.rows, constants.rows)
    function = work(case, partial(FUNCTIONS[name], case, constants), given, [random(batch, n, WIDTH) for n in counts])

    def call():
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"transition/{case}"
    benchmark.extra_info.update(batch=batch, width=WIDTH, dtype=str(dtype), device=DEVICE, torch=torch.__version__)
    benchmark.pedantic(call, warmup_rounds=2, rounds=10)
