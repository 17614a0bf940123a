"""``to_timm``: models of Hugging Face and torchvision, small and random, beside what it makes of them."""

import copy

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionTransformer
from torchvision.models.vision_transformer import ConvStemConfig

from pm_models import CompressionPlan, compress, load_pretrained, save_pretrained, to_timm

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 20,
    "patch_size": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "projection_size": 16,
}  # fmt: skip


def transformers_model(name, **options):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    kind = name.split("Model")[0].split("For")[0]
    if name.startswith(("CLIP", "Siglip")) and "Vision" not in name:
        config = getattr(transformers, f"{kind}Config")(
            text_config=TEXT, vision_config=SIZES, **({"projection_dim": 6} if kind == "CLIP" else {}), **options
        )
    else:
        config = getattr(transformers, f"{kind}Config")(**SIZES | options)
    return randomised(getattr(transformers, name)(config))


def randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def torchvision_model(heads=None, **options):
    model = TorchvisionTransformer(20, 4, 2, 2, 32, 48, num_classes=5, **options)
    if heads is not None:
        model.heads = heads
    return randomised(model)


def hidden(model, images):
    return model(pixel_values=images).last_hidden_state


def logits(model, images):
    return model(pixel_values=images).logits


def of_tower(model):
    return getattr(model, "vision_model", model)


def normed(model, images):  # CLIP's last hidden state is that before its last norm
    return of_tower(model).post_layernorm(of_tower(model)(pixel_values=images).last_hidden_state)


def pooled(model, images):
    return of_tower(model)(pixel_values=images).pooler_output


def features(model, images):
    found = model.get_image_features(pixel_values=images)
    return getattr(found, "pooler_output", found)  # a tensor before version 5


def unmasked(model, images):
    """What the encoder makes of all patches in their order."""
    model = copy.deepcopy(getattr(model, "vit", model))
    model.config.mask_ratio = 0.0
    return model(pixel_values=images, noise=torch.arange(25.0).expand(len(images), -1)).last_hidden_state


GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
# By their names: the options, timm's class, its prefix tokens, and what its tokens and its output are.
MODELS = {
    "ViTModel": ({}, VisionTransformer, 1, hidden, None),
    "ViTForImageClassification": ({"num_labels": 7}, VisionTransformer, 1, None, logits),
    "ViTForImageClassification without labels": ({"num_labels": 0}, VisionTransformer, 1, None, logits),
    "ViTMSNModel": ({}, VisionTransformer, 1, hidden, None),
    "ViTMSNForImageClassification": ({"num_labels": 7}, VisionTransformer, 1, None, logits),
    "ViTMAEModel": ({"mask_ratio": 0.6}, VisionTransformer, 1, unmasked, None),
    "ViTMAEForPreTraining": (
        {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
        VisionTransformer, 1, unmasked, None,
    ),
    "DeiTModel": ({}, VisionTransformerDistilled, 2, hidden, None),
    "DeiTForImageClassification": ({"num_labels": 7}, VisionTransformerDistilled, 2, None, logits),
    "DeiTForImageClassificationWithTeacher": ({"num_labels": 7}, VisionTransformerDistilled, 2, None, logits),
    "Dinov2Model": ({}, VisionTransformer, 1, hidden, None),
    "Dinov2WithRegistersModel": ({"num_register_tokens": 3}, VisionTransformer, 4, hidden, None),
    "DINOv3ViTModel": ({"num_register_tokens": 4}, Eva, 5, hidden, pooled),
    "DINOv3ViTModel without registers": ({"rope_theta": 50.0, "query_bias": False}, Eva, 1, hidden, pooled),
    "DINOv3ViTModel, gated": ({"num_register_tokens": 4, "mlp_bias": False, **GATED}, Eva, 5, hidden, pooled),
    "DINOv3ViTModel without biases": (
        {"query_bias": False, "value_bias": False, "proj_bias": False}, Eva, 1, hidden, pooled,
    ),
    "CLIPVisionModel": ({}, VisionTransformer, 1, normed, pooled),
    "CLIPVisionModel with another activation": ({"hidden_act": "gelu"}, VisionTransformer, 1, normed, pooled),
    "CLIPVisionModelWithProjection": (
        {"projection_dim": 6}, VisionTransformer, 1, normed,
        lambda model, images: model(pixel_values=images).image_embeds,
    ),
    "CLIPModel": ({}, VisionTransformer, 1, normed, features),
    "CLIPForImageClassification": ({"num_labels": 7}, VisionTransformer, 1, None, logits),
    "SiglipVisionModel": ({}, VisionTransformer, 0, lambda model, images: hidden(of_tower(model), images), pooled),
    "SiglipVisionModel without a head": ({"vision_use_head": False}, VisionTransformer, 0, hidden, None),
    "SiglipModel": ({}, VisionTransformer, 0, lambda model, images: hidden(of_tower(model), images), features),
    "SiglipForImageClassification": ({"num_labels": 7}, VisionTransformer, 0, None, logits),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_transformers(kind, tmp_path):
    """The same numbers, also when it is compressed, saved and loaded; the given model is left as it was."""
    options, timms, prefix, tokens, output = MODELS[kind]
    given = transformers_model(kind.split(" ")[0].strip(","), **options).train()
    before, config = copy.deepcopy(given.state_dict()), given.config.to_dict()
    converted = to_timm(given)
    assert type(converted) is timms
    assert converted.num_prefix_tokens == prefix
    assert not converted.training
    assert given.training
    assert given.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    given.eval()
    images = torch.randn(3, 3, 20, 20)
    with torch.inference_mode():
        for expected, actual in ((tokens, converted.forward_features), (output, converted)):
            if expected is not None:
                torch.testing.assert_close(actual(images), expected(given, images), rtol=1e-4, atol=1e-4)
    plan = CompressionPlan.from_scores(torch.rand(2, 25), (5, 5), 0.5, 0.1, num_prefix_tokens=prefix)
    compressed = compress(converted, plan).eval()
    save_pretrained(compressed, tmp_path / "model")
    with torch.inference_mode():
        folded = compressed(images)
        torch.testing.assert_close(load_pretrained(tmp_path / "model")(images), folded, rtol=1e-5, atol=1e-5)
        compressed.execution = "literal"
        torch.testing.assert_close(folded, compressed(images), rtol=1e-4, atol=1e-4)


HEADS = {
    "one layer in the place of all": (lambda: nn.Linear(32, 7), 7),
    "one layer without a bias": (lambda: nn.Linear(32, 7, bias=False), 7),
    "another layer": (lambda: nn.Sequential(nn.Linear(32, 7)), 7),
    "dropout before it": (lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 7)), 7),
    "none": (nn.Identity, 0),
    "none of any kind": (nn.Sequential, 0),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_torchvision(kind):
    make, classes = HEADS[kind]
    given = torchvision_model(make()).eval()
    converted = to_timm(given)
    assert converted.num_classes == classes
    images = torch.randn(3, 3, 20, 20)
    with torch.inference_mode():
        torch.testing.assert_close(converted(images), given(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", [nn.Linear(32, 7), nn.Identity()])
def test_the_last_layer_of_torchvision(head):
    given = torchvision_model().eval()
    given.heads.head = head
    converted = to_timm(given)
    images = torch.randn(3, 3, 20, 20)
    with torch.inference_mode():
        torch.testing.assert_close(converted(images), given(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", [lambda: nn.Sequential(nn.Dropout(), nn.Linear(32, 4, bias=False)), nn.Identity])
def test_heads_of_transformers(head):
    given = transformers_model("ViTForImageClassification").eval()
    given.classifier = head()
    images = torch.randn(3, 3, 20, 20)
    with torch.inference_mode():
        torch.testing.assert_close(to_timm(given)(images), given(images).logits, rtol=1e-4, atol=1e-4)


class Adapted(nn.Module):
    """As peft wraps a model, whose attributes it passes on."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model
        self.config = model.config

    def merge_and_unload(self):
        return self.base_model


class Lora(nn.Module):
    """As peft puts a layer in the place of another."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.Linear(layer.in_features, 2, bias=False)

    def forward(self, x):
        return self.base_layer(x)


def with_adapters_inside():
    model = transformers_model("ViTForImageClassification")
    name, layer = next((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    above, _, last = name.rpartition(".")
    setattr(model.get_submodule(above), last, Lora(layer))
    return model


def of_int8():
    model = transformers_model("ViTModel")
    layer = next(layer for layer in model.modules() if isinstance(layer, nn.Linear))
    layer.weight = nn.Parameter(layer.weight.data.mul(10).to(torch.int8), requires_grad=False)
    return model


class Subclass(torch.Tensor):
    """As torchao's tensors are."""


def of_a_subclass():
    model = torchvision_model()
    layer = model.encoder.layers[0].mlp[0]
    layer.weight = nn.Parameter(torch.Tensor._make_subclass(Subclass, layer.weight.data))
    return model


def in_pieces():
    model = torchvision_model()
    model.encoder.layers[1].to("meta")
    return model


def without_weights():
    with torch.device("meta"):
        return TorchvisionTransformer(20, 4, 2, 2, 32, 48)


NOT_CONVERTED = {
    "adapters of peft": (lambda: Adapted(transformers_model("ViTModel")), "not merged: merge .*merge_and_unload"),
    "adapters inside": (with_adapters_inside, "adapters that are not merged: merge .*merge_and_unload"),
    "quantised by torch": (
        lambda: torch.ao.quantization.quantize_dynamic(torchvision_model(), {nn.Linear}),
        "weights that are not floating-point tensors .*, as quantised models have: convert the original model",
    ),
    "int8": (of_int8, r"floating-point tensors .*weight of torch.int8\), as quantised models have"),
    "a tensor subclass": (of_a_subclass, r"floating-point tensors .encoder.*weight of Subclass\), as quantised models"),
    "in pieces": (in_pieces, "is spread over cpu, meta: load all of it on one device, without device_map"),
    "without weights": (without_weights, "is spread over meta: load all of it"),
    "two convolutions": (
        lambda: torchvision_model(conv_stem_configs=[ConvStemConfig(8, 2, 2), ConvStemConfig(16, 2, 2)]),
        "more than one convolution before its blocks",
    ),
    "an MLP for a head": (
        lambda: torchvision_model(nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2))),
        "head consists of Linear, ReLU, Linear, but timm's is a single Linear",
    ),
    "a head of another kind": (lambda: torchvision_model(nn.LayerNorm(32)), r"head consists of LayerNorm, but"),
    "DINOv2's head": (
        lambda: transformers_model("Dinov2ForImageClassification"),
        "classifier also reads the mean of its patches, .*: pass its backbone, model.dinov2, and",
    ),
    "DINOv2's head beside registers": (
        lambda: transformers_model("Dinov2WithRegistersForImageClassification"),
        "also reads the mean of its patches, .*: pass its backbone, model.dinov2_with_registers, and train a new head",
    ),
    "biases of keys": (lambda: transformers_model("DINOv3ViTModel", key_bias=True), "has key biases"),
    "another gate": (
        lambda: transformers_model("DINOv3ViTModel", use_gated_mlp=True), "has hidden_act 'gelu', expected 'silu'"
    ),
    "images that it does not take": (
        lambda: transformers_model("Dinov2Model", image_size=[20, 12]), "does not run on images of|something else"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", NOT_CONVERTED)
def test_what_cannot_be_converted_says_why(kind):
    make, message = NOT_CONVERTED[kind]
    with pytest.raises(ValueError, match=message) as raised:
        to_timm(make())
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "options"), [("DeiTForMaskedImageModeling", {"encoder_stride": 4}), ("Dinov2Backbone", {})]
)
def test_classes_that_are_not_taken(name, options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name.removesuffix('Backbone').split('For')[0]}Config")(**SIZES | options)
    with pytest.raises(TypeError, match=f"must be torchvision's VisionTransformer, .* got {name}$"):
        to_timm(getattr(transformers, name)(config))


def test_adapters_that_are_merged():
    given = transformers_model("ViTModel")
    assert torch.equal(to_timm(Adapted(given).merge_and_unload()).cls_token, given.embeddings.cls_token)


def test_a_folder_of_transformers_is_known(tmp_path):
    transformers_model("ViTModel").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="it is a model of transformers: load it there, and convert it with pm_models.to_timm"
    ):
        load_pretrained(tmp_path)
