"""A transition with the norm after it, beside what else does the same: deit_small at keep rate 0.6, prune rate 0.1.

    python -m bench.transition

prints the memory traffic of every boundary between two blocks, counted from its matrix. The suite times a boundary in
the middle: the mix with the sum before it and the LayerNorm after it, forward, and with its backward. Peers are the
paper's equations one by one (``literal``), the folded matrix as a product and a norm of PyTorch (``matmul``), the same
compiled, and PyTorch's embedding bag; ``ideal`` is the sum and the norm alone, which a plain ViT has to do too.
On a GPU at batch 256 in bfloat16, on a CPU at batch 8 in float32. The ``segmenter`` cases are those of Segmenter-L's
1601 tokens of width 1024 at keep rate 0.7, at an eighth of the batch.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from pm_kernels import SparseRows, reference, transition
from pm_models import CompressionPlan, PMVisionTransformer, compress
from pm_models.tables import format_table

from . import comparison
from .models import KEEP_RATE, PRUNE_RATE

CASES = ("forward", "backward", "forward-dense", "backward-dense")
SEGMENTER_CASES = ("forward-segmenter", "backward-segmenter")
EPS = 1e-6


class Kind(NamedTuple):
    """The models that boundaries are taken from: ``block`` is the one after the boundary."""

    width: int
    depth: int
    image: int
    keep_rate: float
    batches: int  # the batch is divided by it

    @property
    def block(self) -> int:
        return self.depth // 2


SMALL = Kind(width=384, depth=12, image=224, keep_rate=KEEP_RATE, batches=1)
SEGMENTER = Kind(width=1024, depth=24, image=640, keep_rate=0.7, batches=8)


class Boundary(NamedTuple):
    """What is before a block and in it, all differentiable: the last block's two terms, and the carried rows."""

    x: Tensor
    update: Tensor
    carried: Tensor
    values: Tensor  # of the folded matrix, sparse or dense
    weight: Tensor
    bias: Tensor


class Constants(NamedTuple):
    """The matrices of the boundary, as the peers need them."""

    folded: SparseRows
    rows: int
    merge: Tensor
    reconstruct: Tensor
    pruned: Tensor  # (N,), 1 where the block before the boundary did not compute a token


@functools.cache
def compressed_model(kind: Kind) -> PMVisionTransformer:
    """A narrow model: its matrices are those of any width."""
    torch.manual_seed(0)
    dense = timm.create_model(
        "deit_small_patch16_224", embed_dim=64, num_heads=1, depth=kind.depth, img_size=kind.image
    )
    grid = dense.patch_embed.grid_size
    scores = torch.rand(kind.depth, dense.patch_embed.num_patches)
    return compress(dense, CompressionPlan.from_scores(scores, grid, kind.keep_rate, PRUNE_RATE)).eval()


def traffic(compressed: PMVisionTransformer) -> list[dict]:
    """Rows that each boundary moves, per image, and the fewest that it could.

    A program reads a row once, however many of its own rows use it, and once more for every other program that does.
    ``least`` reads the state once, and writes the next state and the normed rows. The matrix and the norm's weights are
    counted as moved, at a batch of one image; at larger ones they come from the cache.
    """
    from pm_kernels.mixing_plan import whole_rows

    width = SMALL.width
    per_program = whole_rows(width, 2048)["ROWS"]
    counted, state = [], compressed.plan.num_tokens
    for index, matrix in enumerate(compressed.transitions()):
        rows, normed = len(matrix.starts), compressed.plan.tokens[index]
        row = torch.searchsorted(matrix.starts, torch.arange(len(matrix.columns)), right=True) - 1
        read = torch.unique(row // per_program * state + matrix.columns).numel()
        indices = (4 * (len(matrix.starts) + len(matrix.columns)) + 2 * len(matrix.values) + 8 * width) / (2 * width)
        counted.append(
            {
                "boundary": index,
                "state": state,
                "rows": rows,
                "normed": normed,
                "nonzeros": len(matrix.columns),
                "moved_rows": read + indices + rows + normed,
                "least_rows": state + rows + normed,
            }
        )
        state = rows
    return counted


def traffic_table(counted: list[dict]) -> str:
    rows = [("boundary", "state", "rows", "normed", "nonzeros", "moved", "least", "moved / least")]
    for record in counted:
        moved, least = record["moved_rows"], record["least_rows"]
        names = ("boundary", "state", "rows", "normed", "nonzeros")
        rows.append((*(str(record[name]) for name in names), f"{moved:.0f}", str(least), f"{moved / least:.3f}"))
    return format_table(rows)


def ours(kind: str, constants: Constants, given: Boundary) -> tuple[Tensor, ...]:
    matrix = given.values if kind.endswith("dense") else constants.folded._replace(values=given.values)
    norm = (given.weight, given.bias, EPS)
    return transition(given.x, given.carried, matrix, constants.rows, update=given.update, norm=norm)


def embedding_bag(kind: str, constants: Constants, given: Boundary) -> tuple[Tensor, ...]:
    matrix = constants.folded._replace(values=given.values)
    norm = (given.weight, given.bias, EPS)
    return reference.transition(given.x, given.carried, matrix, constants.rows, update=given.update, norm=norm)


def matmul(kind: str, constants: Constants, given: Boundary) -> tuple[Tensor, ...]:
    matrix = given.values
    if not kind.endswith("dense"):
        tokens = given.x.shape[1] + given.carried.shape[1]
        matrix = constants.folded._replace(values=given.values).to_dense(tokens)
    mixed = matrix @ torch.cat([given.x + given.update, given.carried], dim=1)
    y = mixed[:, : constants.rows]
    return y, mixed[:, constants.rows :], F.layer_norm(y, given.weight.shape, given.weight, given.bias, EPS)


def literal(constants: Constants, full: Tensor, given: Boundary) -> Tensor:
    """R y + (1 - mask) x, merged for the next block and normed; the full map stays, as the next boundary reads it."""
    y = given.x + given.update
    full = torch.tensordot(constants.reconstruct, y, ([1], [1])).transpose(0, 1) + constants.pruned[:, None] * full
    y = torch.tensordot(constants.merge, full, ([1], [1])).transpose(0, 1)
    return F.layer_norm(y, given.weight.shape, given.weight, given.bias, EPS)


def ideal(given: Boundary) -> Tensor:
    return F.layer_norm(given.x + given.update, given.weight.shape, given.weight, given.bias, EPS)


def work(
    case: str, function: Callable[[Boundary], object], given: Boundary, upstreams: list[Tensor]
) -> comparison.Call:
    """What is timed: one call, with its backward where the case says so."""
    if case.startswith("forward"):
        return lambda: function(given)
    given = Boundary(*(tensor.detach().requires_grad_() for tensor in given))

    def both() -> tuple[Tensor, ...]:
        results = function(given)
        results = results if isinstance(results, tuple) else (results,)
        # The norm of the tokens is the last result, and the only one of some peers.
        taken = upstreams if len(results) == 3 else upstreams[-1:]
        inputs = given if len(results) == 3 else [given.x, given.update, given.weight, given.bias]
        return torch.autograd.grad(results, inputs, taken)

    return both


def constants_of(compressed: PMVisionTransformer, dtype: torch.dtype, device: str) -> Constants:
    block = len(compressed.blocks) // 2
    folded = compressed.transitions()[block]
    by_column = type(folded.by_column)(*(indices.to(device) for indices in folded.by_column))
    folded = SparseRows(
        folded.starts.to(device), folded.columns.to(device), folded.values.detach().to(device, dtype), by_column
    )
    plan = compressed.plan
    return Constants(
        folded,
        plan.tokens[block],
        plan.merge_matrix(block).to(device, dtype),
        plan.reconstruct_matrix(block - 1).to(device, dtype),
        (1 - plan.token_mask(block - 1)).to(device, dtype),
    )


def measure(case: str, device: str, machine: dict) -> dict:
    """One record."""
    kind = SEGMENTER if case in SEGMENTER_CASES else SMALL
    compressed, width = compressed_model(kind), kind.width
    batch, dtype = (256, torch.bfloat16) if device == "cuda" else (8, torch.float32)
    batch //= kind.batches
    constants = constants_of(compressed, dtype, device)
    tokens, rows = compressed.plan.tokens[kind.block - 1], len(constants.folded.starts)
    state = len(constants.folded.by_column.starts)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    values = constants.folded.values
    if case.endswith("dense"):
        values = random(rows, state) / state**0.5
    given = Boundary(
        random(batch, tokens, width), random(batch, tokens, width), random(batch, state - tokens, width), values,
        random(width), random(width),
    )  # fmt: skip
    counts = (constants.rows, rows - constants.rows, constants.rows)
    upstreams = [random(batch, count, width) for count in counts]
    few = [tensor[:2] for tensor in upstreams]
    small = Boundary(*(tensor[:2] for tensor in given[:3]), *given[3:])
    wide = Boundary(*(tensor.double() for tensor in small))
    exact = work(case, partial(embedding_bag if "dense" not in case else matmul, case, constants), wide,
                 [tensor.double() for tensor in few])()  # fmt: skip
    chosen = {"ours": ours, "matmul": matmul}
    if not case.endswith("dense"):
        chosen["embedding_bag"] = embedding_bag
    if device == "cuda":
        chosen["matmul_compiled"] = torch.compile(matmul, dynamic=False)
    bound = {name: partial(function, case, constants) for name, function in chosen.items()}
    found = comparison.errors({name: work(case, function, small, few) for name, function in bound.items()}, exact)
    calls = {name: work(case, function, given, upstreams) for name, function in bound.items()}
    full = random(batch, compressed.plan.num_tokens, width)
    calls["literal"] = work(case, partial(literal, constants, full), given, upstreams)
    calls["ideal"] = work(case, ideal, given, [random(batch, tokens, width)])
    moved = 2 * tokens + (state - tokens) + rows + constants.rows
    product = 2 * (rows * state if case.endswith("dense") else len(values))
    if case.startswith("backward"):
        # The gradients of the three results and the state once more are read, the state's gradient is written.
        moved += rows + constants.rows + tokens + state + state
        product *= 3
    name = f"transition/{case}-{str(dtype).removeprefix('torch.')}"
    moved *= batch * width * given.x.element_size()
    return comparison.record(name, "transition", calls, given.x, moved, batch * width * product, machine, errors=found)


def cases(device: str, full: bool) -> list[str]:
    """Those of every day; on a GPU, and where all are wanted, Segmenter's too."""
    return [*CASES, *(SEGMENTER_CASES if full or device == "cuda" else ())]


def names(case: str, device: str) -> list[str]:
    """Ours and the peers."""
    others = [] if case.endswith("dense") else ["embedding_bag"]
    compiled = ["matmul_compiled"] if device == "cuda" else []
    return ["ours", "matmul", *others, *compiled, "literal", "ideal"]


def facts() -> dict:
    """What stands in the result file beside the records."""
    return {"traffic": traffic(compressed_model(SMALL))}


if __name__ == "__main__":
    print(traffic_table(traffic(compressed_model(SMALL))))
