"""A timm Vision Transformer whose blocks run on merged tokens, by the paper's word or folded."""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import NoneType

import torch
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pm_kernels import token_mix, transition

from .attention import (
    attends_apart,
    fusable_attentions,
    fuse,
    fused_attentions,
    merges_inside,
    opening_norm,
    plain_attention,
    refuse_masks,
    replace_module,
    run_block,
    run_merging,
    runs_rewired,
)
from .folding import READOUTS, SHORTCUTS, TRAIN_MATRICES, Folded, Folding, Run, StageMatrices, Transition
from .plan import CompressionPlan
from .rewiring import Rewired
from .rotary import RotaryPositions
from .unwrapping import unwrapped

PlainModel = VisionTransformer | Eva  # the classes that can be compressed, their subclass for distillation too
Versions = tuple[tuple[int, int], ...]

EXECUTIONS = ("folded", "literal")
MERGE_SITES = ("block", "attention")
# What compress takes beside the model, under the names of a compressed model's attributes.
COMPRESSION = ("plan", "train_matrices", "size_bias", "merge_site", "shortcut")


class Compressed(nn.Module):
    """What every compressed model has in common, whichever of timm's classes it is beside; :func:`compress` makes one.

    It takes over the given model's modules, whose parameter names stay timm's; the matrices are added under
    ``stages.<first block>.merge`` and ``.reconstruct``.

    Args:
        model: the model to take over. It is not copied.
        plan: what each block keeps, merges and prunes.
        train_matrices: see :func:`compress`.
        size_bias: see :func:`compress`.
        merge_site: see :func:`compress`.
        shortcut: see :func:`compress`.
    """

    plain_class: type[nn.Module]  # timm's, whose forwards run

    def __init__(
        self,
        model: PlainModel,
        plan: CompressionPlan,
        *,
        train_matrices: str | None = "support",
        size_bias: bool = False,
        merge_site: str = "block",
        shortcut: str = "pruned",
    ) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        self.plan = plan
        self.train_matrices = train_matrices
        self.size_bias = size_bias
        self.merge_site = merge_site
        self.shortcut = shortcut
        self._execution = "folded"
        self._folded: dict[tuple, tuple[Versions, Folded]] = {}
        self._merged_tables: dict[tuple, tuple[Versions, list[Tensor]]] = {}
        for index, block in enumerate(self.blocks):
            sizes = plan.token_sizes(index) if size_bias and plan.stage_of(index) is not None else None
            for name, attention in fusable_attentions(block).items():
                replace_module(block, name, fuse(attention, key_bias=None if sizes is None else sizes.log()))
        self.stages = nn.ModuleDict(
            {str(stage.first): StageMatrices(plan, stage, train_matrices, shortcut) for stage in plan.stages}
        )
        # Where blocks rotate queries and keys by their positions, merged tokens have positions of their own.
        rotary = getattr(self, "rope", None) is not None
        self._positions = RotaryPositions(self.rope, plan, getattr(self, "rope_mixed", False)) if rotary else None
        self._find_runs()
        self.stages.to(self.patch_embed.proj.weight)
        self.register_load_state_dict_post_hook(_refold_loaded)
        self._refold()

    @property
    def execution(self) -> str:
        """``"folded"``: no full token map between blocks; ``"literal"``: the paper's equations, word by word.

        With ``merge_site="attention"`` every merge needs the full map, and the two are the same.
        """
        return self._execution

    @execution.setter
    def execution(self, value: str) -> None:
        if value not in EXECUTIONS:
            raise ValueError(f"execution must be one of {', '.join(map(repr, EXECUTIONS))}, got {value!r}")
        self._execution = value

    @property
    def compression(self) -> dict[str, object]:
        """The arguments of :func:`compress` that made it, as JSON has them."""
        return {name: getattr(self, name) for name in COMPRESSION} | {"plan": self.plan.to_dict()}

    def merge_matrices(self) -> list[Tensor]:
        """The merge matrix (C, N) of each compressed block, in order; blocks of one stage share theirs.

        With ``train_matrices="dense"`` they are the parameters themselves.
        """
        return [matrices.merge_matrix() for matrices in self._block_matrices()]

    def reconstruct_matrices(self) -> list[Tensor]:
        """The reconstruct matrix (N, C) of each compressed block, in order; blocks of one stage share theirs.

        With ``train_matrices="dense"`` they are the parameters themselves.
        """
        return [matrices.reconstruct_matrix() for matrices in self._block_matrices()]

    def transitions(self) -> list[Transition | None]:
        """The matrix that makes each stage's state from the one before, in order, as folded execution takes them.

        Uncompressed blocks between stages have one too. ``None`` is a state that stays as it is.
        """
        like = self.patch_embed.proj.weight
        return self._fold(self._pooled_readout(), like.dtype, like.device).transitions

    def uncompressed(self) -> PlainModel:
        """A plain timm model with a copy of the same weights, without the plan and its matrices."""
        model = copy.deepcopy(unwrapped(self))
        plain = self.plain_class.__new__(self.plain_class)
        nn.Module.__init__(plain)
        plain.__dict__.update({name: value for name, value in vars(model).items() if name not in _OF_COMPRESSION})
        for name in ("stages", "_foldings", "_positions"):
            plain._modules.pop(name, None)
        for key, hook in list(plain._load_state_dict_post_hooks.items()):
            if hook is _refold_loaded:
                del plain._load_state_dict_post_hooks[key]
        # Where timm made it under a name of ours, it recorded the options of compression too.
        recorded = getattr(plain, "_model_args", {})
        plain._model_args = {name: value for name, value in recorded.items() if name not in _OF_COMPRESSION}
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
        """timm's ``forward_intermediates``: the full token map after each block asked for."""
        refuse_masks(kwargs.pop("attn_mask", None), kwargs.pop("is_causal", False))
        taken, _ = feature_take_indices(len(self.blocks), indices)
        blocks = _CapturingBlocks(self, taken, len(self.blocks))
        return self.plain_class.forward_intermediates(self._around(blocks), x, indices, *args, **kwargs)

    def prune_intermediate_layers(self, *args: object, **kwargs: object) -> list[int]:
        """timm's ``prune_intermediate_layers``; a stage that the cut goes through ends with the last block left."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        for first in [first for first in self.stages if int(first) >= len(self.blocks)]:
            del self.stages[first]
        self._find_runs()
        self._refold()
        return taken

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Refused where it would change the grid, which the plan was made for.

        Raises:
            ValueError: the new size has another grid than the plan.
        """
        height, width = img_size or self.patch_embed.img_size
        rows, columns = patch_size or self.patch_embed.patch_size
        if (height // rows, width // columns) != self.plan.grid:
            raise ValueError(
                f"img_size {(height, width)} with patches of {(rows, columns)} gives a grid of "
                f"{(height // rows, width // columns)}, but the plan was made for {self.plan.grid}; "
                "make a plan from scores at the new size"
            )
        super().set_input_size(img_size=img_size, patch_size=patch_size)

    def no_weight_decay(self) -> set[str]:
        """timm's parameters without weight decay, and the merge and reconstruct matrices."""
        return set(super().no_weight_decay()) | {f"stages.{name}" for name, _ in self.stages.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's layer groups; a stage's matrices belong to its first block."""
        groups = super().group_matcher(coarse)
        return groups | {"blocks": [*groups["blocks"], (r"^stages\.(\d+)", None)]}

    def train(self, mode: bool = True) -> "Compressed":
        super().train(mode)
        self._refold()
        return self

    def _apply(self, *args: object, **kwargs: object) -> "Compressed":
        super()._apply(*args, **kwargs)
        self._refold()
        return self

    def _features(self, readout: str, x: Tensor) -> Tensor:
        """Images to the normalised rows of ``readout``, by timm's ``forward_features``."""
        return self.plain_class.forward_features(self._around(_AllBlocks(self, readout)), x)

    def _around(self, blocks: "_AllBlocks | _CapturingBlocks") -> Rewired:
        """The model as timm's forwards see it: they embed, walk ``blocks``, and normalise; checkpointing is ours.

        ``rope_mixed`` would hand each block its own part of the rotary table, but it is one call that runs them all.
        """
        return Rewired(self, blocks=blocks, grad_checkpointing=False, rope_mixed=False)

    def _find_runs(self) -> None:
        """What follows from the plan and the blocks: which runs there are, and how they fold for each readout."""
        self._runs = list(_runs(self.stages, self.plan, len(self.blocks)))
        readouts = [readout for readout in READOUTS if self.stages and (readout != "prefix" or self.num_prefix_tokens)]
        self._foldings = nn.ModuleDict(
            {
                readout: Folding(self._runs, self.plan.num_tokens, self.num_prefix_tokens, readout)
                for readout in readouts
            }
        ).to(self.patch_embed.proj.weight.device)

    def _block_matrices(self) -> Iterator[StageMatrices]:
        for run in self._runs:
            if run.matrices is not None:
                yield from [run.matrices] * (run.last - run.first + 1)

    def _pooled_readout(self) -> str:
        """The rows that the head reads."""
        if self.attn_pool is not None or getattr(self, "pool_include_prefix", False):
            return "all"
        if self.global_pool == "token":
            return "prefix"
        # The mean of the patches is linear, a norm before it is not.
        if self.global_pool == "avg" and isinstance(self.norm, nn.Identity):
            return "patch_mean"
        return "all"

    def _run(
        self, readout: str, x: Tensor, rope: Tensor | None = None, maps: dict[int, Tensor | None] | None = None
    ) -> Tensor:
        """Run the blocks on x (B, N, D), and a rotary table of the patches, and return the rows of ``readout``.

        With ``maps``, fill in the full map after each block that it has a key for, stop after the last of them, and
        return its map.
        """
        if x.shape[1] != self.plan.num_tokens:
            raise ValueError(
                f"the images give {x.shape[1]} tokens, but the plan was made for a grid of {self.plan.grid} and "
                f"{self.plan.num_prefix_tokens} prefix tokens: {self.plan.num_tokens} tokens"
            )
        positions = self._block_positions(rope)
        if self._is_literal():
            return self._run_literal(x, positions, maps or {})
        return self._run_folded(readout, x, positions, maps or {})

    def _is_literal(self) -> bool:
        # Dynamo of PyTorch 2.11 traces the length of modules, not their truth.
        return self._execution == "literal" or self.merge_site == "attention" or len(self.stages) == 0

    def _run_literal(self, x: Tensor, positions: list[dict[str, Tensor]], maps: dict[int, Tensor | None]) -> Tensor:
        """Section 3 of the paper: ``y = M x``, the blocks, ``x = R y + (1 - mask) * x``; always all N tokens.

        With ``shortcut="all"`` a token that shares a merged token has ``x - R M x`` added.
        With ``merge_site="attention"`` the first block of a stage takes x itself, and merges in its attention.
        """
        for run in self._runs:
            stage = run.matrices
            merge = None if stage is None else stage.merge_matrix()
            inside = merge is not None and self.merge_site == "attention"
            y = merged = x if merge is None or inside else token_mix(x, merge)
            if inside and stage.keeps_rest:
                merged = token_mix(x, merge)
            for index in range(run.first, run.last + 1):
                block = self.blocks[index]
                step = partial(run_merging, block, merge=merge) if inside and index == run.first else block
                y = self._block(partial(step, **positions[index]), y)
                if index in maps or index == run.last:
                    full = y if stage is None else stage.full_map(y, merged, x)
                    if index in maps:
                        maps[index] = full
                        if index == max(maps):
                            return full
            x = full
        return x

    def _run_folded(
        self, readout: str, x: Tensor, positions: list[dict[str, Tensor]], maps: dict[int, Tensor | None]
    ) -> Tensor:
        """The same through folded transitions: between stages there is only the state, see :mod:`.folding`.

        The state is in three tensors: the next transition mixes ``[x + update; carried]``.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        folded = self._fold(readout, dtype, x.device)
        blocks = list(self.blocks)
        # Where the readout reads the prefix rows alone, the last block computes no others. Only with matrices on the
        # plan's support is it so: a prefix token is read off its own row, with dense matrices off all rows.
        reads_prefix = readout == "prefix" and self.train_matrices != "dense" and attends_apart(blocks[-1])
        recomputed = self.grad_checkpointing and torch.is_grad_enabled()
        update = carried = None
        for index, (run, matrix) in enumerate(zip(self._runs, folded.transitions, strict=True)):
            for block in range(run.first, run.last + 1):
                step = partial(
                    self._step,
                    blocks[block],
                    matrix=matrix if block == run.first else None,
                    computed=self.plan.num_tokens if run.matrices is None else run.matrices.shape[0],
                    rows=self.num_prefix_tokens if reads_prefix and block == len(blocks) - 1 else None,
                    # A step that is computed again keeps its inputs, of which one is less than two.
                    apart=block == run.last and block not in maps and not recomputed and runs_rewired(blocks[block]),
                    positions=positions[block],
                )
                x, update, carried = checkpoint(step, x, update, carried) if recomputed else step(x, update, carried)
                if block in maps:
                    frame = folded.frames[index]
                    maps[block] = x if frame is None else transition(x, carried, frame, self.plan.num_tokens)[0]
                    if block == max(maps):
                        return maps[block]
        if folded.readout is None:
            return x if update is None else x + update
        if readout == "prefix" and self.train_matrices != "dense":
            x, carried = x[:, : self.num_prefix_tokens], None
            update = None if update is None else update[:, : self.num_prefix_tokens]
        return transition(x, carried, folded.readout, update=update)[0]

    def _step(
        self,
        block: nn.Module,
        x: Tensor,
        update: Tensor | None,
        carried: Tensor | None,
        *,
        matrix: Transition | None,
        computed: int,
        rows: int | None,
        apart: bool,
        positions: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """A block, and the transition before it where there is one, from state to state."""
        normed = None
        if matrix is not None:
            norm = opening_norm(block)
            x, carried, normed = transition(x, carried, matrix, computed, update=update, norm=norm)
        return *run_block(block, x, normed=normed, rows=rows, apart=apart, **positions), carried

    def _block_positions(self, table: Tensor | None) -> list[dict[str, Tensor]]:
        """What each block takes beside its tokens: their rotary table, (tokens, 2 * d) or (H, tokens, 2 * d)."""
        if table is None:
            return [{} for _ in self.blocks]
        return [{"rope": part} for part in self._merged_table(table)]

    def _merged_table(self, table: Tensor) -> list[Tensor]:
        """A rotary table of the patches, by its merged tokens for each block.

        It is made anew where it trains or is changed at random. Elsewhere it is kept as folded matrices are.
        """
        augmented = self.training and getattr(self.rope, "aug_active", False)
        if augmented or (torch.is_grad_enabled() and any(part.requires_grad for part in self.rope.parameters())):
            return self._merge_table(table)
        kept = self._merged_tables.get((table.dtype, table.device))
        if torch.compiler.is_compiling():
            return self._merge_table(table) if kept is None else kept[1]
        versions = _versions((*self.rope.parameters(), *self.rope.buffers()))
        if kept is None or kept[0] != versions:
            with torch.inference_mode(False), torch.no_grad():
                kept = versions, self._merge_table(table.clone())
            self._merged_tables[table.dtype, table.device] = kept
        return kept[1]

    def _merge_table(self, table: Tensor) -> list[Tensor]:
        return self._positions(table, [(run.first, run.last, run.matrices is not None) for run in self._runs])

    def _block(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x)
        return block(x)

    def _fold(self, readout: str, dtype: torch.dtype, device: torch.device) -> Folded:
        """The folded matrices for ``readout``, in the dtype that the ops will run in.

        They are computed anew where a gradient has to reach the matrices. Elsewhere they are kept until a matrix
        changes; a compiled graph reads what was kept when the model was last moved, loaded or put into a mode.
        """
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.stages.parameters()):
            return self._foldings[readout]().to(dtype)
        kept = self._folded.get((readout, dtype, device))
        if torch.compiler.is_compiling():
            return self._foldings[readout]().to(dtype) if kept is None else kept[1]
        versions = self._matrix_versions()
        if kept is None or kept[0] != versions:
            with torch.inference_mode(False), torch.no_grad():
                kept = versions, self._foldings[readout]().to(dtype).structured()
            self._folded[readout, dtype, device] = kept
        return kept[1]

    def densify(self) -> None:
        """Mix tokens by matrix products alone from here on, until a matrix changes: for runtimes without others."""
        with torch.no_grad():
            if self._is_literal():
                for matrices in self.stages.values():
                    matrices.densify()
                return
            for readout in self._foldings:
                like = self.patch_embed.proj.weight
                folded = self._fold(readout, like.dtype, like.device)
                self._folded[readout, like.dtype, like.device] = self._matrix_versions(), folded.dense()

    def _matrix_versions(self) -> Versions:
        return _versions(
            tensor for matrices in self.stages.values() for tensor in (matrices.merge, matrices.reconstruct)
        )

    def _refold(self) -> None:
        """Forget what was kept, and fold for inference, so that a compiled graph finds it.

        Matrices of which this process has only a share (FSDP) are whole during a forward alone.
        """
        self._folded.clear()
        self._merged_tables.clear()
        whole = all(type(parameter) is nn.Parameter for parameter in self.stages.parameters())
        if self.stages and whole and not self.training:
            like = self.patch_embed.proj.weight
            with torch.no_grad():
                self._fold(self._pooled_readout(), like.dtype, like.device)
                if self._positions is not None:
                    self._merged_table(self.rope.get_embed(shape=list(self.plan.grid)))


# The attributes that a compressed model has beside a plain one's, its modules and hook aside.
_OF_COMPRESSION = {
    *COMPRESSION, "_execution", "_folded", "_merged_tables", "_positions", "_runs",
    "forward", "_original_forward",  # where accelerate wrapped it, it is the compressed model's
}  # fmt: skip


class PMVisionTransformer(Compressed, VisionTransformer):
    """A timm :class:`~timm.models.VisionTransformer` compressed by a plan; :func:`compress` makes one."""

    plain_class = VisionTransformer


class PMVisionTransformerDistilled(PMVisionTransformer, VisionTransformerDistilled):
    """The same on timm's :class:`~timm.models.deit.VisionTransformerDistilled`: two prefix tokens, two heads."""

    plain_class = VisionTransformerDistilled


class PMEva(Compressed, Eva):
    """The same on timm's :class:`~timm.models.eva.Eva`: EVA-02, DINOv3 and others, with rotary positions or without.

    A merged token stands at the mean of its patches' positions, by the weights of the plan's merge matrix.
    """

    plain_class = Eva


class _AllBlocks:
    """Blocks as ``forward_features`` runs them: a VisionTransformer calls them, an Eva walks them and meets one."""

    def __init__(self, model: Compressed, readout: str) -> None:
        self._model = model
        self._readout = readout

    def __call__(self, x: Tensor, rope: Tensor | None = None, **_: object) -> Tensor:
        return self._model._run(self._readout, x, rope)

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        yield self


class _CapturingBlocks:
    """Blocks as ``forward_intermediates`` walks them: the first call runs the model, each hands out its full map."""

    def __init__(self, model: Compressed, taken: list[int], depth: int) -> None:
        self._model = model
        self._taken = taken
        self._depth = depth

    def __len__(self) -> int:
        return self._depth

    def __getitem__(self, blocks: slice) -> "_CapturingBlocks":
        return _CapturingBlocks(self._model, self._taken, len(range(self._depth)[blocks]))

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor | None]]:
        maps: dict[int, Tensor | None] = dict.fromkeys((*self._taken, self._depth - 1))

        def first(x: Tensor, rope: Tensor | None = None, **_: object) -> Tensor | None:
            self._model._run("all", x, rope, maps)
            return maps.get(0)

        yield first
        for index in range(1, self._depth):
            yield lambda *_, index=index, **__: maps.get(index)


_COMPRESSED_CLASSES: dict[type[PlainModel], type[Compressed]] = {
    compressed.plain_class: compressed for compressed in (PMVisionTransformer, PMVisionTransformerDistilled, PMEva)
}


def compress(
    model: PlainModel,
    plan: CompressionPlan,
    *,
    train_matrices: str | None = "support",
    size_bias: bool = False,
    merge_site: str = "block",
    shortcut: str = "pruned",
) -> Compressed:
    """Compress a timm Vision Transformer by a plan (arXiv 2503.23455, section 3).

    Args:
        model: a timm VisionTransformer, VisionTransformerDistilled or Eva, or a wrapper of one (``torch.compile``,
            DistributedDataParallel, accelerate, ...); it is left as it was.
        plan: made for the model's grid, depth and prefix tokens.
        train_matrices: which entries of the merge and reconstruct matrices train: ``"support"``, the plan's nonzeros;
            ``"dense"``, all; ``None``, none.
        size_bias: add the logarithm of the number of tokens that a merged token stands for to its logits as a key
            (proportional attention).
        merge_site: where a stage's first block merges: ``"block"``, before it, as in the paper; ``"attention"``, inside
            its attention, whose norm and projection to queries, keys and values then see all tokens: more work, and
            what a merge averages is normalised already.
        shortcut: what skips a block: ``"pruned"``, pruned tokens, as in the paper; ``"all"``, whatever the merge leaves
            out, ``x - R M x``: merged tokens share what the block adds, and each keeps what it had. More rows are
            carried from block to block.

    Returns:
        A new model, of the given one's class in every way, on the same device, in the same dtype and mode: a
        :class:`PMVisionTransformer`, or a :class:`PMEva`.

    Raises:
        TypeError: the model is of another class.
        ValueError: the model has a part that cannot be compressed, or the plan was made for another model.
    """
    if train_matrices not in TRAIN_MATRICES:
        raise ValueError(f"train_matrices must be 'support', 'dense' or None, got {train_matrices!r}")
    if merge_site not in MERGE_SITES:
        raise ValueError(f"merge_site must be 'block' or 'attention', got {merge_site!r}")
    if shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut must be 'pruned' or 'all', got {shortcut!r}")
    model = unwrapped(model)
    _check_model(model, size_bias)
    _check_plan(model, plan)
    if merge_site == "attention":
        for stage in plan.stages:
            if not merges_inside(model.blocks[stage.first]):
                raise ValueError(
                    f"merge_site='attention' needs timm's Block with its Attention, ungated; block {stage.first} is a "
                    f"{type(model.blocks[stage.first]).__name__} that has another"
                )
    return _COMPRESSED_CLASSES[type(model)](
        copy.deepcopy(model),
        plan,
        train_matrices=train_matrices,
        size_bias=size_bias,
        merge_site=merge_site,
        shortcut=shortcut,
    )


def check_vision_transformer(model: nn.Module) -> None:
    """Refuse what is no plain timm VisionTransformer, saying why.

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
                f"size_bias needs timm's Attention in every block, block {index} is a {type(block).__name__} without"
            )
        for attention in attentions.values():
            if attention.attn_drop.p > 0:
                raise ValueError(
                    f"model has attention dropout {attention.attn_drop.p} (attn_drop_rate) in block {index}, which "
                    "no fused kernel does; create it with attn_drop_rate=0"
                )


def _check_plan(model: PlainModel, plan: CompressionPlan) -> None:
    if not isinstance(plan, CompressionPlan):
        raise TypeError(f"plan must be a CompressionPlan, got {type(plan).__name__}")
    for name, planned, actual in (
        ("grid", plan.grid, tuple(model.patch_embed.grid_size)),
        ("depth", plan.depth, len(model.blocks)),
        ("num_prefix_tokens", plan.num_prefix_tokens, model.num_prefix_tokens),
    ):
        if planned != actual:
            raise ValueError(f"plan was made for {name} {planned}, but the model has {name} {actual}")


def _runs(stages: nn.ModuleDict, plan: CompressionPlan, depth: int) -> Iterator[Run]:
    """The stages, and between them the uncompressed blocks, up to ``depth``."""
    block = 0
    while block < depth:
        stage = plan.stage_of(block)
        if stage is None:
            later = [other.first for other in plan.stages if other.first > block]
            last = min([depth, *later]) - 1
            yield Run(block, last, None)
        else:
            last = min(stage.last, depth - 1)
            yield Run(block, last, stages[str(stage.first)])
        block = last + 1


def _refold_loaded(model: Compressed, _: object) -> None:
    model._refold()


def _versions(tensors: Iterable[Tensor]) -> Versions:
    """Changes with every change of a tensor, in place or by another one in its place."""
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
