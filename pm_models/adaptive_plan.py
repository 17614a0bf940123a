"""Before which blocks a model merges the tokens that are most alike in each image, and how many are left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pm_kernels.reference import fewest_tokens

from .plan import Plan, as_integer

# Where a model of twelve blocks merges: early, because only the blocks after a merge gain by it, and a few blocks
# apart, so that merged tokens can mix with the others in between.
_MERGES_OF_TWELVE = (1, 3, 5, 8)


@dataclass(frozen=True)
class AdaptivePlan(Plan):
    """Before which blocks of a Vision Transformer tokens merge, and how many are left: a value, saved as JSON.

    Which tokens merge is decided image by image, see :func:`pm_kernels.match_tokens`.

    Args:
        grid: patches as (rows, columns). On another grid the numbers of tokens scale with the number of patches.
        depth: blocks of the model.
        num_prefix_tokens: tokens before the patches (class, distillation, registers); they never merge.
        merges: {block: tokens from that block on, prefix tokens included}.
        rounds, root_sizes: of each merge, as in :func:`pm_kernels.match_tokens`.

    Raises:
        ValueError: a field is out of range, or a merge would leave more tokens than there are, or fewer than its rounds
            can reach.
    """

    kind = "adaptive"
    merges: Mapping[int, int]
    rounds: int = 2
    root_sizes: bool = False

    def __post_init__(self) -> None:
        self.check_sizes()
        if not isinstance(self.merges, Mapping):
            raise ValueError(f"merges must be a dict {{block: tokens}}, got {self.merges!r}")
        if type(self.rounds) is not int or self.rounds < 1:
            raise ValueError(f"rounds must be a whole number of at least 1, got {self.rounds!r}")
        if type(self.root_sizes) is not bool:
            raise ValueError(f"root_sizes must be a bool, got {self.root_sizes!r}")
        object.__setattr__(self, "merges", dict(sorted(self.merges.items())))
        patches = self.num_patches
        for block, tokens in self.merges.items():
            if not 0 <= block < self.depth:
                raise ValueError(f"merges must name blocks from 0 to {self.depth - 1}, got {block}")
            least = self.num_prefix_tokens + fewest_tokens(patches, self.rounds)
            most = self.num_prefix_tokens + patches
            if not least <= tokens <= most:
                raise ValueError(
                    f"merges must leave between {least} and {most} tokens before block {block}, got {tokens}"
                )
            patches = tokens - self.num_prefix_tokens

    def __hash__(self) -> int:
        return hash(
            (self.grid, self.depth, self.num_prefix_tokens, tuple(self.merges.items()), self.rounds, self.root_sizes)
        )

    @classmethod
    def for_model(cls, model: nn.Module, gmacs: float = 0.62) -> "AdaptivePlan":
        """The plan that brings a model to a share of its GMACs: four merges, each to the same share of the patches.

        Of twelve blocks they stand before 1, 3, 5 and 8, in a deeper model at the corresponding depths. A model of
        fewer blocks has only the first of them, one for every three blocks. Each merge takes three rounds, and square
        roots of sizes in its costs.

        Args:
            model: a timm VisionTransformer or Eva, or a :class:`~pm_models.Segmenter`, uncompressed.
            gmacs: the largest share of the uncompressed model's multiply-accumulates that one image may take; those of
                the matching count.

        Raises:
            ValueError: ``gmacs`` is not between the share that the strongest merging leaves and 1.
        """
        from .budget import fit_share  # imported here: it builds models, which import this module

        return fit_share(model, gmacs)

    @classmethod
    def candidates(
        cls, encoder: Any, blocks: Sequence[int] | None = None, *, rounds: int = 3, root_sizes: bool = True
    ) -> list["AdaptivePlan"]:
        """Plans for a Vision Transformer whose merges all leave the same share of patches, the fewest tokens first.

        Args:
            encoder: a timm VisionTransformer or Eva.
            blocks: the blocks to merge before; ``None``: as in :meth:`for_model`.
            rounds, root_sizes: of each merge.

        Raises:
            ValueError: the model has a single patch.
        """
        grid, depth = tuple(encoder.patch_embed.grid_size), len(encoder.blocks)
        patches, prefix = grid[0] * grid[1], encoder.num_prefix_tokens
        if blocks is None:
            merging = _MERGES_OF_TWELVE[: max(1, depth // 3)]
            blocks = sorted({int(depth * block / 12 + 0.7) for block in merging})
        if patches < 2:
            raise ValueError(f"model must have at least 2 patches to merge, got {patches}")
        plans = []
        for last in range(1, patches):
            shares = [(last / patches) ** ((index + 1) / len(blocks)) for index in range(len(blocks))]
            merges = {
                block: prefix + max(round(patches * share), 1) for block, share in zip(blocks, shares, strict=True)
            }
            try:
                plans.append(cls(grid, depth, prefix, merges, rounds=rounds, root_sizes=root_sizes))
            except ValueError:  # fewer tokens than the rounds can reach
                continue
        return plans

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that each block runs on, prefix tokens included."""
        return tuple(self.tokens_of(self.num_patches))

    def tokens_of(self, patches: int) -> list[int]:
        """Tokens that each block runs on in an image of ``patches`` patches: the plan's numbers, scaled."""
        prefix, left, tokens = self.num_prefix_tokens, patches, []
        for block in range(self.depth):
            if block in self.merges:
                planned = round((self.merges[block] - prefix) * patches / self.num_patches)
                left = min(max(planned, fewest_tokens(left, self.rounds)), left)
            tokens.append(prefix + left)
        return tokens

    def resize(self, grid: tuple[int, int]) -> "AdaptivePlan":
        """The plan for another grid, which leaves the same shares of the patches."""
        tokens = self.tokens_of(grid[0] * grid[1])
        return replace(self, grid=(grid[0], grid[1]), merges={block: tokens[block] for block in self.merges})

    def _fields(self) -> dict:
        merges = {str(block): tokens for block, tokens in self.merges.items()}
        return {"merges": merges, "rounds": self.rounds, "root_sizes": self.root_sizes}

    @staticmethod
    def _arguments(values: dict) -> dict:
        merges = {int(block): as_integer(tokens) for block, tokens in values["merges"].items()}
        return {"merges": merges, **{name: values[name] for name in ("rounds", "root_sizes") if name in values}}

    def __repr__(self) -> str:
        rows, columns = self.grid
        lines = [
            f"AdaptivePlan: {rows} x {columns} patches, {self.num_prefix_tokens} prefix tokens, {self.depth} blocks; "
            f"{sum(self.tokens)} of {self.depth * self.num_tokens} tokens",
            "  blocks   tokens",
        ]
        starts = sorted({0, *self.merges})
        for first, following in zip(starts, [*starts[1:], self.depth], strict=True):
            name = str(first) if following == first + 1 else f"{first}..{following - 1}"
            lines.append(f"  {name:<6} {self.tokens[first]:>8}")
        return "\n".join(lines)
