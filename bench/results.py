"""Result files: written whole, and told apart where they were edited or measured on other kernels."""

import hashlib
import json
import math
import statistics
import tokenize
from pathlib import Path

from pm_models.files import write_atomically

from .machine import versions

FOLDER = Path(__file__).parent / "results"
EDITED = "edited after it was written"
OTHER_KERNELS = "measured on other kernels than these"
MODEL_PEERS = ("dense_autotuned", "dense_eager", "literal", "ideal", "tome", "evit", "dynamicvit", "local_merge")
_OF_A_MODEL = ("method", "keep_rate", "variant", "gmacs", "speedup", "activation_bytes")


def write(path: Path, facts: dict, records: list[dict]) -> None:
    """Write ``facts`` of the machine and the run, versions and ``records``, whole or not at all."""
    content = {**versions(), **facts, "kernels": kernels_digest(), "records": records}
    content["digest"] = _digest(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, written(content).encode())


def written(content: dict) -> str:
    """JSON with a line for each fact and each record."""
    facts = {name: value for name, value in content.items() if name != "records"}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items()]
    records = ",\n".join(map(json.dumps, content["records"]))
    return "{\n" + ",\n".join(lines) + f',\n"records": [\n{records}\n]\n}}\n'


def read(path: Path) -> tuple[dict, str]:
    """A result file, and what is wrong with it: nothing, ``EDITED`` or ``OTHER_KERNELS``."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("digest") != _digest({name: value for name, value in content.items() if name != "digest"}):
        return content, EDITED
    return content, "" if content["kernels"] == kernels_digest() else OTHER_KERNELS


def means(records: list[dict], quality: str = "top1") -> dict[str, dict]:
    """Each model of a study by name, with the means of its seeds after and before fine-tuning; variants last.

    The first, ``quality``, is not a number where it was not fine-tuned.
    """
    groups: dict[str, list[dict]] = {}
    for record in records:
        parts = [record["method"].replace("_", " ")]
        parts += [f"{record['keep_rate']:g}"] if record["keep_rate"] else []
        parts += [f"{record['image']} px"] if record["image"] else []
        name = " ".join(parts) + (f", {record['variant']}" if record["variant"] else "")
        groups.setdefault(name, []).append(record)
    ordered = sorted(groups.items(), key=lambda item: bool(item[1][0]["variant"]))
    return {
        name: {
            **{key: found[0][key] for key in _OF_A_MODEL if key in found[0]},
            "name": name,
            "quality": statistics.mean(record.get(quality, math.nan) for record in found),
            "before": statistics.mean(record[f"{quality}_before"] for record in found),
            "before_least": min(record[f"{quality}_before"] for record in found),
            "before_most": max(record[f"{quality}_before"] for record in found),
            "seeds": len(found),
        }
        for name, found in ordered
    }


def kernels_digest() -> str:
    """Of the code of pm_kernels: comments, docstrings and white space do not count."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parents[1] / "pm_kernels").glob("*.py")):
        digest.update(f"{path.name}\n{_code(path)}\n".encode())
    return digest.hexdigest()[:16]


def _code(path: Path) -> str:
    """What is left of a source file. By its text and not its syntax tree, which differs between versions of Python."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    dropped, begins = [], True  # begins: a statement
    for token in tokenize.generate_tokens(iter(lines).__next__):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and begins):
            dropped.append((token.start, token.end))
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            begins = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for (first, start), (last, end) in reversed(dropped):
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:]]
    return "".join("".join(lines).split())


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
