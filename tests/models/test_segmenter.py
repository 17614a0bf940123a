"""Segmenter against the paper's equations written out, its published layout, windows, and its encoder compressed."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from helpers import plan_for, published_segmenter, small_vit
from timm.layers import Attention
from torch.utils._python_dispatch import TorchDispatchMode

from pm_models import (
    CompressionPlan,
    PMVisionTransformer,
    Segmenter,
    compress,
    load_pretrained,
    load_segmenter_checkpoint,
    save_pretrained,
    score_tokens,
)
from pm_models.segmenter import predict, sliding_window

CLASSES = 5


def small_segmenter(decoder="mask_transformer", **arguments):
    """On a 7 x 5 grid, with random weights everywhere."""
    torch.manual_seed(1)
    model = Segmenter(small_vit(num_classes=0, depth=3, **arguments), CLASSES, decoder=decoder, decoder_heads=2).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pictures(model, batch=2):
    return torch.randn(batch, 3, *model.image_size, dtype=next(model.parameters()).dtype)


def block_written_out(weights, prefix, x, heads):
    def linear(name, x):
        return x @ weights[f"{prefix}{name}.weight"].T + weights[f"{prefix}{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{prefix}{name}.weight"] + weights[f"{prefix}{name}.bias"]

    batch, tokens, width = x.shape
    qkv = linear("attn.qkv", norm("norm1", x)).view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    attention = (qkv[0] @ qkv[1].mT / (width // heads) ** 0.5).softmax(-1)
    x = x + linear("attn.proj", (attention @ qkv[2]).transpose(1, 2).reshape(batch, tokens, width))
    return x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2", x))))


def segmenter_written_out(weights, images, patch, heads, matrices=None):
    """The published model, from its weights alone."""
    width = weights["encoder.pos_embed"].shape[-1]
    grid = tuple(side // patch for side in images.shape[-2:])
    columns = F.unfold(images, patch, stride=patch).mT
    x = columns @ weights["encoder.patch_embed.proj.weight"].flatten(1).T + weights["encoder.patch_embed.proj.bias"]
    prefix = [weights[f"encoder.{name}"] for name in ("cls_token", "dist_token") if f"encoder.{name}" in weights]
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1) + weights["encoder.pos_embed"]
    depth = len({name.split(".")[2] for name in weights if name.startswith("encoder.blocks.")})
    for index in range(depth):
        name = f"encoder.blocks.{index}."
        if f"{name}attn.merge_matrix" in weights:
            merge, recover, mask = (
                weights[f"{name}attn.{m}"] for m in ("merge_matrix", "recover_matrix", "token_mask")
            )
            x = recover @ block_written_out(weights, name, merge @ x, heads) + (1 - mask)[:, None] * x
        else:
            x = block_written_out(weights, name, x, heads)
    x = F.layer_norm(x, (width,), weights["encoder.norm.weight"], weights["encoder.norm.bias"], 1e-5)[:, len(prefix) :]
    if "decoder.head.weight" in weights:
        logits = x @ weights["decoder.head.weight"].T + weights["decoder.head.bias"]
    else:
        classes = weights["decoder.cls_emb"].shape[1]
        x = x @ weights["decoder.proj_dec.weight"].T + weights["decoder.proj_dec.bias"]
        x = torch.cat([x, weights["decoder.cls_emb"].expand(len(x), -1, -1)], dim=1)
        for index in range(len({name.split(".")[2] for name in weights if name.startswith("decoder.blocks.")})):
            x = block_written_out(weights, f"decoder.blocks.{index}.", x, width // 64)
        norm = (weights["decoder.decoder_norm.weight"], weights["decoder.decoder_norm.bias"])
        x = F.layer_norm(x, (width,), *norm, 1e-5)
        x, embeddings = (
            x[:, :-classes] @ weights["decoder.proj_patch"],
            x[:, -classes:] @ weights["decoder.proj_classes"],
        )
        masks = (x / x.norm(dim=-1, keepdim=True)) @ (embeddings / embeddings.norm(dim=-1, keepdim=True)).mT
        logits = F.layer_norm(
            masks, (classes,), weights["decoder.mask_norm.weight"], weights["decoder.mask_norm.bias"], 1e-5
        )
    logits = logits.mT.reshape(len(images), -1, *grid)
    return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"decoder": "linear"},
        {"distilled": True, "size": (20, 20)},
        {"compressed": (0, 2)},
        {"compressed": (0, 1, 2), "decoder": "linear", "distilled": True},
    ],
)
def test_published_checkpoints(tmp_path, arguments):
    torch.manual_seed(0)
    weights = published_segmenter(tmp_path / "toy", **arguments)
    images = torch.randn(2, 3, *arguments.get("size", (16, 24)))
    expected = segmenter_written_out(
        {name: value.double() for name, value in weights.items()}, images.double(), patch=4, heads=2
    )
    for kind, mean in (("deit", (0.485, 0.456, 0.406)), ("vit", (0.5, 0.5, 0.5))):
        edit(tmp_path / "toy", normalization=kind)
        assert load_segmenter_checkpoint(tmp_path / "toy").encoder.pretrained_cfg["mean"] == mean
    for path in (tmp_path / "toy", tmp_path / "toy" / "checkpoint.pth"):
        model = load_segmenter_checkpoint(path)
        assert not model.training
        torch.testing.assert_close(model(images).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.double()(images.double()), expected, rtol=1e-9, atol=1e-9)
    assert isinstance(model.encoder, PMVisionTransformer) == ("compressed" in arguments)
    save_pretrained(model, tmp_path / "saved")
    torch.testing.assert_close(load_pretrained(tmp_path / "saved")(images.double()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / "variant.yml").unlink(), FileNotFoundError, "variant.yml: it describes the network"),
        (lambda folder: (folder / "checkpoint.pth").unlink(), FileNotFoundError, "no checkpoint file at"),
        (lambda folder: (folder / "variant.yml").write_text("a: ["), ValueError, "does not describe a Segmenter"),
        (lambda folder: (folder / "variant.yml").write_text("- 1"), ValueError, "does not describe a Segmenter"),
        (lambda folder: edit(folder, normalization="x"), ValueError, "does not describe a Segmenter"),
        (lambda folder: edit(folder, n_cls=7), ValueError, "(?s)are of another model: .*cls_emb"),
        (lambda folder: edit(folder, d_model=64), ValueError, "says d_model 64, but the weights .* have 128"),
        (lambda folder: edit(folder, image_size=[16, 16]), ValueError, "(?s)are of another model: .*pos_embed"),
        (lambda folder: edit(folder, decoder={"name": "fpn"}), ValueError, "decoder must be one of"),
        (lambda folder: torch.save({"a": torch.ones(1)}, folder / "checkpoint.pth"), ValueError, "begin with encoder"),
        (lambda folder: (folder / "checkpoint.pth").write_bytes(b"PK"), ValueError, "is truncated"),
    ],
)
def test_foreign_published_checkpoints(tmp_path, damage, error, message):
    published_segmenter(tmp_path / "toy")
    damage(tmp_path / "toy")
    with pytest.raises(error, match=message):
        load_segmenter_checkpoint(tmp_path / "toy")


def edit(folder, **changes):
    variant = yaml.safe_load((folder / "variant.yml").read_text())
    variant["net_kwargs"] |= changes
    (folder / "variant.yml").write_text(yaml.safe_dump(variant))


@pytest.mark.parametrize("decoder", ["mask_transformer", "linear"])
def test_compression_folded_is_literal(decoder):
    model = small_segmenter(decoder).double()
    plan = plan_for(model.encoder, stages=[(0, 0), (1, 2)])
    compressed = model.compressed(plan, size_bias=True)
    assert compressed.decoder is not model.decoder
    assert not isinstance(model.encoder, PMVisionTransformer)
    images = pictures(model)
    folded = compressed(images)
    assert folded.shape == (2, CLASSES, *model.image_size)
    compressed.encoder.execution = "literal"
    torch.testing.assert_close(compressed(images), folded, rtol=1e-10, atol=1e-10)
    everything = model.compressed(plan_for(model.encoder, 1.0, 0.0))
    torch.testing.assert_close(everything(images), model(images), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(compressed.uncompressed()(images), model(images), rtol=1e-10, atol=1e-10)


def test_scores_come_from_the_loss_of_every_pixel():
    model = small_segmenter().double()
    batches = [(pictures(model, batch), torch.randint(0, CLASSES, (batch, *model.image_size))) for batch in (2, 1)]
    scores = score_tokens(model, batches, batches=2)
    kept, total, eager = [], 0, copy.deepcopy(model)

    def keep(_, __, weights):
        weights.retain_grad()
        kept.append(weights)

    for module in eager.encoder.modules():
        if isinstance(module, Attention):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(keep)
    for images, targets in batches:
        kept.clear()
        F.cross_entropy(eager(images), targets).backward()
        total = total + torch.stack(
            [(w * w.grad).sum(dim=(0, 1, 2)).abs() / (len(w) * w.shape[1] * w.shape[2]) for w in kept]
        )
    torch.testing.assert_close(scores.double(), total[:, 1:], rtol=1e-5, atol=1e-12)
    compressed = model.compressed(CompressionPlan.from_scores(scores, (7, 5), 0.5, 0.2))
    assert score_tokens(compressed, batches, batches=2).shape == (3, 35)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("decoder", ["mask_transformer", "linear"])
@pytest.mark.parametrize("kind", ["plain", "compressed"])
def test_saving_and_loading(tmp_path, decoder, kind):
    model = small_segmenter(decoder)
    images = pictures(model)
    if kind == "compressed":
        model = model.compressed(plan_for(model.encoder), train_matrices="dense", size_bias=True).eval()
    save_pretrained(model, tmp_path / "m")
    again = load_pretrained(tmp_path / "m")
    assert isinstance(again, Segmenter)
    assert torch.equal(again(images), model(images))
    if kind == "compressed":
        assert again.encoder.plan == model.encoder.plan
        plain = load_pretrained(tmp_path / "m", uncompressed=True)
        assert torch.equal(plain(images), model.uncompressed()(images))


def test_windows_that_cover_once_are_the_whole(monkeypatch):
    """A model of single pixels, whose whole-image pass is known."""
    calls = []

    def model(crops):
        calls.append(len(crops))
        return torch.cat([crops, crops.square()], dim=1)

    images = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    expected = torch.cat([images, images.square()], dim=1)
    for window, stride in (((12, 20), 4), ((4, 4), 4), ((6, 10), 6), ((12, 5), 5), ((12, 20), None)):
        torch.testing.assert_close(sliding_window(model, images, window, stride), expected)
    calls.clear()
    sliding_window(model, images, (4, 4), 4, batch_size=7)
    assert calls == [7, 7, 7, 7, 2]


@pytest.mark.parametrize(
    ("size", "window", "stride"), [((12, 21), (5, 8), 3), ((9, 9), (9, 4), 4), ((7, 30), (7, 7), 1)]
)
def test_overlapping_windows_are_averaged(size, window, stride):
    """Against a sum over every window, with logits that depend on the place in the window."""
    place = torch.randn(2, *window, dtype=torch.float64)

    def model(crops):
        return crops[:, :2] * place

    images = torch.randn(1, 3, *size, dtype=torch.float64)
    total, count = torch.zeros(1, 2, *size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    tops = sorted({*range(0, size[0] - window[0], stride), size[0] - window[0]})
    lefts = sorted({*range(0, size[1] - window[1], stride), size[1] - window[1]})
    for top in tops:
        for left in lefts:
            part = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            total[part] += images[part][:, :2] * place
            count[part] += 1
    torch.testing.assert_close(sliding_window(model, images, window, stride), total / count)


def test_windows_of_a_segmenter():
    model = small_segmenter()
    images = torch.randn(1, 3, 28, 40)
    with torch.inference_mode():
        windows = sliding_window(model, images, model.image_size, 20)
        torch.testing.assert_close(windows[..., :20], model(images[..., :20]))
        torch.testing.assert_close(windows[..., 20:], model(images[..., 20:]))
        found = predict(model, images, stride=20)
        torch.testing.assert_close(found, windows.softmax(dim=1))
        whole = predict(model, images[..., :20], (56, 40))
    expected = F.interpolate(model(images[..., :20]), (56, 40), mode="bilinear", align_corners=False).softmax(1)
    torch.testing.assert_close(whole, expected)


def test_several_scales_and_mirrors():
    model = small_segmenter()
    images = torch.randn(1, 3, 28, 40)
    with torch.inference_mode():
        found = predict(model, images, stride=10, scales=(1.0, 1.5), flip=True)
        parts = []
        for size in ((28, 40), (42, 60)):
            scaled = F.interpolate(images, size, mode="bilinear", align_corners=False)
            for mirrored in (scaled, scaled.flip(-1)):
                logits = sliding_window(model, mirrored, model.image_size, 10)
                logits = F.interpolate(logits, (28, 40), mode="bilinear", align_corners=False)
                parts.append((logits if mirrored is scaled else logits.flip(-1)).softmax(1))
    torch.testing.assert_close(found, sum(parts) / 4)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(1, 28, 40))


def test_small_images_are_enlarged_to_a_window():
    model = small_segmenter()
    with torch.inference_mode():
        assert predict(model, torch.randn(1, 3, 9, 11)).shape == (1, CLASSES, 9, 11)
        assert predict(model, torch.randn(1, 3, 100, 11), scales=(0.5,)).shape == (1, CLASSES, 100, 11)


def test_an_encoder_of_any_size():
    model = small_segmenter(dynamic_img_size=True, dynamic_img_pad=True)
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 36, 24)).shape == (1, CLASSES, 36, 24)
        odd = torch.randn(1, 3, 26, 19)
        padded = F.pad(odd, (0, 1, 0, 2))
        torch.testing.assert_close(model(odd), model(padded)[..., :26, :19])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.randn(1, 3, 28, 24)), ValueError, "images must be 28 x 20 pixels, got 28 x 24"),
        (
            lambda m: sliding_window(m, torch.randn(1, 3, 9, 40), (28, 20)),
            ValueError,
            "at least as large as the window",
        ),
        (lambda m: sliding_window(m, torch.randn(1, 3, 28, 40), (28, 20), 21), ValueError, "stride must be between 1"),
        (lambda m: Segmenter(m.encoder, 5, decoder="fpn"), ValueError, "decoder must be one of 'mask_transformer'"),
        (lambda m: Segmenter(m.encoder, 0), ValueError, "num_classes must be at least 1, got 0"),
        (lambda m: Segmenter(m.encoder, 5, decoder_heads=3), ValueError, "must divide the encoder's width 32, got 3"),
        (lambda m: Segmenter(timm.create_model("resnet10t"), 5), TypeError, "must be a timm VisionTransformer"),
        (lambda m: m.compressed(plan_for(small_vit())), ValueError, "plan was made for depth 5"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(small_segmenter())


class LargestTensor(TorchDispatchMode):
    """How many elements the largest result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > tensor.element_size():
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("segments", ["raster", "nearest"])
def test_plans_and_folding_grow_with_tokens(segments):
    """At 1601 tokens, nothing is of tokens times tokens: planning, compressing and folding."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=80, patch_size=2, embed_dim=4, num_heads=1, depth=6, num_classes=3
    ).eval()
    scores = torch.rand(6, 1600)
    with LargestTensor() as largest:
        plan = CompressionPlan.from_scores(scores, (40, 40), 0.6, 0.1, segments=segments)
        compressed = compress(model, plan)
        compressed.eval()
    assert compressed.plan.num_tokens == 1601
    assert largest.elements <= 40 * 1601
