"""Adaptive merging: before some blocks the tokens that are most alike in each image merge into their means."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models import checkpoint
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pm_kernels import SparseRows, match, merge_segments, runtime, transition

from ..adaptive_plan import AdaptivePlan
from ..attention import FusedAttention
from .blocks import attends_apart, opening_norm, run_block
from .rotary import RotaryPlaces


class State(NamedTuple):
    """The state between two blocks.

    Args:
        x: (B, C, D), the tokens but for ``update``.
        update: (B, C, D), still to be added to ``x``, or ``None``.
        sizes: (B, C), how many tokens each stands for; ``None``: one each.
        log_sizes: (B, C), the logarithms of the sizes, which the attentions add to their logits.
        segments: for each merge so far, the index of the merged token that each token went into.
        places: (B, C - P, 2), mean row and column of each patch token, where the model has rotary positions.
    """

    x: Tensor
    update: Tensor | None = None
    sizes: Tensor | None = None
    log_sizes: Tensor | None = None
    segments: tuple[Tensor, ...] = ()
    places: Tensor | None = None


class AdaptiveReduction(nn.Module):
    """Before the blocks of a plan, merge tokens whose normed values :func:`pm_kernels.match_tokens` finds most alike.

    A merged token is the size-weighted mean of its members. It is attended to in proportion to its size, through a key
    bias that the blocks get as ``attn_mask`` (B, 1, 1, C). There are no weights.

    Args:
        plan: before which blocks to merge, and how many tokens are left.
        rope: the model's rotary embedding, or ``None``.
        rope_mixed: whether it has a table for each block.
    """

    def __init__(self, plan: AdaptivePlan, rope: nn.Module | None = None, rope_mixed: bool = False) -> None:
        super().__init__()
        self._plan = plan
        self.positions = None if rope is None else RotaryPlaces(rope, plan.grid, rope_mixed)

    execution = property(lambda self: "folded")

    @execution.setter
    def execution(self, value: str) -> None:
        if value != "folded":
            raise ValueError(f"execution must be 'folded' with an AdaptivePlan, which has no matrices, got {value!r}")

    def cut(self, depth: int) -> None:
        """Run only the first ``depth`` blocks: nothing to do, as a forward is not given any others."""

    def freeze(self, dtype: torch.dtype) -> None:
        """Nothing to do: there are no matrices to make constant."""

    def forward(
        self,
        blocks: nn.Module,
        x: Tensor,
        readout: str = "all",
        rope: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        maps: dict[int, Tensor | None] | None = None,
        clusters: dict[int, Tensor | None] | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Run the blocks on x (B, N, D), and return the rows of ``readout``.

        Args:
            blocks: the model's.
            x: (B, N, D).
            readout: ``"all"`` N tokens, each replaced by its merged token; ``"prefix"`` tokens; or ``"patch_mean"``,
                prefix tokens and the mean of the patches.
            rope: a rotary table for the patches.
            grid: the patches' grid, where it is not the plan's.
            maps: filled in with the full map after each block that is a key. The run ends after the last of them and
                returns its map.
            clusters: filled in, for each block that is a key, with the merged token (B, N - P) that each patch is in
                before the block.
            checkpointing: recompute the blocks' activations in backward.
        """
        prefix, maps, clusters = self._plan.num_prefix_tokens, maps or {}, clusters or {}
        grid = grid or self._plan.grid
        planned = self._plan.tokens_of(x.shape[1] - prefix)
        call = checkpoint if checkpointing and torch.is_grad_enabled() else None
        fused = runtime.target(x) is not None  # without kernels, the last sum would be done twice: to match and to mix
        state = State(x, places=None if rope is None else self.positions.places(grid, rope))
        for number, (block, tokens) in enumerate(zip(blocks, planned, strict=False)):
            normed = None
            if tokens < state.x.shape[1]:
                state, normed = self._merged(state, block, tokens)
            if number in clusters:
                members = _members(state)
                if members is None:
                    members = torch.arange(state.x.shape[1], device=x.device).expand(len(x), -1)
                clusters[number] = members[:, prefix:].long() - prefix
            last = number == len(blocks) - 1
            step = partial(
                _step,
                block,
                normed=normed,
                rows=prefix if last and readout == "prefix" and not maps and attends_apart(block) else None,
                # Checkpointing keeps a step's inputs: one tensor takes less memory than two.
                apart=(last or (fused and planned[number + 1] < tokens)) and number not in maps and call is None,
                given=self._given(block, state, rope, grid, number),
            )
            x, update = step(state.x) if call is None else call(step, state.x)
            state = state._replace(x=x, update=update)
            if number in maps:
                maps[number] = _full_map(state)
                if number == max(maps):
                    return maps[number]
        return self._read(state, readout)

    def _merged(self, state: State, block: nn.Module, tokens: int) -> tuple[State, Tensor | None]:
        """The state merged to ``tokens`` tokens, and the block's norm of them where the kernel can compute it."""
        x, update, sizes, _, merged, places = state
        prefix, rounds, roots = self._plan.num_prefix_tokens, self._plan.rounds, self._plan.root_sizes
        if sizes is None:
            sizes = torch.ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        norm = opening_norm(block)
        if norm is None:
            x, update = (x if update is None else x + update), None
            found = match(_compared(block, x.detach()), sizes, tokens, prefix, rounds, root_sizes=roots)
        else:
            found = match(x, sizes, tokens, prefix, rounds, root_sizes=roots, update=update, norm=norm)
        if places is not None:
            segments = found.segments[:, prefix:] - prefix
            places = merge_segments(places.expand(len(x), -1, -1), segments, sizes[:, prefix:], tokens - prefix)
        x, _, normed = transition(x, None, found.matrix, update=update, norm=norm)
        return State(x, None, found.sizes, found.log_sizes, (*merged, found.segments), places), normed

    def _given(
        self, block: nn.Module, state: State, rope: Tensor | None, grid: tuple[int, int], number: int
    ) -> dict[str, Tensor]:
        """The block's further arguments: a key bias from the tokens' sizes, and their rotary positions."""
        given = {}
        if state.log_sizes is not None:
            bias = state.log_sizes[:, None, None, :]
            # PyTorch's attention takes it only in the queries' dtype.
            given["attn_mask"] = (
                bias if isinstance(getattr(block, "attn", None), FusedAttention) else bias.to(state.x.dtype)
            )
        if rope is not None:
            given["rope"] = self.positions(rope, state.places if state.sizes is not None else None, grid, number)
        return given

    def _read(self, state: State, readout: str) -> Tensor:
        prefix = self._plan.num_prefix_tokens
        x, update, sizes, *_ = state
        if readout == "all" or sizes is None:
            return _full_map(state)
        if readout == "prefix":
            return x[:, :prefix] if update is None else x[:, :prefix] + update[:, :prefix]
        x = x if update is None else x + update
        weights = (sizes[:, prefix:] / sizes[:, prefix:].sum(dim=1, keepdim=True)).to(x.dtype)
        return torch.cat([x[:, :prefix], weights.unsqueeze(1) @ x[:, prefix:]], dim=1)


def _step(
    block: nn.Module, x: Tensor, *, normed: Tensor | None, rows: int | None, apart: bool, given: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Run a block. ``rows``: compute only that many; ``apart``: return the terms of the last sum separately."""
    if normed is None and rows is None and not apart:
        return block(x, **given), None
    x, update = run_block(block, x, normed, rows, **given)
    return (x, update) if update is None or apart else (x + update, None)


def _compared(block: nn.Module, x: Tensor) -> Tensor:
    """The values that tokens are compared by: the block's first norm, or else a LayerNorm without weights."""
    if isinstance(block, Block | EvaBlock):
        return block.norm1(x)
    return F.layer_norm(x, x.shape[-1:])


def _members(state: State) -> Tensor | None:
    """(B, N), the merged token that each of the N tokens is in; ``None``: nothing has merged yet."""
    members = None
    for segments in state.segments:
        members = segments if members is None else segments.gather(1, members.long())
    return members


def _full_map(state: State) -> Tensor:
    """All N tokens, each replaced by the merged token that it is in."""
    x, update, members = state.x, state.update, _members(state)
    if members is None:
        return x if update is None else x + update
    if torch.compiler.is_exporting():
        x = x if update is None else x + update
        return x.gather(1, members.long().unsqueeze(2).expand(-1, -1, x.shape[2]))
    starts = torch.arange(members.shape[1], dtype=members.dtype, device=members.device).expand_as(members)
    matrix = SparseRows(starts.contiguous(), members, torch.ones_like(members, dtype=x.dtype))
    return transition(x, None, matrix, update=update)[0]
