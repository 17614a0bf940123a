"""Whether Triton's interpreter works here: a kernel of the tests' own, so that a fault in the package's is no skip."""

import warnings

import torch
import triton
import triton.language as tl


@triton.jit
def _sum(p_x, p_out, count):
    """p_x: (count,), p_out: (1,)."""
    total = 0.0
    for index in range(count):
        total += tl.load(p_x + index)
    tl.store(p_out, total)


def fault() -> str:
    """What the interpreter says where it cannot run a loop of loads; empty where it can."""
    x, out = torch.tensor([1.0, 2.0, 4.0]), torch.zeros(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _sum[(1,)](x, out, len(x))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if out.item() == 7 else f"the sum of 1, 2 and 4 is {out.item():g}"
