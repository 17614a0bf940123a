"""What the model suite should take on GPUs that are not at hand, by counting: predicted, not measured.

    python -m bench.predict h100 [--measured FOLDER/model.json]

writes bench/results/predicted/h100.json, or prints the prediction beside what was measured, so that a first run on a
card says which part is not where it should be. Every operator takes the longer of moving its bytes at
the card's published bandwidth and computing at its published rate in bfloat16, and a gap between two launches. No real
kernel reaches those rates, so that a measured time is above, and what runs eagerly waits for Python besides. What is
compiled has its operators between two products fused into one launch.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pm_kernels import runtime
from pm_models.models import input_size
from pm_models.tables import format_table

from . import model, results
from .resources import TARGETS


class Card(NamedTuple):
    """Published rates: bytes per second, and floating-point operations per second in bfloat16, dense."""

    family: int
    bandwidth: float
    rate: float


CARDS = {
    "a100": Card(80, 2039e9, 312e12),
    "h100": Card(90, 3350e9, 989e12),
    "h200": Card(90, 4800e9, 989e12),
    "b200": Card(100, 8000e9, 2250e12),
}
GAP = 2e-6  # seconds between two launches, in a CUDA graph about as in a full stream
COMPILED = ("ours", "ideal", "dense_compiled")


class Launch(NamedTuple):
    """One operator: bytes read and written, and floating-point operations; ``fuses`` with its like when compiled."""

    bytes: int
    flops: int
    fuses: bool


class _Launches(TorchDispatchMode):
    """Counts operators on meta tensors. Views launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Launch] = []

    def __torch_dispatch__(self, op: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = op(*args, **(kwargs or {}))
        if not any(result.alias_info and not result.alias_info.is_write for result in op._schema.returns):
            tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            formula = flop_registry.get(op.overloadpacket)
            flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
            ours = op.namespace == runtime.__package__
            if op.overloadpacket not in (torch.ops.aten.empty, torch.ops.aten.new_empty):
                moved = sum(map(_nbytes, tensors.values()))
                self.found.append(Launch(moved, flops, fuses=not (formula or ours)))
        return out


class _FlashAttention(TorchFunctionMode):
    """PyTorch's attention as one launch, which on meta tensors it is not."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = args[:3]
        self.launches.append(Launch(sum(map(_nbytes, (q, k, v, q))), 4 * q.numel() * k.shape[2], fuses=False))
        return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)


def _nbytes(x: Tensor) -> int:
    """Of what is in memory: a dimension that is only broadcast counts once."""
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count


def launches(call: Callable[[], object], card: Card) -> list[Launch]:
    """What a call on meta tensors would launch on a card."""
    target, before = TARGETS[card.family], runtime.target
    device = runtime.Device(card.family, target.multiprocessors, target.shared_per_program)
    runtime.target = lambda tensor: device
    try:
        with torch.no_grad(), _Launches() as counted, _FlashAttention(counted.found):
            call()
    finally:
        runtime.target = before
    return counted.found


def fused(found: list[Launch]) -> list[Launch]:
    """As a compiler would launch them: neighbours that fuse read what the first does and write what the last does."""
    kept: list[Launch] = []
    for launch in found:
        if launch.fuses and kept and kept[-1].fuses:
            kept[-1] = kept[-1]._replace(bytes=max(kept[-1].bytes, launch.bytes))
        else:
            kept.append(launch)
    return kept


def seconds(found: list[Launch], card: Card) -> float:
    """The time of launches, one after another."""
    return sum(max(each.bytes / card.bandwidth, each.flops / card.rate) + GAP for each in found)


def predictions(card: Card) -> Iterator[dict]:
    """A record for each model of each case of inference in the model suite."""
    for case in model.cases("cuda", full=True):
        if case.mode == "train" or case.model == model.SEGMENTER:
            continue
        models = model.compared(case.model, "cpu", case.mode == "adaptive").models
        for name in set(model.names(case, "cuda")) - {"dense_autotuned", "literal"}:
            network = models[model.weights_of(name)].to("meta", torch.bfloat16)
            images = torch.empty(case.batch, *input_size(network), device="meta", dtype=torch.bfloat16)
            found = launches(partial(network, images), card)
            found = fused(found) if name in COMPILED else found
            counts = {
                "launches": len(found),
                "bytes": sum(x.bytes for x in found),
                "flops": sum(x.flops for x in found),
            }
            yield {"case": str(case), "name": name, "predicted_ms": 1e3 * seconds(found, card), **counts}


def beside(measured: Path, card: str) -> str:
    """A table of what a result file of the suite says was measured, over what was predicted."""
    records = {record["case"]: record for record in json.loads(measured.read_text(encoding="utf-8"))["records"]}
    rows = [("case", "model", "predicted, ms", "measured, ms", "ratio")]
    for row in predictions(CARDS[card]):
        record = records.get(row["case"], {"peers": {}})
        if time := (record["peers"] | {"ours": record.get("ours_ms")}).get(row["name"]):
            least = row["predicted_ms"]
            rows.append((row["case"], row["name"], f"{least:.3f}", f"{time:.3f}", f"{time / least:.2f}"))
    return format_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__.splitlines()[0])
    parser.add_argument("card", choices=CARDS)
    parser.add_argument("--measured", type=Path, help="a model.json: print the prediction beside it, and write nothing")
    options = parser.parse_args()
    if options.measured:
        print(beside(options.measured, options.card))
        return
    card = CARDS[options.card]
    facts = {"predicted": "counted, not measured", "card": options.card, "gap_seconds": GAP, **card._asdict()}
    results.write(results.FOLDER / "predicted" / f"{options.card}.json", facts, list(predictions(card)))


if __name__ == "__main__":
    main()
