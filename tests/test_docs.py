"""Every code block of the README and the guides runs, Python as it stands and commands on images; links resolve."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from covering import REST
from PIL import Image

import pm_kernels
import pm_models
from pm_models.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("bench/results/*.md")])
GUIDES = ["../README.md", *sorted(path.name for path in DOCS.glob("*.md"))]
COMPILES = ("export.md",)  # for half a minute
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What a guide's commands are given beside what stands there, so that they end in seconds.
SMALL = ["-j", "0", "-b", "2", "--device", "cpu"]
SHAPE = ["--model-kwargs", "embed_dim=48", "depth=2", "num_heads=2"]
BRIEF = {
    "train": [*SMALL, *SHAPE, "--epochs", "1", "--warmup-epochs", "0"],
    "compress": SMALL,
    "finetune": [*SMALL, "--epochs", "1"],
    "eval": SMALL,
    "export": ["--device", "cpu", "-b", "2"],
    "bench": ["--device", "cpu"],
    "show": [],
    "report": ["--device", "cpu", "-b", "1"],
}
ONLY_WITH_GPUS = ("torchrun",)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder to be in, with images of two classes, and with label maps, in ``DATA``.

    Nothing is downloaded, and what would be is small.
    """
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            for index in range(3):
                save(tmp_path / "DATA" / split / name / f"{index}.png", random.integers(0, 255, (40, 50, 3)))
        for index in range(2):
            save(tmp_path / "DATA" / "images" / split / f"{index}.png", random.integers(0, 255, (64, 70, 3)))
            save(tmp_path / "DATA" / "labels" / split / f"{index}.png", random.integers(0, 11, (64, 70)))
    create = timm.create_model

    def create_model(name, pretrained=False, **arguments):
        if not pretrained or name.startswith("local-dir:"):
            return create(name, pretrained=pretrained, **arguments)
        return create(name, **{"embed_dim": 48, "depth": 2, "num_heads": 2} | arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield tmp_path
    torch._dynamo.reset()


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def run_command(line):
    AcceleratorState._reset_state(reset_partial_state=True)  # each command is a process of its own
    words = shlex.split(line)
    if words[0] in ONLY_WITH_GPUS:
        words = words[words.index("pm_models") :]  # the command is what it runs, more than once
    else:
        assert words[0] == "pm-vit", line
    arguments = words[1:]
    if "-b" in arguments and arguments[0] == "bench":
        arguments = arguments[: arguments.index("-b")]
    if "--img-size" in arguments:
        arguments[arguments.index("--img-size") + 1] = "64"
    main_arguments = arguments + BRIEF[arguments[0]]
    if arguments[0] == "finetune" and "--adaptive" not in arguments:
        main_arguments += ["--score-batches", "1"]
    if words[0] == "pm_models":
        main_arguments[main_arguments.index("--output") + 1] += "-again"
    assert main(main_arguments) == 0, line


@pytest.mark.parametrize("guide", [pytest.param(guide, marks=REST if guide in COMPILES else ()) for guide in GUIDES])
@pytest.mark.filterwarnings("ignore::UserWarning")  # few images, random weights
def test_a_guide(guide, workplace):
    namespace = {}
    if guide == "export.md":  # goes on where another guide ends
        dense = timm.create_model("deit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=2)
        plan = pm_models.CompressionPlan.from_scores(torch.rand(2, 196), (14, 14), 0.6, 0.1)
        pm_models.save_pretrained(pm_models.compress(dense, plan), "tuned")
    blocks = BLOCK.findall((DOCS / guide).read_text(encoding="utf-8"))
    for language, text in blocks:
        if language == "python":
            exec(compile(text, guide, "exec"), namespace)
        elif language == "sh":
            for line in text.splitlines():
                if not line.startswith("pip install"):  # these are what a fresh environment begins with
                    run_command(line)
        else:
            assert language == "text", language
    if guide == "compress.md":
        first = [line for line in blocks[0][1].splitlines() if line]
        assert len(first) < 15
        assert first[-1].startswith("pm_models.export_model(")
        assert (workplace / "deit_small.onnx").is_file()


def test_public_names_are_documented():
    """What the API reference is built from: every public name, argument and method says what it is."""
    for package in (pm_kernels, pm_models):
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.ismodule(thing):
                continue
            text = inspect.getdoc(thing)
            assert text, name
            if inspect.isfunction(thing):
                for argument in inspect.signature(thing).parameters:
                    assert re.search(rf"\b{argument}\b", text), (name, argument)
            for attribute, method in vars(thing).items() if inspect.isclass(thing) else ():
                if inspect.isfunction(method) and not attribute.startswith("_"):
                    assert inspect.getdoc(getattr(thing, attribute)), f"{name}.{attribute}"


def nav_pages(entry):
    """The pages of mkdocs.yml's nav, or of a part of it."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in nav_pages(part)]


def test_the_site_has_every_page():
    nav = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(nav) == len(set(nav))
    assert set(nav) == {page.relative_to(ROOT).as_posix() for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_are_there(page):
    for target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if not target.startswith("https://"):
            path, _, heading = target.partition("#")
            found = page.parent / path if path else page
            assert found.is_file(), target
            assert not heading or heading in slugs(found), target


def slugs(page):
    """What GitHub and the site call the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_reference_is_of_public_modules():
    """What docs/api names can be imported, and says of itself what is public."""
    names = [
        name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert {"pm_kernels", "pm_models", "pm_models.training"} <= set(names)
    for name in names:
        assert importlib.import_module(name).__doc__, name
