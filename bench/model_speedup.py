"""Whole models on a CPU: compressed against dense, literal and ideal, alternated in one process.

    python -m bench.model_speedup [--model deit_small_patch16_224] [--rounds 10]

Inference, and a training step's forward and backward with the activation memory that it takes. Writes
``bench/results/cpu/model_speedup.json`` and prints a table of ratios.
"""

import argparse
import contextlib
import json
import statistics
from functools import partial
from pathlib import Path

import torch

from pm_models.files import write_atomically
from pm_models.measure import alternate, count_gmacs
from pm_models.report import format_table

from .machine import describe
from .memory import activation_bytes
from .models import KEEP_RATE, PRUNE_RATE, compared_models

RESULTS = Path(__file__).parent / "results" / "cpu" / "model_speedup.json"
CASES = (
    ("inference", 1, "float32"),
    ("inference", 1, "bfloat16"),
    ("inference", 8, "float32"),
    ("inference", 32, "float32"),
    ("inference", 32, "bfloat16"),
    ("train", 8, "float32"),
    ("train", 8, "bfloat16"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="a timm Vision Transformer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="times each model is called per case (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to write (%(default)s)")
    options = parser.parse_args()

    models = compared_models(options.model)
    size = (3, *models["dense_eager"].patch_embed.img_size)
    gmacs = {name: count_gmacs(model, size) for name, model in models.items()}
    machine = describe()
    records = []
    for mode, batch, dtype in CASES:
        images, rounds = torch.randn(batch, *size), options.rounds * (4 if batch == 1 else 1)
        seconds = _measure(models, images, mode, dtype, rounds)
        milliseconds = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
        flops = 2e9 * gmacs["folded"] * batch * (3 if mode == "train" else 1)
        records.append(
            {
                "case": f"{options.model.split('_patch')[0]}/{mode}/b{batch}-{dtype}",
                "op": "model",
                "shape": [batch, *size],
                "dtype": dtype,
                "keep_rate": KEEP_RATE,
                "prune_rate": PRUNE_RATE,
                "ours_ms": milliseconds["folded"],
                "peers": {name: value for name, value in milliseconds.items() if name != "folded"},
                "spread_ms": {name: 1e3 * (max(times) - min(times)) for name, times in seconds.items()},
                "gmacs": gmacs,
                "flops": flops,
                "memory": _memory(models, images, dtype) if mode == "train" else {},
                "roofline_ms": flops / machine["matmul_tflops"][dtype] / 1e9,
            }
        )
        print(_table(records[-1:]), flush=True)
    write_atomically(options.output, (json.dumps({**machine, "records": records}, indent=2) + "\n").encode())
    print(f"\n{_table(records)}\n\n{options.output}")


def _measure(
    models: dict[str, torch.nn.Module], images: torch.Tensor, mode: str, dtype: str, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each model's calls."""

    def infer(model: torch.nn.Module) -> None:
        with torch.inference_mode(), _autocast(dtype):
            model(images)

    def train(model: torch.nn.Module) -> None:
        model.zero_grad()
        with _autocast(dtype):
            loss = model(images).float().square().mean()
        loss.backward()

    for model in models.values():
        model.train(mode == "train")
    call = train if mode == "train" else infer
    return alternate({name: partial(call, model) for name, model in models.items()}, rounds, synchronize=False)


def _memory(models: dict[str, torch.nn.Module], images: torch.Tensor, dtype: str) -> dict[str, int]:
    """Bytes of activations that each model's training step takes."""
    with _autocast(dtype):
        return {name: activation_bytes(model, images) for name, model in models.items()}


def _autocast(dtype: str) -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


def _table(records: list[dict]) -> str:
    rows = [("case", "images/s", "x dense", "x literal", "x ideal", "ideal x dense", "memory / dense")]
    for record in records:
        ours, peers, memory = record["ours_ms"], record["peers"], record["memory"]
        rows.append(
            (
                record["case"],
                f"{1e3 * record['shape'][0] / ours:.1f}",
                f"{peers['dense_eager'] / ours:.3f}",
                f"{peers['literal'] / ours:.3f}",
                f"{peers['ideal'] / ours:.3f}",
                f"{peers['dense_eager'] / peers['ideal']:.3f}",
                f"{memory['folded'] / memory['dense_eager']:.3f}" if memory else "",
            )
        )
    return format_table(rows)


if __name__ == "__main__":
    main()
