"""tests/released.py: a file in the layout of the paper's code gives what that code's networks give.

The weights of the file here follow from their names. Its names and shapes, and what the paper's
networks make of it, were computed once by a plain reading of those networks, tests/test_released.py
of commit 97270dc, and are pinned below: no word of it comes from the code that is tested.
"""

import binascii
import hashlib
import sys

import numpy as np
import pytest
import released
import torch

import data
import evaluate
import train

UNITS, UNET = "cond_stage_model.", "model.diffusion_model."
IMAGES = torch.arange(2 * 3 * 64 * 64).mul(7919).remainder(251).view(2, 3, 64, 64).byte()
Z = torch.linspace(-2, 2, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16)


def values(name, shape):
    """A weight that its name decides: sums of about size 1, norms and variances about 1."""
    draw = np.random.RandomState(binascii.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
        draw = 1 + 0.1 * np.clip(draw, -3, 3)
    elif len(shape) != 2 or "embedding" not in name:
        draw = draw * (0.1 if len(shape) < 2 else np.prod(shape[1:]) ** -0.5)
    return torch.tensor(draw).float()


@pytest.fixture(scope="module")
def theirs():
    """{name: weight} of a file with 3 units of 8 numbers, a narrow extractor and U-Net."""
    cfg = train.default_settings() | {
        "extractor.n_units": 3, "extractor.unit_dim": 8, "extractor.channels": [4, 8, 16, 16, 16],
        "extractor.hidden": [256, 16], "extractor.unit_hidden": [16, 32], "unet.base": 32}
    weights = {"scale_factor": torch.tensor(0.37)}
    for ours, x in train.Model(cfg).state_dict().items():
        if ours.startswith("dyga.") or ours in ("vqgan.codebook.uses", "vqgan.latent_std"):
            continue
        names = released.their_names(ours, released.blocks(cfg), 3)
        shape = (x.shape[0] // len(names), *x.shape[1:]) if x.ndim else ()
        if "unit_mlp" in ours:
            shape = x.shape[2:] if ours.endswith("bias") else (x.shape[2], x.shape[1])
        elif ours.startswith("unet.") and ".proj_" in ours and x.ndim == 2:
            shape = (*shape, 1, 1)  # 1x1 convolutions there
        weights |= {name: values(name, shape) for name in names}
    return weights


def convert(tmp_path, weights):
    torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "model.ckpt")
    return released.convert(tmp_path / "model.ckpt", "shapes3d")


def test_the_names_and_shapes_are_those_of_the_papers_repository(theirs):
    lines = sorted(f"{name} {tuple(x.shape)}\n" for name, x in theirs.items())
    assert (len(lines), hashlib.sha256("".join(lines).encode()).hexdigest()) == (
        999, "d248fd49e8f473c139bc9008824e1c3c1861c3fddc9a369ade008ca4ad40f723")


@pytest.mark.parametrize("averaged", [False, True])
def test_every_network_computes_what_theirs_does(theirs, tmp_path, averaged):
    weights = dict(theirs)
    if averaged:  # the U-Net then samples with these, whatever the training weights are
        for name in [name for name in weights if name.startswith(UNET)]:
            weights["model_ema." + name.removeprefix("model.").replace(".", "")] = weights[name]
            weights[name] = torch.full_like(weights[name], 9.0)
        weights |= {"model_ema.decay": torch.tensor(0.9999), "betas": torch.zeros(1000)}
    torch.save(convert(tmp_path, weights), tmp_path / "ckpt.pt")
    model, _ = train.load_checkpoint(tmp_path / "ckpt.pt")
    with torch.no_grad():
        c, z0 = model.units(IMAGES), model.vqgan.encode(IMAGES)
        drawn = model.vqgan.decoder(model.vqgan.codebook(z0 * model.vqgan.latent_std)[0])
        eps = model.unet(Z, torch.tensor([3, 900]), c)
    for x, pinned in ((c, [0.1289, 0.0, 0.1853, 0.1051]), (z0, [-0.0210, 0.0506, 0.0829, 0.1428]),
                      (drawn, [-0.0648, -0.5033, 0.1150, 0.5884]),
                      (eps, [-0.4432, 0.6776, 0.4858, 0.5191])):
        x = x.flatten()
        found = [x[0], x[len(x) // 2 + 5], x[-1], x.std()]
        assert torch.allclose(torch.stack(found), torch.tensor(pinned), atol=5e-4)
    assert torch.equal(model.dyga.align(c), c)  # there are no anchors


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop(f"{UNET}middle_block.1.proj_out.bias"), "no .*middle_block.1.proj_out.bias"),
    (lambda w: w.update({f"{UNET}label_emb.weight": torch.ones(2)}), "label_emb.weight has no pl"),
    (lambda w: w.update({f"{UNITS}mlps.2.layers.0.bias": torch.ones(3)}), "0.layers.0.bias makes"),
    (lambda w: w.update({f"{UNET}input_blocks.0.0.bias": torch.ones(33)}), "is 33 wide"),
    (lambda w: w.update({f"{UNET}input_blocks.0.0.bias": torch.tensor(1.0)}), "has no model.diff"),
    (lambda w: w.pop("scale_factor"), "has no scale_factor"), (lambda w: w.clear(), "has no cond")])
def test_an_unexpected_layout_is_one_line_that_names_the_tensor(theirs, tmp_path, change, words):
    weights = dict(theirs)
    change(weights)
    with pytest.raises(data.UserError, match=words) as error:
        convert(tmp_path, weights)
    assert "\n" not in str(error.value)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_code_in_a_file_does_not_run_and_classes_of_old_lightning_are_passed_over(tmp_path):
    path, victim = tmp_path / "model.ckpt", tmp_path / "victim"
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": Call(open, victim, "w")}, path)
    assert list(released.read(path)) == ["a"] and not victim.exists()


def test_missing_and_damaged_files_are_one_line_that_says_how_to_re_save(theirs, tmp_path):
    convert(tmp_path, theirs)
    (tmp_path / "half").write_bytes((tmp_path / "model.ckpt").read_bytes()[:100_000])
    for name in ("none", "half"):
        with pytest.raises(data.UserError, match="re-save its weights alone"):
            released.read(tmp_path / name)


def test_the_commands_convert_a_file_and_score_it(theirs, tmp_path, monkeypatch, capsys):
    convert(tmp_path, theirs)
    ckpt = str(tmp_path / "out" / "ckpt.pt")
    monkeypatch.setattr(sys, "argv", ["released.py", str(tmp_path / "model.ckpt"), "--dataset",
                                      "shapes3d", "--out", ckpt])
    released.main()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", ckpt, "--quick", "--only", "modularity",
                                      "--device", "cpu", "--data_dir", str(tmp_path)])
    evaluate.main()
    assert "No anchors" in capsys.readouterr().out
