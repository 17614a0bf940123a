"""Fewer tokens by what is in each image: before some blocks the tokens most alike merge into their means."""

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
    """What is between two blocks.

    Args:
        x: (B, C, D), and ``update`` (B, C, D), which is to be added to it, or ``None``.
        sizes: (B, C), how many tokens each stands for; ``None``: one.
        log_sizes: (B, C), their logarithms, which the attentions add to the logits.
        segments: of each merge so far, the token that each of the tokens before it went into.
        places: (B, C - P, 2), rows and columns of the patches, where the model has rotary positions.
    """

    x: Tensor
    update: Tensor | None = None
    sizes: Tensor | None = None
    log_sizes: Tensor | None = None
    segments: tuple[Tensor, ...] = ()
    places: Tensor | None = None


class AdaptiveReduction(nn.Module):
    """Merge tokens by :func:`pm_kernels.match_tokens` of what a block's norm gives, before the blocks of a plan.

    A merged token is the mean of its members, by their sizes. It is attended to in proportion to its size, by a bias of
    the keys that blocks are given as ``attn_mask`` (B, 1, 1, C). There are no weights.

    Args:
        plan: before which blocks, and how many tokens are left.
        rope: the model's rotary embedding; ``None`` where it has none.
        rope_mixed: whether its tables are one for each block.
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
        """Run the first ``depth`` blocks alone, which are all that a forward will be given."""

    def freeze(self, dtype: torch.dtype) -> None:
        """There is nothing to make constant."""

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
            readout: ``"all"`` N tokens, each its merged token; ``"prefix"``; or ``"patch_mean"``, these and the mean of
                the patches.
            rope: a rotary table of the patches.
            grid: of the patches, where it is not the plan's.
            maps: to be filled in with the full map after each block that it has a key for. The last of them ends the
                run, and its map is returned.
            clusters: to be filled in with the merged token (B, N - P) that each patch is in, before each block that it
                has a key for.
            checkpointing: compute what is in blocks again in backward.
        """
        prefix, maps, clusters = self._plan.num_prefix_tokens, maps or {}, clusters or {}
        grid = grid or self._plan.grid
        planned = self._plan.tokens_of(x.shape[1] - prefix)
        call = checkpoint if checkpointing and torch.is_grad_enabled() else None
        fused = runtime.target(x) is not None  # or what merges would be summed twice: to match, and to mix
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
                # A step that is computed again keeps its inputs, of which one is less than two.
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
        """The state with so many tokens, and the block's norm of them where it is known how to compute it."""
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
        """What the block takes beside its tokens: a bias by their sizes, and their rotary positions."""
        given = {}
        if state.log_sizes is not None:
            bias = state.log_sizes[:, None, None, :]
            # PyTorch's attention takes it in the queries' dtype alone.
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
    """A block; ``rows`` are those to compute, where not all; ``apart`` leaves the last sum to be done."""
    if normed is None and rows is None and not apart:
        return block(x, **given), None
    x, update = run_block(block, x, normed, rows, **given)
    return (x, update) if update is None or apart else (x + update, None)


def _compared(block: nn.Module, x: Tensor) -> Tensor:
    """What tokens are compared by: the norm that the block begins with, or, where it does not, without weights."""
    if isinstance(block, Block | EvaBlock):
        return block.norm1(x)
    return F.layer_norm(x, x.shape[-1:])


def _members(state: State) -> Tensor | None:
    """(B, N), the token that each of all N tokens went into; ``None``: itself."""
    members = None
    for segments in state.segments:
        members = segments if members is None else segments.gather(1, members.long())
    return members


def _full_map(state: State) -> Tensor:
    """All N tokens, each that which it went into."""
    x, update, members = state.x, state.update, _members(state)
    if members is None:
        return x if update is None else x + update
    if torch.compiler.is_exporting():
        x = x if update is None else x + update
        return x.gather(1, members.long().unsqueeze(2).expand(-1, -1, x.shape[2]))
    starts = torch.arange(members.shape[1], dtype=members.dtype, device=members.device).expand_as(members)
    matrix = SparseRows(starts.contiguous(), members, torch.ones_like(members, dtype=x.dtype))
    return transition(x, None, matrix, update=update)[0]
