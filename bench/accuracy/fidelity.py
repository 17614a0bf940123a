"""How much of a pretrained model's answer is left where it runs on fewer tokens: with no training, and distilled.

The dense model's own maps of saliency are what a compressed model is held against: no labels are needed.
"""

import copy
import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from timm.task.task import TrainingTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from pm_models import AdaptivePlan, CompressionPlan, compress, score_tokens
from pm_models.files import write_atomically
from pm_models.measure import alternate, count_gmacs
from pm_models.models import input_size
from pm_models.training import Recipe, fit, make_accelerator
from pm_models.visualize import save_cluster_picture

from .. import results
from ..machine import describe, versions
from ..models import RATES
from ..peers import atm, local_merge, matched, merges_per_block, pitome, tome
from ..plots import save_maps
from .pretrained import MEAN, STD, Saliency
from .runs import CARRYING, PRUNE_RATE
from .study import forget

SHARES = (0.62, 0.7, 0.8)  # of the GMACs of the dense model's blocks
# Arguments of CompressionPlan.from_scores and of compress; ``static_stage`` is one stage of averages from block 2 on.
STATIC = {
    "prune_and_merge": {"plan": {"prune_rate": PRUNE_RATE}, "compress": {}},
    "merge_and_carry": CARRYING,
    "static_stage": {
        "plan": {"prune_rate": 0.0, "row_weights": "average", "segments": "nearest"},
        "compress": {"size_bias": True},
    },
}
# EViT, DynamicViT and others that drop tokens have no value for them in a dense map, so they are not here.
PEERS = {
    "tome": partial(tome, full_map=True),
    "pitome": partial(pitome, full_map=True),
    "pitome_by_rank": partial(pitome, full_map=True, protect=False),
    "atm": partial(atm, full_map=True),
    "local_merge": local_merge,
    "algm": lambda encoder, count: local_merge(encoder, count, later=3 * count),  # as many again
}
METHODS = ("adaptive", *STATIC, *PEERS)
# What the default of adaptive merging was chosen from: arguments of AdaptivePlan.candidates.
SCHEDULES = {
    "adaptive": {},
    "one round": {"rounds": 1},
    "two rounds": {"rounds": 2},
    "four rounds": {"rounds": 4},
    "sizes themselves": {"root_sizes": False},
    "before 1 and 5": {"blocks": (1, 5)},
    "before 1, 4 and 7": {"blocks": (1, 4, 7)},
    "before 2, 4, 6 and 9": {"blocks": (2, 4, 6, 9)},
    "before every second": {"blocks": (1, 3, 5, 7, 9, 11)},
    "before every second, two rounds": {"blocks": (1, 3, 5, 7, 9, 11), "rounds": 2},
    "before each, one round": {"blocks": range(1, 12), "rounds": 1},
}
THRESHOLD = 0.5
BATCH = 8
# What is distilled, at the smallest share, on so many training images of each folder.
DISTILLED = ("dense", "adaptive", "tome", "prune_and_merge", "merge_and_carry", "static_stage")
DISTILLED_ON = (1200, 367)
DISTILLATION = Recipe(epochs=1, lr=2e-5, weight_decay=0.0)
STEPS_KEPT = 50  # after so many the state of a training is kept
PICTURED = 170  # a street with much road, walls and sky
DRAWN = ("dense", "adaptive", "tome", "static_stage", "merge_and_carry", "prune_and_merge")
MAPPED = (1, 60, 130, 170)  # the images whose maps are drawn


@dataclass(frozen=True)
class FidelityRun:
    """One method at a share of the GMACs of the dense model's blocks; ``dense`` at 1."""

    method: str
    share: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.method}-{self.share:g}"


def fidelity_runs() -> list[FidelityRun]:
    """The dense model first, then every method at every share."""
    return [FidelityRun("dense"), *(FidelityRun(method, share) for share in SHARES for method in METHODS)]


def schedule_runs() -> list[FidelityRun]:
    """The dense model, ToMe, and every schedule of adaptive merging, at the smallest share."""
    return [FidelityRun("dense"), *(FidelityRun(method, SHARES[0]) for method in ("tome", *SCHEDULES))]


class Distillation(TrainingTask):
    """The dense model's tokens and its map: the squared error of the ones, the cross-entropy of the other.

    Where the student is the dense model, both are least, so that it loses nothing. The decoder is not trained.
    """

    def __init__(self, student: nn.Module, dense: Saliency) -> None:
        super().__init__(verbose=False)
        self.trainable_module = student
        self.dense = copy.deepcopy(dense).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        self.dense.eval()
        return self

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Images and what is salient in them (B, H, W), which accuracy is of; the output is (B * H * W, 2)."""
        first = self.dense.encoder.num_prefix_tokens
        with torch.no_grad():
            wanted = self.dense.encoder(input)[:, first:]
            wanted_map = self.dense.decoder(wanted).float().sigmoid()
        tokens = self.trainable_module(input)[:, first:]
        logits = self.dense.decoder(tokens).float()
        loss = F.mse_loss(tokens.float(), wanted.float())
        loss = loss + F.binary_cross_entropy_with_logits(logits, wanted_map)
        return {"loss": loss, "output": torch.stack([-logits, logits], dim=-1).flatten(0, 2)}


class Fidelity:
    """A saliency model and its compressed forms, without training and distilled, on images of some folders.

    ``work`` holds the scores, the state of an unfinished run, and one file for each finished one. ``data`` are folders
    with ``test/<class>/*`` or ``images/test/*``, and ``train`` likewise for scores and distillation; ``counts`` of each
    one's images are taken, evenly over the names in order. ``split`` is what maps are compared on: choices are made on
    ``train``, and nothing is distilled for them.
    """

    def __init__(
        self,
        model: Saliency,
        data: Sequence[Path],
        counts: Sequence[int],
        work: Path,
        device: str = "cpu",
        split: str = "test",
    ) -> None:
        self.model, self.work, self.device, self.split = model.to(device), work, device, split
        self.encoder: VisionTransformer = model.encoder
        self.counts = dict(zip((folder.name for folder in data), counts, strict=True))
        self._folders = list(data)
        size = input_size(self.encoder)
        # What no method changes: the patches' embedding and the decoder.
        self._around = count_gmacs(model.encoder.patch_embed, size)
        self._decoder = count_gmacs(model.decoder, (self.encoder.patch_embed.num_patches, self.encoder.embed_dim))
        self._blocks = self.gmacs(self.encoder)

    def gmacs(self, encoder: nn.Module) -> float:
        """Of an encoder's blocks alone."""
        return count_gmacs(encoder, input_size(self.encoder)) - self._around

    def images(self, split: str, counts: Sequence[int] | None = None) -> Tensor:
        """(images, 3, H, W), normalised: the shorter side resized to the model's, and the centre.

        ``counts`` are of each folder; ``None``: as many as are compared.
        """
        side = input_size(self.encoder)[-1]
        resize = v2.Resize(side, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        floats = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
        transform = v2.Compose([resize, v2.CenterCrop(side), floats])
        chosen = []
        for folder, count in zip(self._folders, counts or self.counts.values(), strict=True):
            root = folder / "images" / split if (folder / "images").is_dir() else folder / split
            paths = sorted(path for path in root.rglob("*") if path.is_file())
            if len(paths) < count:
                raise ValueError(f"{root} must hold at least {count} images, got {len(paths)}")
            chosen += [paths[index * len(paths) // count] for index in range(count)]
        return torch.stack([transform(Image.open(path).convert("RGB")) for path in chosen])

    @cached_property
    def compared_images(self) -> Tensor:
        return self.images(self.split)

    @cached_property
    def dense_maps(self) -> Tensor:
        return self.maps(self.encoder)

    @cached_property
    def scores(self) -> Tensor:
        """(L, patches), of training images; the loss is of the map against which of it is above the threshold."""
        path = self.work / "scores.pt"
        if not path.is_file():
            images = self.images("train")
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            batches = images[order].split(BATCH)
            masks = [self._maps(self.encoder, batch) > THRESHOLD for batch in batches]

            def loss(tokens: Tensor, masks: Tensor) -> Tensor:
                logits = self.model.decoder(tokens[:, self.encoder.num_prefix_tokens :])
                return F.binary_cross_entropy_with_logits(logits, masks.float())

            loader = list(zip(batches, masks, strict=True))
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(score_tokens(self.encoder, loader, batches=len(loader), loss_fn=loss), path)
        return torch.load(path, weights_only=True)

    def maps(self, encoder: nn.Module) -> Tensor:
        """Of all images that are compared: (images, H, W), on the CPU."""
        return torch.cat([self._maps(encoder, batch) for batch in self.compared_images.split(BATCH)])

    def do(self, run: FidelityRun) -> None:
        """Distil the run's model, compare its maps again; nothing where this was done before, or is not to be."""
        self.test(run)
        record = json.loads(self._record(run).read_text(encoding="utf-8"))
        wanted = self.split == "test" and run.method in DISTILLED and run.share in (1, SHARES[0])
        if "distilled" in record or not wanted:
            return
        print(f"== {run.name}", flush=True)
        task = Distillation(copy.deepcopy(self.build(run, record["setting"])), self.model)
        state = self.work / f"{run.name}_state"
        fit(
            task,
            self.distillation_loader,
            [],
            DISTILLATION,
            accelerator=make_accelerator(mixed_precision="bf16", cpu=self.device == "cpu"),
            state_dir=state,
            evaluator=lambda model, _, accelerator: {
                "top1": 100 * compare(self.maps(accelerator.unwrap_model(model)), self.dense_maps)["iou"]
            },
            recovery_interval=STEPS_KEPT,
        )
        maps = self.maps(task.trainable_module.eval())
        distilled = {**compare(maps, self.dense_maps), "iou_by_data": self._iou_by_data(maps), **versions()}
        write_atomically(self._record(run), json.dumps(record | {"distilled": distilled}, indent=1).encode())
        forget(state)

    @cached_property
    def distillation_loader(self) -> DataLoader:
        """Shuffled batches of training images, and what is salient in each."""
        images = self.images("train", DISTILLED_ON)
        masks = [self._maps(self.encoder, batch) > THRESHOLD for batch in images.split(BATCH)]
        return DataLoader(TensorDataset(images, torch.cat(masks).long()), BATCH, shuffle=True, drop_last=True)

    def test(self, run: FidelityRun) -> None:
        """Build the run's model, compare its maps with the dense one's; nothing where this was done before."""
        path = self._record(run)
        if path.is_file():
            return
        encoder, setting = self.match(run)
        maps = self.maps(encoder)
        blocks = self.gmacs(encoder)
        record = {
            **asdict(run),
            "setting": setting,
            **compare(maps, self.dense_maps),
            "iou_by_data": self._iou_by_data(maps),
            "blocks_gmacs": blocks,
            "blocks_share": blocks / self._blocks,
            "gmacs": blocks + self._around + self._decoder,
            **versions(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record, indent=1).encode())
        print(f"{run.name}: IoU {100 * record['iou']:.1f} at {record['blocks_share']:.3f} of the GMACs", flush=True)

    def match(self, run: FidelityRun) -> tuple[nn.Module, float | None]:
        """The run's encoder, and the setting at which its GMACs come closest to the run's share."""
        if run.method == "dense":
            return self.encoder, None
        patches = self.encoder.patch_embed.num_patches
        if run.method in SCHEDULES:
            settings = list(range(len(AdaptivePlan.candidates(self.encoder, **SCHEDULES[run.method]))))
        elif run.method in ("tome", "atm"):
            settings = merges_per_block(self.encoder)
        elif run.method in ("local_merge", "algm"):
            settings = list(range(1, patches // 4 + 1))
        elif run.method in PEERS:
            settings = [thousandths / 1000 for thousandths in range(600, 1000)]
        else:
            settings = [rate for rate in RATES if rate <= 1 - PRUNE_RATE]
        wanted = run.share * self._blocks + self._around
        encoder, setting = matched(partial(self._make, run.method), self.encoder, settings, wanted)
        return encoder.eval().to(self.device), setting

    def build(self, run: FidelityRun, setting: float | None) -> nn.Module:
        """The run's encoder at a setting that was matched before."""
        if run.method == "dense":
            return self.encoder
        return self._make(run.method, self.encoder, setting).eval().to(self.device)

    def measure(self, path: Path, runs: list[FidelityRun], rounds: int = 10) -> None:
        """Time the model of every finished run, whole and its encoder, all in turns, and write the result file."""
        done = [run for run in runs if self._record(run).is_file()]
        records = [json.loads(self._record(run).read_text(encoding="utf-8")) for run in done]
        images = torch.randn(BATCH, *input_size(self.encoder), device=self.device)
        calls: dict[str, Callable[[], object]] = {}
        for run, record in zip(done, records, strict=True):
            encoder = self.build(run, record["setting"])
            calls[run.name] = partial(Saliency(encoder, self.model.decoder).eval(), images)
            calls[f"encoder of {run.name}"] = partial(encoder.forward_features, images)
        with torch.inference_mode(), self._autocast():
            seconds = alternate(calls, rounds, self.device == "cuda")
        speed = {name: len(images) / statistics.median(times) for name, times in seconds.items()}
        dense = FidelityRun("dense").name
        for run, record in zip(done, records, strict=True):
            for field, name in (("", run.name), ("encoder_", f"encoder of {run.name}")):
                record[f"{field}images_per_second"] = speed[name]
                if dense in speed:
                    record[f"{field}speedup"] = speed[name] / speed[name.replace(run.name, dense)]
        facts = {"images": self.counts, "split": self.split, "threshold": THRESHOLD, "batch": BATCH, "rounds": rounds}
        if any("distilled" in record for record in records):
            trained = dict(zip(self.counts, DISTILLED_ON, strict=True))
            facts |= {"distilled_on": trained, "distillation": asdict(DISTILLATION)}
        results.write(path, {**describe(self.device), **facts}, records)
        if self.split == "test":
            self.draw(path.parent, done, records)

    def draw(self, folder: Path, runs: list[FidelityRun], records: list[dict]) -> None:
        """What merges in one of the images, and the maps of some methods at the smallest share."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        chosen = self.compared_images[[index % len(self.compared_images) for index in (PICTURED, *MAPPED)]]
        pictures = (chosen * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        adaptive = compress(self.encoder, AdaptivePlan.for_model(self.encoder)).eval().to(self.device)
        save_cluster_picture(adaptive, folder / "fidelity_clusters.png", chosen[0], pictures[0])
        maps = {
            run.method: self._maps(self.build(run, record["setting"]), chosen[1:]).numpy()
            for run, record in zip(runs, records, strict=True)
            if run.method in DRAWN and run.share in (1, SHARES[0])
        }
        save_maps(pictures[1:], maps, folder / "fidelity_maps.png")

    def _iou_by_data(self, maps: Tensor) -> dict[str, float]:
        counts = list(self.counts.values())
        of_each = zip(self.counts, maps.split(counts), self.dense_maps.split(counts), strict=True)
        return {data: compare(*pair)["iou"] for data, *pair in of_each}

    def _make(self, method: str, encoder: VisionTransformer, setting: float) -> nn.Module:
        if method in PEERS:
            return PEERS[method](encoder, setting)
        if method in SCHEDULES:
            return compress(encoder, AdaptivePlan.candidates(encoder, **SCHEDULES[method])[setting])
        stages = {"stages": [(2, len(encoder.blocks) - 1)]} if method == "static_stage" else {}
        plan = CompressionPlan.from_scores(
            self.scores,
            encoder.patch_embed.grid_size,
            setting,
            num_prefix_tokens=encoder.num_prefix_tokens,
            **STATIC[method]["plan"],
            **stages,
        )
        return compress(encoder, plan, **STATIC[method]["compress"])

    @torch.inference_mode()
    def _maps(self, encoder: nn.Module, images: Tensor) -> Tensor:
        with self._autocast():
            return Saliency(encoder, self.model.decoder).eval()(images.to(self.device)).float().cpu()

    def _autocast(self) -> AbstractContextManager:
        """In bfloat16 on a GPU."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def _record(self, run: FidelityRun) -> Path:
        return self.work / "runs" / f"{run.name}.json"


def compare(maps: Tensor, dense: Tensor) -> dict[str, float]:
    """How close maps (images, H, W) are to the dense model's, each the mean over images.

    ``iou`` is of what is above the threshold in each; where nothing is in either, they agree, and it is 1.
    ``correlation`` is Pearson's over an image's pixels, ``mae`` the mean absolute error.
    """
    maps, dense = maps.double().flatten(1), dense.double().flatten(1)
    ours, theirs = maps > THRESHOLD, dense > THRESHOLD
    shared, either = (ours & theirs).sum(1), (ours | theirs).sum(1)
    iou = torch.where(either == 0, 1.0, shared / either.clamp(min=1))
    centred = [values - values.mean(1, keepdim=True) for values in (maps, dense)]
    correlation = F.cosine_similarity(*centred, dim=1)
    return {
        "iou": iou.mean().item(),
        "correlation": correlation.mean().item(),
        "mae": (maps - dense).abs().mean().item(),
    }
