"""Whole models: compressed against dense, literal, ideal, ToMe, EViT and DynamicViT, on one set of weights.

Keep rate 0.6, prune rate 0.1 on random scores; the peers' own settings are such that their GMACs come closest to ours.
Inference, and a training step's forward and backward with the activation memory that it takes. Adaptive merging has
0.62 of the GMACs, and each block of its ``ideal`` as many tokens as it has. On a CPU all run eagerly. Segmenter-L at
640 pixels has keep rate 0.7, and ALGM's local merging for a peer. On a GPU, in bfloat16, ``ours``, ``dense_compiled``
and ``ideal`` are compiled for CUDA graphs, and ``dense_autotuned`` has its products tuned besides; ``ours_eager`` and
the others run eagerly.
"""

import contextlib
import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pm_models.models import input_size

from . import comparison
from .memory import activation_bytes
from .models import (
    KEEP_RATE,
    PRUNE_RATE,
    SEGMENTER_KEEP_RATE,
    Compared,
    compared_adaptive,
    compared_models,
    compared_segmenters,
)

SMALL, TINY, BASE = "deit_small_patch16_224", "deit_tiny_patch16_224", "deit_base_patch16_224"
BASE_384, SMALL_14 = "vit_base_patch16_384", "vit_small_patch14_dinov2"
SEGMENTER = "segmenter_large"


class Case(NamedTuple):
    """One measurement: ``mode`` inference, train, or adaptive, which is inference with adaptive merging."""

    model: str
    mode: str
    batch: int
    dtype: str

    def __str__(self) -> str:
        resolution = "-384" if self.model.endswith("384") else ""
        precision = {"bfloat16": "bf16", "float32": "f32"}[self.dtype]
        return f"{self.model.split('_patch')[0]}{resolution}/{self.mode}/b{self.batch}-{precision}"


QUICK = {
    "cpu": [
        Case(SMALL, "inference", 1, "float32"),
        Case(SMALL, "inference", 1, "bfloat16"),
        Case(SMALL, "inference", 8, "float32"),
        Case(SMALL, "inference", 32, "float32"),
        Case(SMALL, "inference", 32, "bfloat16"),
        Case(SMALL, "train", 8, "float32"),
        Case(SMALL, "train", 8, "bfloat16"),
        *(
            Case(name, "adaptive", batch, dtype)
            for name in (SMALL, SMALL_14)
            for batch, dtype in ((8, "float32"), (8, "bfloat16"), (32, "float32"), (32, "bfloat16"))
        ),
    ],
    "cuda": [
        Case(SMALL, "inference", 256, "bfloat16"),
        Case(SMALL, "train", 256, "bfloat16"),
        Case(SMALL, "adaptive", 256, "bfloat16"),
        Case(SMALL_14, "adaptive", 256, "bfloat16"),
    ],
}
FULL = {
    "cpu": [
        *(Case(name, mode, 8, "float32") for name in (TINY, BASE) for mode in ("inference", "train")),
        Case(SEGMENTER, "inference", 1, "float32"),
    ],
    "cuda": [
        *(Case(SMALL, mode, batch, "bfloat16") for mode, batch in (("inference", 1), ("inference", 32), ("train", 32))),
        *(
            Case(name, mode, batch, "bfloat16")
            for name in (TINY, BASE, BASE_384)
            for mode, batches in (("inference", (1, 32, 256)), ("train", (32, 256 if name != BASE_384 else 64)))
            for batch in batches
        ),
        *(Case(SEGMENTER, "inference", batch, "bfloat16") for batch in (1, 8)),
        Case(SEGMENTER, "train", 8, "bfloat16"),
    ],
}
PEERS = ("dense_eager", "literal", "ideal", "tome", "evit")
SEGMENTER_PEERS = ("dense_eager", "literal", "local_merge")
ADAPTIVE_PEERS = ("dense_eager", "ideal", "tome")


def cases(device: str, full: bool) -> list[Case]:
    """Those of every day, or all."""
    return QUICK[device] + (FULL[device] if full else [])


def names(case: Case, device: str) -> list[str]:
    """Ours and the peers. DynamicViT trains on all tokens, masked, so that there it has nothing to show."""
    compiled = ["ours_eager", "dense_compiled", "dense_autotuned"] if device == "cuda" else []
    if case.model == SEGMENTER:
        return ["ours", *compiled, *SEGMENTER_PEERS]
    if case.mode == "adaptive":
        return ["ours", *compiled, *ADAPTIVE_PEERS]
    return ["ours", *compiled, *PEERS, *(["dynamicvit"] if case.mode == "inference" else [])]


@functools.lru_cache(maxsize=1)
def compared(name: str, device: str, adaptive: bool = False) -> Compared:
    """The last model's peers stay, as its cases come one after another."""
    if name == SEGMENTER:
        return compared_segmenters().to(device)
    return (compared_adaptive if adaptive else compared_models)(name).to(device)


def measure(case: Case, device: str, machine: dict) -> dict:
    """One record."""
    torch.compiler.reset()
    found = compared(case.model, device, case.mode == "adaptive")
    images = torch.randn(case.batch, *input_size(found.models["ours"]), device=device)
    chosen = {
        name: _prepared(found.models[weights_of(name)].train(case.mode == "train"), name, device)
        for name in names(case, device)
    }
    call = partial(_train if case.mode == "train" else _infer, device=device, dtype=case.dtype, images=images)
    rounds = {1: 40, 8: 12}.get(case.batch, 8)
    keep_rate = KEEP_RATE
    if case.model == SEGMENTER:
        rounds, keep_rate = 5, SEGMENTER_KEEP_RATE
    flops = 2e9 * found.gmacs["ours"] * case.batch * (3 if case.mode == "train" else 1)
    facts = {"gmacs": found.gmacs, "settings": found.settings}
    if case.mode != "adaptive":
        facts |= {"keep_rate": keep_rate, "prune_rate": PRUNE_RATE}
    if case.mode == "train":
        facts["memory"] = _memory(chosen, images, device, case.dtype)
    calls = {name: partial(call, model) for name, model in chosen.items()}
    return comparison.record(
        str(case), "model", calls, images, 0, flops, machine, rounds=rounds, dtype=case.dtype, **facts
    )


def weights_of(name: str) -> str:
    """The model that runs under a name."""
    return {"dense_compiled": "dense_eager", "dense_autotuned": "dense_eager", "ours_eager": "ours"}.get(name, name)


def _prepared(model: nn.Module, name: str, device: str) -> Callable[[Tensor], Tensor]:
    modes = {"ours": "reduce-overhead", "ideal": "reduce-overhead", "dense_compiled": "reduce-overhead"}
    mode = (modes | {"dense_autotuned": "max-autotune"}).get(name)
    return model if device == "cpu" or mode is None else torch.compile(model, mode=mode, fullgraph=True)


def _infer(model: Callable[[Tensor], Tensor], images: Tensor, device: str, dtype: str) -> None:
    with torch.inference_mode(), _autocast(device, dtype):
        model(images)


def _train(model: Callable[[Tensor], Tensor], images: Tensor, device: str, dtype: str) -> None:
    with _autocast(device, dtype):
        loss = model(images).float().square().mean()
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def _memory(models: dict[str, Callable[[Tensor], Tensor]], images: Tensor, device: str, dtype: str) -> dict[str, int]:
    """Bytes of activations that each model's training step takes."""
    with _autocast(device, dtype):
        return {name: activation_bytes(model, images) for name, model in models.items()}


def _autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
