"""Two processes against one: the same scores, the same plan, the same losses, the same weights."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import small_vit
from PIL import Image
from processes import launch

from pm_models import CompressionPlan, Segmenter, load_pretrained, save_pretrained
from pm_models.cli import main

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch lacks torch.distributed")
SCRIPT = """
import json, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
from helpers import plan_for, small_vit
from pm_models import CompressionPlan, compress, score_tokens
from pm_models.training import Recipe, classification_task, distillation_task, fit, make_accelerator

accelerator = make_accelerator()
torch.manual_seed(0)
model = small_vit(depth=3)
images, targets = torch.randn(24, 3, 28, 20), torch.randint(0, 7, (24,))
data = TensorDataset(images, targets)

# Six batches of four, whoever scores them.
batches = len(range(accelerator.process_index, 6, accelerator.num_processes))
scores = score_tokens(model, accelerator.prepare(DataLoader(data, 4)), batches=batches)
plan = CompressionPlan.from_scores(scores, (7, 5), 0.5, 0.2)
compressed = compress(model, plan)

# A step's images are twelve, whoever takes them.
def loader(shuffle):
    return DataLoader(data, 12 // accelerator.num_processes, shuffle=shuffle)

recipe = Recipe(epochs=2, lr=1e-3)
results = fit(distillation_task(compressed, model), loader(True), loader(False), recipe, accelerator=accelerator)
report = {
    "processes": accelerator.num_processes,
    "scores": scores.tolist(),
    "plan": plan.to_dict(),
    "results": [[r.train_loss, r.train_top1, r.top1, r.top5] for r in results],
    "weights": [float(p.detach().double().norm()) for p in compressed.parameters()],
}
if accelerator.is_main_process:
    with open(sys.argv[1], "w") as file:
        json.dump(report, file)
accelerator.end_training()
"""


AUGMENTED = """
import functools, pathlib, sys
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, WeightedRandomSampler
from helpers import small_vit
from pm_models import Segmenter
from pm_models.data import make_loader, open_dataset
from pm_models.segmentation import SegmentationImages, evaluate_segmentation, make_training_loader
from pm_models.training import Recipe, SegmentationTask, classification_task, fit, make_accelerator

accelerator = make_accelerator()
batch, folder = 8 // accelerator.num_processes, pathlib.Path(sys.argv[1])
load = functools.partial(DataLoader, batch_size=batch, drop_last=True)


class Batches:
    # A batch sampler of the user's own, whose order is the epoch's.
    batch_size, drop_last, epoch = batch, True, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 16 // batch

    def __iter__(self):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter([order[start : start + batch] for start in range(0, 16, batch)])


def vit(**arguments):
    torch.manual_seed(0)
    return small_vit(img_size=32, patch_size=8, depth=1, **arguments)


def loader(kind, model, workers):
    if kind == "segmentation":
        images = SegmentationImages(folder / "maps", "train", num_classes=3)
        return make_training_loader(images, model, batch_size=batch, workers=workers)
    images = open_dataset(folder / "classes", "train")
    made = make_loader(images, model, batch_size=batch, workers=workers, training=True)
    images = made.dataset
    return {
        "classes": lambda: made,
        "Subset": lambda: load(Subset(images, range(18)), shuffle=True, num_workers=workers),
        "ConcatDataset": lambda: load(ConcatDataset([Subset(images, range(9)), images]), shuffle=True),
        "weighted sampler": lambda: load(images, sampler=WeightedRandomSampler(torch.arange(20) + 1.0, 20)),
        "batch sampler": lambda: DataLoader(images, batch_sampler=Batches()),
    }[kind]()


class Stopped(Exception):
    pass


def train(kind, workers=0, stop=None, **mix):
    if kind == "segmentation":
        model = Segmenter(vit(num_classes=0), 3, decoder="linear")
        task, evaluator = SegmentationTask(model), lambda *_, **__: {"top1": 0.0}
    else:
        model = vit(num_classes=2)
        task, evaluator = classification_task(model), lambda *_, **__: {"top1": 0.0}
    steps, seen, shares, recipe = 0, [], [], Recipe(epochs=3, lr=1e-3, opt="sgd", **mix)

    def keep(_, inputs):
        nonlocal steps
        if steps == stop:
            raise Stopped
        steps += 1
        seen.append(accelerator.gather(inputs[0]).flatten(1).sum(1).sort().values)
        shares.append(accelerator.gather(inputs[1]).unique().tolist())

    hook = task.register_forward_pre_hook(keep)
    state = folder / f"state-{accelerator.num_processes}-{kind}" if stop else None
    options = dict(accelerator=accelerator, evaluator=evaluator, state_dir=state, recovery_interval=1)
    try:
        results = fit(task, loader(kind, model, workers), None, recipe, **options)
    except Stopped:
        stop, steps = None, 0
        hook.remove()
        model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
        task.trainable_module = model
        results = fit(task, loader(kind, model, workers), None, recipe, **options)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return {
        "images": torch.stack(seen),
        "shares": torch.tensor([max(0, *(share for share in step if share < 1)) for step in shares]),
        "weights": weights,
        "losses": torch.tensor([[result.train_loss, result.train_top1] for result in results]),
    }


report = {kind: train(kind) for kind in sys.argv[3:]}
report |= {f"{kind}, workers": train(kind, workers=1) for kind in ("classes", "segmentation", "Subset")}
report |= {f"{kind}, continued": train(kind, stop=3) for kind in sys.argv[3:]}
report["mixed"] = train("classes", mixup=0.8, cutmix=1.0)
if accelerator.is_main_process:
    torch.save(report, sys.argv[2])
accelerator.end_training()
"""
KINDS = ["classes", "segmentation", "Subset", "ConcatDataset", "weighted sampler", "batch sampler"]


SHARDED = """
import copy, sys
import torch
from torch.distributed.fsdp import fully_shard
from helpers import images_for, plan_for, small_vit
from pm_models import compress

torch.distributed.init_process_group("gloo")
for train_matrices in ("support", "dense", None):
    torch.manual_seed(0)
    dense = small_vit(depth=3)
    whole = compress(dense, plan_for(dense), train_matrices=train_matrices).train()
    sharded = copy.deepcopy(whole)
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)
    images = images_for(dense)
    for model in (whole, sharded):
        model(images).square().mean().backward()
    gradients = dict(sharded.named_parameters())
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].grad.full_tensor(), parameter.grad)
    outputs = []
    for model in (whole, sharded):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        with torch.inference_mode():
            outputs.append(model.eval()(images))
    torch.testing.assert_close(*outputs)
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # whose threads must not outlive the interpreter
"""


def run(processes, *arguments, script=None):
    """What the processes of a group print, each of which has to succeed."""
    group = launch(processes, *arguments, script=script)
    texts = [process.communicate(timeout=600) for process in group]
    assert [process.returncode for process in group] == processes * [0], texts
    return "".join(out for out, _ in texts)


def torchrun(processes, *arguments):
    """``pm-vit`` under the launcher itself, where there is no GPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launcher, "-m", "pm_models", *map(str, arguments)], env=environment, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip


@pytest.fixture
def script(tmp_path):
    """Writes a script of these lines."""

    def write(text):
        (tmp_path / "script.py").write_text(text)
        return str(tmp_path / "script.py")

    return write


def test_two_processes_do_what_one_does(tmp_path, script):
    reports = []
    for processes in (1, 2):
        run(processes, tmp_path / f"{processes}.json", script=script(SCRIPT))
        reports.append(json.loads((tmp_path / f"{processes}.json").read_text()))
    one, two = reports
    assert (one["processes"], two["processes"]) == (1, 2)
    torch.testing.assert_close(torch.tensor(two["scores"]), torch.tensor(one["scores"]), rtol=1e-5, atol=1e-9)
    plans = [CompressionPlan.from_dict(report["plan"]) for report in reports]
    first, second = ([stage.segments for stage in plan.stages] for plan in plans)
    assert first == second
    torch.testing.assert_close(torch.tensor(two["results"]), torch.tensor(one["results"]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(two["weights"]), torch.tensor(one["weights"]), rtol=1e-4, atol=1e-6)


CONTINUED = """
import sys
import torch
from torch.utils.data import DataLoader, TensorDataset
from helpers import small_vit
from pm_models.training import Recipe, classification_task, fit, make_accelerator

accelerator = make_accelerator()
torch.manual_seed(0)
loader = DataLoader(TensorDataset(torch.randn(8, 3, 28, 20), torch.randint(0, 7, (8,))), 2)
task, recipe = classification_task(small_vit(depth=1)), Recipe(epochs=1, lr=1e-3)
try:
    fit(task, loader, loader, recipe, accelerator=accelerator, state_dir=sys.argv[1])
except ValueError as error:
    print("refused:", error)
accelerator.end_training()
"""


def test_another_number_of_processes_does_not_continue(tmp_path, script):
    script = script(CONTINUED)
    assert "refused" not in run(2, tmp_path / "state", script=script)
    assert "continuing after epoch 1 of 1" in run(2, tmp_path / "state", script=script)
    (line,) = run(1, tmp_path / "state", script=script).splitlines()
    assert line.startswith("refused: ")
    assert line.endswith("(processes 2 -> 1)")


def test_weights_shared_out_between_processes(script):
    """Under FSDP: the same gradients, and after a step the same outputs, as one process with all weights."""
    run(2, script=script(SHARDED))


@pytest.fixture(scope="module")
def augmented(tmp_path_factory):
    """What one process and two have trained on over three epochs of augmented images, and what came of it."""
    folder = tmp_path_factory.mktemp("augmented")
    torch.manual_seed(0)
    for index in range(20):
        pixels, labels = torch.randint(0, 256, (40, 36, 3)), torch.randint(0, 4, (40, 36))
        labels[: index + 1][labels[: index + 1] == 3] = 255
        for name, values in (
            (f"classes/train/{'cat' if index % 2 else 'dog'}/{index}.png", pixels),
            (f"maps/images/train/{index}.png", pixels),
            (f"maps/labels/train/{index}.png", labels.where(labels != 3, 0)),
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.byte().numpy()).save(folder / name)
    script = folder / "script.py"
    script.write_text(AUGMENTED)
    for processes in (1, 2):
        run(processes, folder, folder / f"{processes}.pt", *KINDS, script=str(script))
    return [torch.load(folder / f"{processes}.pt") for processes in (1, 2)]


@pytest.mark.parametrize("kind", [*KINDS, *(f"{kind}, workers" for kind in KINDS[:3])])
def test_augmented_training_is_that_of_one_process(augmented, kind):
    """Steps of 4 + 4 images are those of 8, in every epoch, and every epoch has images of its own."""
    one, two = (report[kind] for report in augmented)
    torch.testing.assert_close(two["images"], one["images"], rtol=1e-4, atol=1e-4)
    first, second, third = one["images"].flatten().chunk(3)
    assert not set(first.tolist()) & set(second.tolist())
    assert not set(second.tolist()) & set(third.tolist())
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-4, atol=1e-4)
    for report in augmented:
        plain = report[kind.removesuffix(", workers")]
        assert all(torch.equal(report[kind][name], plain[name]) for name in plain)


def test_mixed_images_are_mixed_as_much_as_in_one_process(augmented):
    """In a step all images have the same share of another, which targets tell where the two are of two classes."""
    one, two = (report["mixed"]["shares"] for report in augmented)
    told = (one > 0) & (two > 0)
    assert told.sum() >= 5
    torch.testing.assert_close(two[told], one[told])
    assert len(one[told].unique()) == told.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_augmented_training_continues_within_an_epoch(augmented, kind):
    for report in augmented:
        continued = report[f"{kind}, continued"]
        assert torch.equal(continued["weights"], report[kind]["weights"])
        assert torch.equal(continued["losses"], report[kind]["losses"])


def test_the_command_line_on_two_processes(tmp_path):
    """compress makes the plan that one process makes, and it, finetune and eval speak and write once."""
    model = small_vit(img_size=32, patch_size=8, depth=2, num_classes=2)
    save_pretrained(model, tmp_path / "dense")
    for split, name, index in itertools.product(("train", "validation"), ("cat", "dog"), range(8)):
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
    common = ["-j", "0", "-b", "2"]
    for processes in (1, 2):
        run(
            processes, "compress", tmp_path / "data", "--model", tmp_path / "dense", *common,
            "--output", tmp_path / f"compressed{processes}", "--keep-rate", "0.5", "--prune-rate", "0.2",
            "--score-batches", "5",
        )  # fmt: skip
    one, two = (CompressionPlan.load(tmp_path / f"compressed{processes}" / "plan.json") for processes in (1, 2))
    assert [stage.segments for stage in one.stages] == [stage.segments for stage in two.stages]
    out = run(
        2, "finetune", tmp_path / "data", "--model", tmp_path / "compressed2", *common,
        "--output", tmp_path / "tuned", "--epochs", "1",
    )  # fmt: skip
    assert out.count("finetune 1/1: loss") == 1
    done = torchrun(2, "eval", tmp_path / "data", "--model", tmp_path / "tuned", *common)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("top-1 ") == 1
    assert "on 16 images" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["export", "--model", "{}", "--format", "pt2", "--output", "{}/out"],
        ["show", "{}/plan.json", "--output", "{}/out"],
        ["bench", "vit_tiny_patch16_224", "--output", "{}/out"],
        ["demo", "--output", "{}/out"],
    ],
    ids=lambda command: command[0],
)
def test_other_commands_refuse_several_processes(capsys, monkeypatch, tmp_path, command):
    """The launcher tells its processes by variables: one of them, with torchrun's."""
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert main([part.format(tmp_path) for part in command]) == 2
    assert capsys.readouterr().err == f"pm-vit {command[0]}: error: runs in one process, got 3 from the launcher\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.fuzz
@pytest.mark.exhaustive
def test_a_command_that_refuses_several_processes_ends_the_launch(tmp_path):
    done = torchrun(2, "demo", "--output", tmp_path / "out")
    assert done.returncode != 0
    assert "pm-vit demo: error: runs in one process, got 2 from the launcher" in done.stderr
    assert not (tmp_path / "out").exists()


def test_segmentation_on_two_processes(tmp_path):
    """The same plan and the same measures as one process, for images that two cannot share alike; each counts once."""
    model = Segmenter(small_vit(img_size=32, patch_size=8, depth=2, num_classes=0), 3, decoder_depth=1)
    save_pretrained(model, tmp_path / "dense")
    for split, index in itertools.product(("train", "validation"), range(5)):
        for kind, shape in (("images", (40, 36, 3)), ("labels", (40, 36))):
            folder = tmp_path / "data" / kind / split
            folder.mkdir(parents=True, exist_ok=True)
            content = torch.randint(0, 3 if kind == "labels" else 256, shape, dtype=torch.uint8)
            Image.fromarray(content.numpy()).save(folder / f"{index}.png")
    common = [tmp_path / "data", "--task", "segmentation", "-j", "0", "-b", "1"]
    for processes in (1, 2):
        run(
            processes, "compress", *common, "--model", tmp_path / "dense", "--keep-rate", "0.5",
            "--prune-rate", "0.2", "--score-batches", "5", "--output", tmp_path / f"compressed{processes}",
        )  # fmt: skip
        run(
            processes, "eval", *common, "--model", tmp_path / "compressed1",
            "--results-file", tmp_path / f"eval{processes}.json",
        )  # fmt: skip
    one, two = (CompressionPlan.load(tmp_path / f"compressed{processes}" / "plan.json") for processes in (1, 2))
    assert [stage.segments for stage in one.stages] == [stage.segments for stage in two.stages]
    one, two = (json.loads((tmp_path / f"eval{processes}.json").read_text()) for processes in (1, 2))
    for measure in ("miou", "macc", "aacc", "iou"):
        assert two[measure] == pytest.approx(one[measure], abs=1e-4)
    out = run(
        2, "finetune", *common, "--model", tmp_path / "compressed2", "--epochs", "1",
        "--output", tmp_path / "tuned",
    )  # fmt: skip
    assert out.count("finetune 1/1: loss") == 1
    assert load_pretrained(tmp_path / "tuned").encoder.plan == load_pretrained(tmp_path / "compressed2").encoder.plan
