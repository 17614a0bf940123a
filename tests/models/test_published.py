"""The authors' files as their script leaves them, spoiled ones, and what is said of weights that do not fit."""

import argparse

import numpy as np
import pytest
import torch
from helpers import images_for, plan_for, small_vit
from safetensors.torch import save_file

from pm_models import compress, load_authors_checkpoint, load_pretrained, save_pretrained


@pytest.mark.parametrize("size", [1, 150])
def test_errors_of_our_own_files_are_one_line(tmp_path, size):
    model = small_vit(depth=2)
    save_pretrained(model, tmp_path)
    weights = {f"x{index}": torch.ones(2) for index in range(size)}
    save_file(model.state_dict() | weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"are of another model: Unexpected keys \({size}\): x0 \(2,\)") as raised:
        load_pretrained(tmp_path)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 500


def authors_file(path, change):
    model = small_vit(depth=2)
    model = compress(model, plan_for(model), train_matrices="dense").eval()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("stages.")}
    for block, matrices in enumerate(model.stages.values()):
        state[f"blocks.{block}.attn.merge_matrix"] = matrices.merge.detach()
        state[f"blocks.{block}.attn.recover_matrix"] = matrices.reconstruct.detach()
        state[f"blocks.{block}.attn.token_mask"] = model.plan.token_mask(block)
    content = {"model": state, "channels": list(model.plan.tokens)}
    change(content)
    torch.save(content, path)
    return model


def test_the_authors_files_with_what_their_script_leaves(tmp_path):
    def change(content):
        content |= {"args": argparse.Namespace(lr=0.1, mean=np.float64(0.5)), "max_accuracy": np.float64(79.6)}
        content["model"] = {f"module.{name}": value for name, value in content["model"].items()}

    model = authors_file(tmp_path / "w.pth", change)
    loaded = load_authors_checkpoint(tmp_path / "w.pth", num_heads=2, img_size=(28, 20))
    images = images_for(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(channels=None), "'channels' must hold the number of tokens of each block"),
        (lambda content: content.update(channels=["a"]), "'channels' must hold the number of tokens of each block"),
        (
            lambda content: content["model"].update({"blocks.x.attn.merge_matrix": torch.ones(2)}),
            "another model|holds no",
        ),
        (
            lambda content: content["model"].update({"blocks.1000000000.norm1.weight": torch.ones(2)}),
            "holds no weights of a Vision Transformer: it has a weight of block 1000000000, but no more than",
        ),
        (lambda content: content["model"].update(blocks=torch.ones(2)), "another model: Unexpected keys .1.: blocks"),
    ],
)
def test_the_authors_files_that_are_spoiled(tmp_path, change, message):
    authors_file(tmp_path / "w.pth", change)
    with pytest.raises(ValueError, match=message) as raised:
        load_authors_checkpoint(tmp_path / "w.pth", num_heads=2, img_size=(28, 20))
    assert len(str(raised.value).splitlines()) == 1
