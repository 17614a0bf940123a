"""Whole-model inference on a CPU: compressed against dense, literal and ideal, alternated in one process.

    python -m bench.model_speedup [--model deit_small_patch16_224] [--rounds 10]

Writes ``bench/results/cpu/model_speedup.json`` and prints a table of ratios.
"""

import argparse
import contextlib
import json
import statistics
from pathlib import Path

import torch

from pm_models.files import write_atomically
from pm_models.measure import alternate, count_gmacs
from pm_models.report import format_table

from .machine import describe
from .models import KEEP_RATE, PRUNE_RATE, compared_models

RESULTS = Path(__file__).parent / "results" / "cpu" / "model_speedup.json"
CASES = ((1, "float32"), (1, "bfloat16"), (8, "float32"), (32, "float32"), (32, "bfloat16"))


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
    for batch, dtype in CASES:
        seconds = _measure(models, torch.randn(batch, *size), dtype, rounds=options.rounds * (4 if batch == 1 else 1))
        milliseconds = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
        flops = 2e9 * gmacs["folded"] * batch
        records.append(
            {
                "case": f"{options.model.split('_patch')[0]}/inference/b{batch}-{dtype}",
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
                "roofline_ms": flops / machine["matmul_tflops"][dtype] / 1e9,
            }
        )
        print(_table(records[-1:]), flush=True)
    write_atomically(options.output, (json.dumps({**machine, "records": records}, indent=2) + "\n").encode())
    print(f"\n{_table(records)}\n\n{options.output}")


def _measure(
    models: dict[str, torch.nn.Module], images: torch.Tensor, dtype: str, rounds: int
) -> dict[str, list[float]]:
    autocast = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
    with torch.inference_mode(), autocast:
        calls = {name: (lambda model=model: model(images)) for name, model in models.items()}
        return alternate(calls, rounds, synchronize=False)


def _table(records: list[dict]) -> str:
    rows = [("case", "images/s", "x dense", "x literal", "x ideal", "ideal x dense")]
    for record in records:
        ours, peers = record["ours_ms"], record["peers"]
        rows.append(
            (
                record["case"],
                f"{1e3 * record['shape'][0] / ours:.1f}",
                f"{peers['dense_eager'] / ours:.3f}",
                f"{peers['literal'] / ours:.3f}",
                f"{peers['ideal'] / ours:.3f}",
                f"{peers['dense_eager'] / peers['ideal']:.3f}",
            )
        )
    return format_table(rows)


if __name__ == "__main__":
    main()
