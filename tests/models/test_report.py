"""``pm-vit report``: a page that needs nothing else, whose figures are those of the models, and whose slider works."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers import plan_for, small_vit
from PIL import Image
from safetensors.torch import load_file, save_file

from pm_models import AdaptivePlan, Segmenter, compress, load_pretrained, report, save_pretrained
from pm_models.cli import main
from pm_models.data import read_sample
from pm_models.measure import count_gmacs
from pm_models.models import compression_of
from pm_models.visualize import token_layers

SPEEDS = {1: (8.04, 9.96, 12.34), 3: (10.0, 16.26, 18.0)}  # dense, compressed, ideal


class Page(HTMLParser):
    """What stands in a page: elements with their attributes, rows of tables, the large figures at the top, all text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.rows, self.text, self.tiles = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "b":
            self.tiles.append("")

    def handle_data(self, data):
        tag = self.elements[-1][0] if self.elements else None
        if tag in ("td", "th"):
            self.rows[-1][-1] += data.strip()
        elif tag == "b":
            self.tiles[-1] += data.strip()
        self.text += data

    def handle_endtag(self, tag):
        if tag in ("td", "th", "b"):
            self.elements.append((None, {}))

    def all(self, tag, **attributes):
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models in folders, and images."""
    torch.manual_seed(0)
    root, dense = tmp_path_factory.mktemp("saved"), small_vit()
    adaptive = AdaptivePlan.for_model(dense, gmacs=0.7)
    models = {
        "dense": dense,
        "adaptive": compress(dense, adaptive),
        "static": compress(dense, plan_for(dense, stages=[(1, 1), (2, 4)])),
        "headless": compress(small_vit(num_classes=0, global_pool=""), adaptive),
        "segmenter": Segmenter(dense, 3, decoder="linear").compressed(adaptive),
    }
    for name, model in models.items():
        save_pretrained(model, root / name)
    random = np.random.default_rng(0)
    for name in ("a/x.png", "b/x<i>.png", "b/y.png"):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (50, 90, 3), dtype=np.uint8)).save(root / "images" / name)
    (root / "text.png").write_text("no picture")
    return root


@pytest.fixture(autouse=True)
def _speeds(monkeypatch):
    """Speed is not measured."""

    def speed(model, dense, batch):
        assert compression_of(model) is not None
        assert compression_of(dense) is None
        return dict(zip(("dense", "compressed", "ideal"), SPEEDS[batch], strict=True))

    monkeypatch.setattr(report, "speed_beside_dense", speed)


def run(capsys, *arguments):
    status = main([str(argument) for argument in ("report", *arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def page_of(capsys, saved, folder, *arguments):
    images = sorted((saved / "images").rglob("*.png"))
    output = saved / "page.html"
    status, out, err = run(capsys, saved / folder, *images, "-b", 3, 1, "--output", output, *arguments)
    assert status == 0, err
    assert out == f"report: {output}\n"
    return output.read_text(encoding="utf-8"), images


@pytest.mark.parametrize("folder", ["adaptive", "static", "segmenter"])
def test_structure(capsys, saved, folder):
    text, images = page_of(capsys, saved, folder)
    page, model = Page(text), load_pretrained(saved / folder)
    plan = getattr(model, "encoder", model).plan

    assert not re.search(r"https?:|@import|url\(|<link|<iframe", text)
    links = [found[key] for _, found in page.elements for key in ("src", "href") if key in found]
    assert links
    assert all(link.startswith("data:image/") for link in links)
    for drawn in page.all("svg", role="img"):
        assert drawn["aria-label"]

    (slider,) = page.all("input")
    assert (slider["type"], slider["min"], slider["max"]) == ("range", "0", "4")
    counts = re.findall(r'<span class="count">(\d+)</span>', text)
    assert tuple(map(int, counts)) == plan.tokens
    assert "--share: 100.00%" in text

    pictures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    assert len(pictures) == len(images)
    for part, path in zip(pictures, images, strict=True):
        sample = read_sample(path, model)
        layers = token_layers(model, sample.image, sample.picture)
        spans = [(int(layer["data-first"]), int(layer["data-last"])) for layer in Page(part).all("g")]
        assert spans == [(layer.first, layer.last) for layer in layers]
        assert [block for first, last in spans for block in range(first, last + 1)] == list(range(5))
        photo, *paints = map(pixels_of, re.findall(r'href="data:image/\w+;base64,([^"]+)"', part))
        assert np.abs(photo / 255 - sample.picture).mean() < 0.15  # a JPEG of noise
        drawn = [layer for layer in layers if layer.outlines]
        assert 0 < len(drawn) < len(layers)
        for paint, layer in zip(paints, drawn, strict=True):
            np.testing.assert_array_equal(paint, (255 * layer.paint).round())
        paths = re.findall(r' d="([^"]*)"', part)
        assert [path.count("M") for path in paths] == [len(layer.outlines) for layer in drawn]


def pixels_of(encoded):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))).astype(float)


def test_figures_of_a_classifier(capsys, saved):
    text, images = page_of(capsys, saved, "adaptive")
    model, dense = load_pretrained(saved / "adaptive"), load_pretrained(saved / "dense")
    page = Page(text)
    gmacs = [count_gmacs(each, (3, 28, 20)) for each in (model, dense)]
    assert all(f"{value:.4g}" in page.text for value in gmacs)
    seen, classes = [], []
    for each in (model, dense):
        each.head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach().double().numpy()))
        with torch.inference_mode():
            logits = [each(read_sample(path, model).image[None]) for path in images]
        classes.append([int(row.argmax()) for row in logits])
    ours, theirs = np.concatenate(seen[:3]), np.concatenate(seen[3:])
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    same = np.equal(*classes)
    speeds, each = page.rows[:3], page.rows[3:]
    assert speeds[1] == ["1", "8.0", "12.3", "10.0", "1.24x", "0.81x"]
    assert speeds[2] == ["3", "10.0", "18.0", "16.3", "1.63x", "0.90x"]
    assert each[0] == ["image", "cosine of features", "class"]
    names = ["a/x.png", "b/x<i>.png", "b/y.png"]
    for row, name, value, equal in zip(each[1:], names, cosine, same, strict=True):
        assert row == [name, f"{value:.4f}", "same" if equal else "another"]
    share = f"{100 * gmacs[0] / gmacs[1]:.0f}%"
    assert page.tiles == [share, "1.63x", f"{cosine.mean():.3f}", f"{same.sum()} of 3"]
    assert "the model as it was before compression, on 3 images" in page.text


def test_figures_of_a_segmenter(capsys, saved):
    text, images = page_of(capsys, saved, "segmenter")
    model = load_pretrained(saved / "segmenter")
    dense = load_pretrained(saved / "segmenter", uncompressed=True)
    page, maps = Page(text), []
    for each in (model, dense):
        with torch.inference_mode():
            maps.append([each(read_sample(path, model).image[None])[0].argmax(0).numpy() for path in images])
    ours, theirs = np.array(maps)
    same = 100 * (ours == theirs).mean(axis=(1, 2))
    unions = [((ours == index) | (theirs == index)).sum() for index in range(3)]
    hits = [((ours == index) & (theirs == index)).sum() for index in range(3)]
    miou = 100 * np.mean([hit / union for hit, union in zip(hits, unions, strict=True) if union])
    assert [row[-1] for row in page.rows[-3:]] == [f"{value:.2f}%" for value in same]
    assert page.tiles[2:] == [f"{same.mean():.1f}%", f"{miou:.1f}%"]


def test_without_a_head_there_is_no_class(capsys, saved):
    text, _ = page_of(capsys, saved, "headless")
    assert Page(text).rows[3] == ["image", "cosine of features"]


def test_without_images_there_is_one(capsys, saved):
    assert run(capsys, saved / "adaptive", "-b", 1, "--output", saved / "page.html")[0] == 0
    text = (saved / "page.html").read_text(encoding="utf-8")
    assert text.count("<figure>") == 1
    assert "grace_hopper.jpg" in text


def test_the_dense_model_of_a_fine_tuned_one(capsys, saved):
    """It stands in the folder, or is named, or nothing is compared."""
    shutil.copytree(saved / "adaptive", saved / "tuned")
    weights = load_file(saved / "tuned" / "model.safetensors")
    changed = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in weights.items()}
    save_file(changed, saved / "tuned" / "model.safetensors")
    (saved / "tuned" / "training.json").write_text(json.dumps({"command": "finetune"}))
    text, _ = page_of(capsys, saved, "tuned")
    assert "cosine" not in Page(text).text
    assert re.search(r"Not compared: .*tuned is fine-tuned, .*; --dense takes its folder", text)
    named, _ = page_of(capsys, saved, "tuned", "--dense", saved / "dense")
    shutil.copytree(saved / "adaptive", saved / "tuned" / "compressed")
    found, _ = page_of(capsys, saved, "tuned")
    assert Page(found).rows == Page(named).rows
    untuned, _ = page_of(capsys, saved, "adaptive")
    assert Page(found).rows[4:] != Page(untuned).rows[4:]


MISTAKES = {
    "no model": (["{0}/nowhere"], "nowhere is not a saved model"),
    "no plan": (["{0}/dense"], "dense holds an uncompressed model, which has no plan"),
    "text": (["{0}/adaptive", "{0}/text.png"], "text.png is not a readable image"),
    "no image": (["{0}/adaptive", "{0}/none.png"], "No such file.*none.png"),
    "other dense": (
        ["{0}/adaptive", "--dense", "{0}/headless"],
        "--dense .*headless holds another model than .*adaptive was before compression",
    ),
    "compressed dense": (["{0}/adaptive", "--dense", "{0}/adaptive"], "--dense .*adaptive holds another model than"),
    "output is a folder": (
        ["{0}/adaptive", "--output", "{0}/images"],
        "--output .*images is a folder, expected a file",
    ),
    "output below a file": (["{0}/adaptive", "--output", "{0}/text.png/x"], "--output .*text.png/x cannot be written"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_anything_is_measured(capsys, saved, monkeypatch, mistake):
    arguments, message = MISTAKES[mistake]
    monkeypatch.setattr(report, "speed_beside_dense", None)
    monkeypatch.chdir(saved)  # where a page would be
    before = sorted(saved.rglob("*"))
    status, out, err = run(capsys, *(argument.format(saved) for argument in arguments))
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert re.search(message, err), err
    assert sorted(saved.rglob("*")) == before


def test_a_page_is_replaced_as_a_whole(capsys, saved, monkeypatch):
    (saved / "page.html").write_text("old")
    monkeypatch.setattr(report, "compare_answers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page_of(capsys, saved, "adaptive")
    assert (saved / "page.html").read_text() == "old"
    assert not list(saved.glob(".page*"))


@pytest.fixture
def browser():
    """A Chromium without a window."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, and Chromium with its driver")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.parametrize("folder", ["adaptive", "static"])
def test_the_slider_in_a_browser(capsys, saved, browser, folder):
    """By its keys: the picture changes where the plan says so, and the text and the bars with it."""
    text, _ = page_of(capsys, saved, folder)
    browser.set_window_size(1000, 1600)  # where nothing has to be scrolled to
    browser.get((saved / "page.html").as_uri())
    slider = browser.find_element("id", "block")
    picture = browser.find_element("css selector", "figure svg")
    spans = [(int(layer["data-first"]), int(layer["data-last"])) for layer in Page(text.split("</figure>")[0]).all("g")]
    plan = load_pretrained(saved / folder).plan
    views = {}
    for block in reversed(range(plan.depth)):
        assert browser.find_element("id", "told").text == f"Block {block}: {plan.tokens[block]} of 36 tokens"
        assert slider.get_attribute("aria-valuetext") == browser.find_element("id", "told").text
        current = browser.find_element("css selector", ".bars .current").text.split()
        assert current == [str(plan.tokens[block]), str(block)]
        shown = next(index for index, (first, last) in enumerate(spans) if first <= block <= last)
        seen = picture.screenshot_as_png
        assert views.setdefault(shown, seen) == seen
        slider.send_keys("\ue012")  # left
    assert len(set(views.values())) == len(spans) > 1
    browser.set_window_size(360, 700)
    width, whole = browser.execute_script(
        "const root = document.documentElement; return [root.clientWidth, root.scrollWidth]"
    )
    assert whole <= width
    paper = {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        paper[scheme] = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper["light"] != paper["dark"]
    assert browser.get_log("browser") == []  # nothing was refused or failed
