"""A timm Vision Transformer whose blocks run on fewer tokens."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from types import NoneType
from typing import TypeVar

import torch
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .adaptive_plan import AdaptivePlan
from .attention import (
    fusable_attentions,
    fuse,
    fused_attentions,
    merges_inside,
    plain_attention,
    refuse_masks,
)
from .compression import OPTIONS, Compression
from .modules import Rewired, as_class, is_touched, replace_module
from .plan import CompressionPlan
from .reductions import make_reduction
from .reductions.folding import Transition
from .reductions.matrices import StageMatrices
from .reductions.static import EXECUTIONS, Maps, StaticReduction
from .unwrapping import unwrapped

C = TypeVar("C", bound="Compressed")
PlainModel = VisionTransformer | Eva  # the classes that can be compressed, their subclass for distillation too


class Compressed(nn.Module):
    """What all compressed models have in common, whichever of timm's classes they extend; see :func:`compress`.

    It takes over the given model's modules, so parameter names stay timm's. One more submodule, ``stages``, runs the
    blocks and holds the matrices, ``stages.<first block>.merge`` and ``.reconstruct``. Nothing is cached between
    forwards: whatever changes a weight or a matrix, the next forward uses the new values.

    Args:
        model: the model to take over. It is not copied.
        compression: how it is compressed.
    """

    plain_class: type[nn.Module]  # timm's class, whose forwards run

    def __init__(self, model: PlainModel, compression: Compression) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        plan = compression.plan
        for index, block in enumerate(self.blocks):
            sizes = plan.token_sizes(index) if compression.size_bias and plan.stage_of(index) is not None else None
            for name, attention in fusable_attentions(block).items():
                replace_module(block, name, fuse(attention, key_bias=None if sizes is None else sizes.log()))
        if type(self.blocks) is nn.Sequential:
            self.blocks = as_class(self.blocks, Blocks)
        self._reduce_by(compression)

    def _reduce_by(self, compression: Compression) -> None:
        self.compression = compression
        self.stages = make_reduction(compression, self).to(self.patch_embed.proj.weight)

    plan: CompressionPlan | AdaptivePlan = property(lambda self: self.compression.plan)
    train_matrices: str | None = property(lambda self: self.compression.train_matrices)
    size_bias: bool = property(lambda self: self.compression.size_bias)
    merge_site: str = property(lambda self: self.compression.merge_site)
    shortcut: str = property(lambda self: self.compression.shortcut)

    @property
    def execution(self) -> str:
        """``"folded"``: no full token map between blocks; ``"literal"``: the paper's equations, one by one.

        With ``merge_site="attention"`` every merge needs the full map, and the two are the same. An AdaptivePlan has
        only ``"folded"``.
        """
        return self.stages.execution

    @execution.setter
    def execution(self, value: str) -> None:
        if value not in EXECUTIONS:
            raise ValueError(f"execution must be one of {', '.join(map(repr, EXECUTIONS))}, got {value!r}")
        self.stages.execution = value

    def merge_matrices(self) -> list[Tensor]:
        """The merge matrix (C, N) of each compressed block, in order; blocks of one stage share theirs.

        With ``train_matrices="dense"`` they are the parameters themselves.
        """
        return [stage.matrices()[0] for stage in self._block_matrices()]

    def reconstruct_matrices(self) -> list[Tensor]:
        """The reconstruct matrix (N, C) of each compressed block, in order; blocks of one stage share theirs.

        With ``train_matrices="dense"`` they are the parameters themselves.
        """
        return [stage.matrices()[1] for stage in self._block_matrices()]

    def transitions(self) -> list[Transition | None]:
        """The matrices of folded execution that map each stage's state to the next, in order.

        Uncompressed blocks between stages have one too. ``None``: the state does not change.
        """
        return self._static().fold(self._pooled_readout(), self.patch_embed.proj.weight.dtype).transitions

    def freeze(self: C) -> C:
        """Make the model's folded matrices constants, for serving: they no longer train and are no longer saved.

        They are then computed once instead of in every forward. This cannot be undone: freeze a copy of a model that is
        still to be trained or saved.
        """
        self.stages.freeze(self.patch_embed.proj.weight.dtype)
        return self

    def uncompressed(self) -> PlainModel:
        """A plain timm model with a copy of the same weights, without the plan and its matrices."""
        plain = as_class(copy.deepcopy(unwrapped(self)), self.plain_class)
        del plain.compression, plain.stages
        # If timm made the model under one of our names, it recorded our options too.
        recorded = getattr(plain, "_model_args", {})
        plain._model_args = {name: value for name, value in recorded.items() if name not in OPTIONS}
        if type(plain.blocks) is Blocks:
            plain.blocks = as_class(plain.blocks, nn.Sequential)
        for block in plain.blocks:
            for name, attention in fused_attentions(block).items():
                replace_module(block, name, plain_attention(attention))
        return plain

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images (B, 3, H, W) to logits (B, classes)."""
        refuse_masks(attn_mask, is_causal)
        return self.forward_head(self._features(self._pooled_readout(), x))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images (B, 3, H, W) to all N normalised tokens (B, N, D), pruned and merged ones included."""
        refuse_masks(attn_mask, is_causal)
        return self._features("all", x)

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, *args: object, **kwargs: object
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict:
        """timm's ``forward_intermediates``, with the full token map after each requested block."""
        refuse_masks(kwargs.pop("attn_mask", None), kwargs.pop("is_causal", False))
        taken, _ = feature_take_indices(len(self.blocks), indices)
        blocks = _CapturingBlocks(self, taken, len(self.blocks), self.grid_of(x))
        return self.plain_class.forward_intermediates(self._around(blocks), x, indices, *args, **kwargs)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """The grid (rows, columns) of the images' patches.

        Raises:
            ValueError: it differs from the grid of a CompressionPlan, even if it has as many patches.
        """
        if not hasattr(self.patch_embed, "dynamic_feat_size"):
            return self.plan.grid
        grid = tuple(self.patch_embed.dynamic_feat_size(images.shape[-2:]))
        if grid != self.plan.grid and not self.compression.adaptive:
            raise ValueError(
                f"the images give {grid[0] * grid[1] + self.num_prefix_tokens} tokens, but the plan was made for a "
                f"grid of {self.plan.grid}, not {grid}; make a plan for that size (plan.resize)"
            )
        return grid

    @torch.no_grad()
    def clusters(self, images: Tensor) -> dict[int, Tensor]:
        """Which patches of images (B, 3, H, W) an AdaptivePlan merges.

        Returns:
            A dict with an entry for each block that tokens merge before. It holds (B, patches) int64, the merged token
            that each patch is in, counted from the first one after the prefix tokens.

        Raises:
            ValueError: the model has a CompressionPlan, which merges the same patches in every image.
        """
        if not self.compression.adaptive:
            raise ValueError(
                "clusters need a model with an AdaptivePlan; with a CompressionPlan they are the same for every image: "
                "plan.stage_of(block).segments"
            )
        found: dict[int, Tensor] = dict.fromkeys(block for block in self.plan.merges if block < len(self.blocks))
        self._features("all", images, clusters=found)
        return found

    def prune_intermediate_layers(self, *args: object, **kwargs: object) -> list[int]:
        """timm's ``prune_intermediate_layers``; a stage that is cut ends with the last remaining block."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        self.stages.cut(len(self.blocks))
        return taken

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Change the size of the images. An AdaptivePlan is scaled to the new grid, a CompressionPlan keeps its own.

        Raises:
            ValueError: the new grid is not that of the CompressionPlan.
        """
        height, width = img_size or self.patch_embed.img_size
        rows, columns = patch_size or self.patch_embed.patch_size
        if self.compression.adaptive:
            super().set_input_size(img_size=img_size, patch_size=patch_size)
            plan = self.plan.resize(tuple(self.patch_embed.grid_size))
            self._reduce_by(dataclasses.replace(self.compression, plan=plan))
            return
        if (height // rows, width // columns) != self.plan.grid:
            raise ValueError(
                f"img_size {(height, width)} with patches of {(rows, columns)} gives a grid of "
                f"{(height // rows, width // columns)}, but the plan was made for {self.plan.grid}; "
                "make a plan from scores at the new size"
            )
        super().set_input_size(img_size=img_size, patch_size=patch_size)

    def no_weight_decay(self) -> set[str]:
        """timm's parameters without weight decay, plus the merge and reconstruct matrices."""
        return set(super().no_weight_decay()) | {f"stages.{name}" for name, _ in self.stages.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's layer groups; a stage's matrices belong to its first block."""
        groups = super().group_matcher(coarse)
        return groups | {"blocks": [*groups["blocks"], (r"^stages\.(\d+)", None)]}

    def _features(self, readout: str, x: Tensor, **filled: dict) -> Tensor:
        """Images to the normalised rows of ``readout``, through timm's ``forward_features``."""
        blocks = _AllBlocks(self, partial(self._run, grid=self.grid_of(x), readout=readout, **filled))
        return self.plain_class.forward_features(self._around(blocks), x)

    def _around(self, blocks: "_AllBlocks | _CapturingBlocks") -> Rewired:
        """The model as timm's forwards see it: they embed, iterate over ``blocks``, normalise; checkpointing is ours.

        With ``rope_mixed`` timm would pass each block its part of the rotary table, but here one call runs all blocks.
        """
        return Rewired(self, blocks=blocks, grad_checkpointing=False, rope_mixed=False)

    def _static(self) -> StaticReduction:
        if self.compression.adaptive:
            raise ValueError(
                "the model has an AdaptivePlan, which decides image by image what merges and has no matrices"
            )
        return self.stages

    def _block_matrices(self) -> Iterator[StageMatrices]:
        for run in self._static().runs:
            if run.stage is not None:
                yield from [self.stages[run.stage]] * (run.last - run.first + 1)

    def _pooled_readout(self) -> str:
        """The rows that the head reads, or all rows where a hook may look at them."""
        if self.attn_pool is not None or getattr(self, "pool_include_prefix", False):
            return "all"
        if is_touched(self.norm, self.blocks):
            return "all"
        if self.global_pool == "token":
            return "prefix"
        # The mean over the patches is linear, but a norm before it is not.
        if self.global_pool == "avg" and isinstance(self.norm, nn.Identity):
            return "patch_mean"
        return "all"

    def _run(
        self,
        x: Tensor,
        grid: tuple[int, int],
        rope: Tensor | None = None,
        readout: str = "all",
        **filled: dict,
    ) -> Tensor:
        """``filled``: dicts for the reduction to fill in, ``maps`` or ``clusters``."""
        checkpointing = self.grad_checkpointing
        return self.stages(self.blocks, x, readout, rope, grid=grid, checkpointing=checkpointing, **filled)


class Blocks(nn.Sequential):
    """A compressed VisionTransformer's blocks. A call runs them as the model does, with the hooks on the container."""

    def forward(self, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        return super().forward(x) if run is None else run(x)


class PMVisionTransformer(Compressed, VisionTransformer):
    """A timm :class:`~timm.models.VisionTransformer` compressed by a plan; :func:`compress` makes one."""

    plain_class = VisionTransformer


class PMVisionTransformerDistilled(PMVisionTransformer, VisionTransformerDistilled):
    """The same for timm's :class:`~timm.models.deit.VisionTransformerDistilled`: two prefix tokens, two heads."""

    plain_class = VisionTransformerDistilled


class PMEva(Compressed, Eva):
    """The same for timm's :class:`~timm.models.eva.Eva`: EVA-02, DINOv3 and others, with rotary positions or without.

    A merged token's position is the mean of its patches' positions, weighted by the plan's merge matrix.
    """

    plain_class = Eva


class _AllBlocks:
    """Blocks for ``forward_features``: a VisionTransformer calls them, an Eva iterates and gets a single one."""

    def __init__(self, model: Compressed, run: Callable[..., Tensor]) -> None:
        self._model = model
        self._run = run

    def __call__(self, x: Tensor, rope: Tensor | None = None, **_: object) -> Tensor:
        blocks, run = self._model.blocks, partial(self._run, rope=rope)
        return blocks(x, run=run) if isinstance(blocks, Blocks) else run(x)

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        yield self


class _CapturingBlocks:
    """Blocks for ``forward_intermediates``: the first call runs the model, and each call returns a block's full map."""

    def __init__(self, model: Compressed, taken: list[int], depth: int, grid: tuple[int, int]) -> None:
        self._model = model
        self._taken = taken
        self._depth = depth
        self._grid = grid

    def __len__(self) -> int:
        return self._depth

    def __getitem__(self, blocks: slice) -> "_CapturingBlocks":
        return _CapturingBlocks(self._model, self._taken, len(range(self._depth)[blocks]), self._grid)

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor | None]]:
        maps: Maps = dict.fromkeys((*self._taken, self._depth - 1))

        def first(x: Tensor, rope: Tensor | None = None, **_: object) -> Tensor | None:
            self._model._run(x, self._grid, rope, maps=maps)
            return maps.get(0)

        yield first
        for index in range(1, self._depth):
            yield lambda *_, index=index, **__: maps.get(index)


_COMPRESSED_CLASSES: dict[type[nn.Module], type[PMVisionTransformer | PMEva]] = {
    compressed.plain_class: compressed for compressed in (PMVisionTransformer, PMVisionTransformerDistilled, PMEva)
}


def compress(
    model: nn.Module,
    plan: CompressionPlan | AdaptivePlan,
    *,
    train_matrices: str | None = "support",
    size_bias: bool = False,
    merge_site: str = "block",
    shortcut: str = "pruned",
) -> PMVisionTransformer | PMEva:
    """Compress a timm Vision Transformer by a plan: static (arXiv 2503.23455, section 3) or adaptive.

    With an :class:`~pm_models.AdaptivePlan`, the tokens that are most alike in each image merge. No weights are added,
    no training is needed, and the options must keep their defaults.

    Args:
        model: a timm VisionTransformer, VisionTransformerDistilled or Eva, or a wrapper of one (``torch.compile``,
            DistributedDataParallel, accelerate, ...); it is left as it was.
        plan: a CompressionPlan or an AdaptivePlan, made for the model's grid, depth and prefix tokens.
        train_matrices: which entries of the merge and reconstruct matrices train: ``"support"``, the plan's nonzeros;
            ``"dense"``, all; ``None``, none.
        size_bias: add the logarithm of a merged token's number of members to its logits as a key (proportional
            attention).
        merge_site: where a stage's first block merges: ``"block"``, before the block, as in the paper; ``"attention"``,
            inside its attention, so that the norm and the projection to queries, keys and values see all tokens. That
            is more work, but the merged values are normalised.
        shortcut: what skips a block: ``"pruned"``, the pruned tokens, as in the paper; ``"all"``, everything that the
            merge leaves out, ``x - R M x``. Merged tokens then share what the block adds and keep what each had. More
            rows are carried from block to block.

    Returns:
        A new :class:`PMVisionTransformer` or :class:`PMEva`, which behaves like the given model's class in every way,
        on the same device, in the same dtype and mode.

    Raises:
        TypeError: the model is of another class.
        ValueError: the model has a part that cannot be compressed, or the plan was made for another model.
    """
    model = unwrapped(model)
    compression = Compression(plan, train_matrices, size_bias, merge_site, shortcut)
    _check_model(model, size_bias)
    _check_plan(model, plan)
    if merge_site == "attention":
        for stage in plan.stages:
            if not merges_inside(model.blocks[stage.first]):
                raise ValueError(
                    f"merge_site='attention' needs timm's Block with its Attention, ungated; block {stage.first} is a "
                    f"{type(model.blocks[stage.first]).__name__} without them"
                )
    return _COMPRESSED_CLASSES[type(model)](copy.deepcopy(model), compression)


def check_vision_transformer(model: nn.Module) -> None:
    """Refuse any model that is not a plain timm VisionTransformer, and say why.

    Raises:
        TypeError: the model is of another class.
    """
    if isinstance(model, Compressed):
        raise TypeError("model is compressed already; start from the plain one, model.uncompressed()")
    if type(model) not in _COMPRESSED_CLASSES:
        raise TypeError(
            "model must be a timm VisionTransformer, VisionTransformerDistilled or Eva, whose blocks treat tokens as a "
            f"set with positions, got {type(model).__name__}"
        )


def _check_model(model: PlainModel, size_bias: bool) -> None:
    check_vision_transformer(model)
    if not isinstance(model.patch_drop, (nn.Identity, NoneType)):
        raise ValueError(
            "model drops patches at random (patch_drop_rate), but a plan needs every patch in its place; "
            "create it with patch_drop_rate=0"
        )
    for index, block in enumerate(model.blocks):
        attentions = fusable_attentions(block)
        if size_bias and not attentions:
            raise ValueError(
                f"size_bias needs timm's Attention in every block; block {index}, a {type(block).__name__}, has none"
            )
        for attention in attentions.values():
            if attention.attn_drop.p > 0:
                raise ValueError(
                    f"model has attention dropout {attention.attn_drop.p} (attn_drop_rate) in block {index}, which "
                    "no fused kernel supports; create it with attn_drop_rate=0"
                )


def _check_plan(model: PlainModel, plan: CompressionPlan | AdaptivePlan) -> None:
    for name, planned, actual in (
        ("grid", plan.grid, tuple(model.patch_embed.grid_size)),
        ("depth", plan.depth, len(model.blocks)),
        ("num_prefix_tokens", plan.num_prefix_tokens, model.num_prefix_tokens),
    ):
        if planned != actual:
            raise ValueError(f"plan was made for {name} {planned}, but the model has {name} {actual}")
