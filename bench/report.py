"""Tables from result files, and the README's table from them.

python -m bench.report        # rewrites the README's table
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu" / "model_speedup.json"
_START, _END = "<!-- table: bench/results/cpu/model_speedup.json -->\n", "<!-- end -->"


def speedup_table(results: dict) -> str:
    """Markdown: throughput of the compressed model and its ratio to each peer, and in training its memory."""
    lines = [
        "| | batch | precision | images/s | to dense | to literal | to ideal | memory to dense |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for record in results["records"]:
        ours, peers, memory = record["ours_ms"], record["peers"], record["memory"]
        ratios = " | ".join(f"{peers[name] / ours:.2f}x" for name in ("dense_eager", "literal", "ideal"))
        batch, mode = record["shape"][0], record["case"].split("/")[1]
        share = f"{memory['folded'] / memory['dense_eager']:.2f}x" if memory else ""
        lines.append(f"| {mode} | {batch} | {record['dtype']} | {1e3 * batch / ours:.0f} | {ratios} | {share} |")
    lines.append("")
    lines.append(
        f"{results['device']}, {results['threads']} threads, torch {results['torch']}, timm {results['timm']}, "
        f"{results['date'][:10]}."
    )
    return "\n".join(lines) + "\n"


def with_table(readme: str, results: dict) -> str:
    """The README's text with its table made from ``results``."""
    before, rest = readme.split(_START)
    _, after = rest.split(_END, 1)
    return before + _START + speedup_table(results) + _END + after


def main() -> None:
    readme = ROOT / "README.md"
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
