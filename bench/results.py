"""Result files: written whole, and told apart where they were edited or measured on other kernels."""

import ast
import hashlib
import json
from pathlib import Path

from pm_models.files import write_atomically

from .machine import versions

FOLDER = Path(__file__).parent / "results"
EDITED = "edited after it was written"
OTHER_KERNELS = "measured on other kernels than these"


def write(path: Path, facts: dict, records: list[dict]) -> None:
    """Write ``facts`` of the machine and the run, versions and ``records``, whole or not at all."""
    content = {**versions(), **facts, "kernels": kernels_digest(), "records": records}
    content["digest"] = _digest(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read(path: Path) -> tuple[dict, str]:
    """A result file, and what is wrong with it: nothing, ``EDITED`` or ``OTHER_KERNELS``."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("digest") != _digest({name: value for name, value in content.items() if name != "digest"}):
        return content, EDITED
    return content, "" if content["kernels"] == kernels_digest() else OTHER_KERNELS


def kernels_digest() -> str:
    """Of the code of pm_kernels: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parents[1] / "pm_kernels").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and _is_text(body[0].value):
                del body[0]
        digest.update(f"{path.name}\n{ast.unparse(tree)}\n".encode())
    return digest.hexdigest()[:16]


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
