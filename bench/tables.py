"""The tables of a report, as Markdown: for each column its heading and its cell, as str.format takes it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from .results import MODEL_PEERS, means

_DISTILLED = {"iou": "{:.1%}", "correlation": "{:.3f}"}
_IN_THE_README = ("adaptive", "tome", "pitome_by_rank", "algm", "prune_and_merge")
_TRIED = {  # what the tests of a promise try
    "test_kernels": "random inputs of the kernels, against float64",
    "test_attention_kernels": "shapes and options of the kernels, against float64",
    "test_token_mix_kernels": "shapes and options of the kernels, against float64",
    "test_resources": "kernels compiled for GPUs that are not there",
    "test_configurations": "configurations of the kernels, against float64",
    "test_numerics": "numbers at their edge: infinite, not a number, cancelling",
    "test_plans": "random plans, and models of them, against their equations",
    "test_determinism": "runs repeated, split and threaded otherwise",
    "test_bad_files": "files truncated, changed, foreign or hostile",
    "test_a_killed_command_leaves_what_loads": "commands killed at random moments",
    "test_a_full_disk_is_an_error_that_says_so": "commands on a full disk",
}

_LEFT = {"case", "model", "way to fewer tokens", "op", "dtype", "test", "tried", "versions", "passed", "fastest peer"}
OP = (
    "case: {case} | ms: {ours_ms:.3f} | floor, ms: {roofline_ms:.3f} | of the floor: {share:.0%} | fastest peer: {peer}"
    " | its ms: {peer_ms:.3f} | ratio: {ratio:.2f}x | error to its: {error:.2f}"
)
TRAFFIC = (
    "boundary: {boundary} | state: {state} | rows: {rows} | nonzeros: {nonzeros} | moved: {moved_rows:.0f}"
    " | least: {least_rows} | ratio: {ratio:.3f}"
)
ERRORS = "op: {op} | dtype: {dtype} | error against float64: {ours:.1e} | PyTorch's own: {pytorch:.1e}"
CASES = "test: {name} | cases: {cases} | passed: {passed}"
VERSIONS = "versions: {versions} | tests: {tests} | skipped: {skipped} | passed: {passed}"
TRIED = "tried: {name} | times: {cases:,} | passed: {passed}"
_SPEED = "model: {name} | GMACs: {gmacs:.3g} | speed: {speedup:.2f}x"
_TUNED = "fine-tuned: {quality:.2f}% | to dense fine-tuned alike: {drop:+.2f} | seeds: {seeds}"
ACCURACY = f"{_SPEED} | top-1 before fine-tuning: {{before:.2f}}% | {_TUNED}"
SEGMENTATION = (
    f"{_SPEED} | activations in training: {{activations:.2f}}x | mIoU before fine-tuning: {{before:.2f}}% | {_TUNED}"
)

PRETRAINED = f"{_SPEED} | top-1, no training: {{before:.2f}}% | to dense: {{untuned:+.2f}}"
PARTS = f"{PRETRAINED} | lowest and highest of seeds: {{before_least:.2f}}% {{before_most:.2f}}% | seeds: {{seeds}}"
PRETRAINED_TUNED = f"{PRETRAINED} | fine-tuned: {{tuned}} | to dense fine-tuned alike: {{tuned_drop}}"
FIDELITY = (
    "way to fewer tokens: {method} | GMACs of the blocks: {blocks_share:.3f} | IoU: {iou:.1%} | "
    "correlation: {correlation:.3f} | mean error: {mae:.3f} | speed: {encoder_speedup:.2f}x"
)
FIDELITY_DISTILLED = (
    f"{FIDELITY} | IoU, distilled: {{iou_distilled}} | correlation, distilled: {{correlation_distilled}}"
)


def table(columns: str, rows: Iterable[Mapping]) -> str:
    """Markdown."""
    headings, cells = zip(*(column.split(": ") for column in columns.split(" | ")), strict=True)
    rule = "|".join("---" if heading in _LEFT else "---:" for heading in headings)
    lines = [" | ".join(cells).format(**row) for row in rows]
    return "\n".join([f"| {' | '.join(headings)} |", f"|{rule}|", *(f"| {line} |" for line in lines)]) + "\n"


def model_table(content: dict) -> str:
    """Throughput of the compressed model and its ratio to each peer, and in training its memory."""
    peers = [peer for peer in MODEL_PEERS if any(peer in record["peers"] for record in content["records"])]
    rows = []
    for record in content["records"]:
        ours, memory = record["ours_ms"], record["memory"]
        ratios = {peer: f"{record['peers'][peer] / ours:.2f}x" if peer in record["peers"] else "" for peer in peers}
        share = f"{memory['ours'] / memory['dense_eager']:.2f}x" if memory else ""
        rows.append({"case": record["case"], "speed": 1e3 * record["shape"][0] / ours, "share": share, **ratios})
    columns = ["case: {case}", "images/s: {speed:.0f}", *(f"to {peer}: {{{peer}}}" for peer in peers)]
    return table(" | ".join([*columns, "memory to dense: {share}"]), rows)


def op_table(content: dict) -> str:
    """Each case's time, its share of the floor, the fastest peer, and the errors."""
    rows = []
    for record in content["records"]:
        ours, errors = record["ours_ms"], record["errors"]
        peers = {peer: value for peer, value in record["peers"].items() if peer in errors}
        best = min(peers, key=peers.get)
        ratios = {"ratio": peers[best] / ours, "error": errors["ours"] / errors[best]}
        rows.append({**record, "share": record["roofline_ms"] / ours, "peer": best, "peer_ms": peers[best], **ratios})
    return table(OP, rows)


def trust_tables(content: dict) -> str:
    """What was tried for each promise, errors against float64, the cases of each test, the versions."""
    records = content["records"]
    versions = [record | {"passed": yes(record["passed"])} for record in records if "versions" in record]
    tests = sorted(
        summed([record for record in records if "test" in record], lambda record: record["test"].split("[")[0]),
        key=lambda row: row["name"],
    )
    errors = table(ERRORS, (record for record in records if "op" in record))
    return "\n".join([tried_table(content), errors, table(CASES, tests), table(VERSIONS, versions)])


def tried_table(content: dict) -> str:
    """What was tried for each promise, by tests and by the versions that all tests ran on."""

    def promise(record: dict) -> str:
        if "versions" in record:
            return f"the tests on {record['versions']}"
        module, test = record["test"].split("[")[0].split("::")
        return _TRIED.get(test, _TRIED.get(module.split(".")[-1], module.split(".")[-1]))

    return table(TRIED, summed(content["records"], promise))


def summed(records: list[dict], name: Callable[[dict], str]) -> list[dict]:
    """The runs of one name together: their cases, or tests, and whether all passed."""
    found: dict[str, list[dict]] = {}
    for record in records:
        if "passed" in record:
            found.setdefault(name(record), []).append(record)
    return [
        {
            "name": name,
            "cases": sum(record["cases" if "test" in record else "tests"] for record in runs),
            "passed": yes(all(record["passed"] for record in runs)),
        }
        for name, runs in found.items()
    ]


def yes(value: bool) -> str:
    return "yes" if value else "no"


def accuracy_table(content: dict) -> str:
    """Speed and accuracy of each model, the mean of its seeds, and its drop to the dense one."""
    return table(ACCURACY, _of_models(content, "top1"))


def pretrained_table(content: dict, rate: float | None = None) -> str:
    """Speed and accuracy of each model, or those of a rate, with no training and fine-tuned after it; fastest last."""
    rows = sorted(_of_models(content, "top1"), key=lambda row: row["speedup"])
    rows = [row for row in rows if rate is None or row["keep_rate"] in (None, rate)]
    dense = next(row["before"] for row in rows if row["name"] == "dense")
    for row in rows:
        known = not math.isnan(row["quality"])
        row["tuned"] = f"{row['quality']:.2f}%" if known else ""
        row["tuned_drop"] = f"{row['drop']:+.2f}" if known else ""
        row["untuned"] = row["before"] - dense
    return table(PRETRAINED_TUNED if any(row["tuned"] for row in rows) else PRETRAINED, rows)


def parts_table(content: dict) -> str:
    """Each model's accuracy with no training, the best first, and what random scores reach by their seeds."""
    rows = sorted(_of_models(content, "top1"), key=lambda row: -row["before"])
    return table(PARTS, [{**row, "untuned": row["before"] - rows[0]["before"]} for row in rows])


def segmentation_table(content: dict) -> str:
    """Speed, memory and mIoU of each model, the mean of its seeds, and its drop to the dense one."""
    return table(SEGMENTATION, _of_models(content, "miou"))


def fidelity_table(content: dict, fewest: bool = False) -> str:
    """How close each method's maps are to the dense model's, share by share, the closest first.

    ``fewest`` is a selection at the smallest share.
    """
    records = sorted(content["records"], key=lambda record: (-record["share"], -record["iou"]))
    if fewest:
        share = records[-1]["share"]
        records = [r for r in records if r["share"] == 1 or (r["share"] == share and r["method"] in _IN_THE_README)]
    rows = []
    for record in records:
        after = record.get("distilled", {})
        texts = {name: form.format(after[name]) if after else "" for name, form in _DISTILLED.items()}
        texts = {f"{name}_distilled": text for name, text in texts.items()}
        rows.append({**record, **texts, "method": record["method"].replace("_", " ")})
    return table(FIDELITY_DISTILLED if any("distilled" in record for record in records) else FIDELITY, rows)


def headline(content: dict) -> str:
    """What merging by content leaves of the dense model's answer, and how fast, in a sentence; beside ToMe."""
    share = min(record["share"] for record in content["records"])
    ours, tome = (
        next(record for record in content["records"] if (record["method"], record["share"]) == (method, share))
        for method in ("adaptive", "tome")
    )
    return (
        "With no training and no data, a pretrained ViT-S/14 runs "
        f"**{ours['encoder_speedup']:.2f} times as fast**{' on a CPU' if 'threads' in content else ''}, on "
        f"{ours['blocks_share']:.0%} of its multiply-accumulates, and what it sees keeps an IoU of "
        f"**{ours['iou']:.1%}** with what it saw before (ToMe: {tome['encoder_speedup']:.2f} times, {tome['iou']:.1%})."
    )


def _of_models(content: dict, quality: str) -> Iterator[dict]:
    models = means(content["records"], quality)
    dense = models["dense"]
    for model in models.values():
        activations = model["activation_bytes"] / dense["activation_bytes"] if quality == "miou" else None
        yield {**model, "activations": activations, "drop": model["quality"] - dense["quality"]}
