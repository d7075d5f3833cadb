"""tests/released.py: a file in the layout of the paper's code gives what that code's networks give,
by a plain reading of them: names, shapes, results of test_released.py of commit 97270dc, pinned."""
import hashlib
import zlib

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

@pytest.fixture(scope="module")
def theirs():
    """{name: weight} of a file with 3 units of 8 numbers, a narrow extractor and U-Net."""
    cfg = vars(train.build_parser().parse_args([])) | {
        "extractor.n_units": 3, "extractor.unit_dim": 8, "extractor.channels": [4, 8, 16, 16, 16],
        "extractor.hidden": [256, 16], "extractor.unit_hidden": [16, 32], "unet.base": 32}
    weights, state = {}, train.Model(cfg).state_dict()
    for ours in [name for name in state if not name.startswith(released.OURS)]:
        names = released.their_names(ours, 3)  # one here may be several there
        shape = state[ours].chunk(len(names))[0].shape if state[ours].ndim else ()
        if "unit_mlp" in ours:
            shape = shape[2:] if ours.endswith("bias") else shape[:0:-1]
        elif ".proj_" in ours and ours.startswith("unet.") and len(shape) == 2:
            shape = (*shape, 1, 1)  # 1x1 convolutions there
        scale = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
        norm = len(shape) == 1 and ours.endswith(("weight", "running_var"))  # there about 1
        for name in names:  # which decides the values
            draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
            weights[name] = torch.tensor(scale * draw + norm).float()
    return weights | {"scale_factor": torch.tensor(0.37)}

def test_the_names_and_shapes_are_those_of_the_papers_repository(theirs):
    lines = sorted(f"{name} {tuple(x.shape)}\n" for name, x in theirs.items())
    assert (len(lines), hashlib.sha256("".join(lines).encode()).hexdigest()) == (
        999, "d248fd49e8f473c139bc9008824e1c3c1861c3fddc9a369ade008ca4ad40f723")

@pytest.mark.parametrize("averaged", [False, True])
def test_every_network_of_a_converted_file_computes_what_theirs_does_and_gets_scores(
        theirs, tmp_path, averaged, main, capsys):
    weights, path = theirs | {"betas": torch.zeros(1000)}, tmp_path / "model.ckpt"
    for name in [name for name in theirs if averaged and name.startswith(UNET)]:
        weights["model_ema." + name.removeprefix("model.").replace(".", "")] = theirs[name]
        weights |= {name: torch.full_like(theirs[name], 9.0), "model_ema.decay": torch.ones(1)}
    torch.save({"epoch": 1, "state_dict": weights}, path)
    assert main(released, path, "--dataset", "shapes3d", "--out", tmp_path / "ckpt.pt") == 0
    model, _ = train.load_checkpoint(tmp_path / "ckpt.pt")
    with torch.no_grad():
        c, z0 = model.units(IMAGES), model.vqgan.encode(IMAGES)
        drawn = model.vqgan.decoder(model.vqgan.codebook(z0 * model.vqgan.latent_std)[0])
        eps = model.unet(Z, torch.tensor([3, 900]), c)
    pinned = {"units": [0.1289, 0.0, 0.1853, 0.1051], "z0": [-0.0209, 0.0510, 0.0829, 0.1428],
              "drawn": [-0.0209, -0.5565, 0.1454, 0.5895], "eps": [-0.4425, 0.6777, 0.4843, 0.5193]}
    for x, name in zip((c, z0, drawn, eps), pinned):
        x = x.flatten()
        assert [x[0], x[len(x) // 2 + 5], x[-1], x.std()] == pytest.approx(pinned[name], abs=5e-4)
    if averaged:
        only = "--quick --only modularity --device cpu".split()
        assert main(evaluate, tmp_path / "ckpt.pt", *only) == 0
        assert "No anchors" in capsys.readouterr().out

@pytest.mark.parametrize("name, weight, words", [
    (f"{UNET}middle_block.1.proj_out.bias", None, "has no .*middle_block.1.proj_out.bias"),
    (f"{UNET}label_emb.weight", torch.ones(2), "label_emb.weight has no place"),
    (f"{UNITS}mlps.2.layers.0.bias", torch.ones(3), "mlps.2.layers.0.bias is"),
    (f"{UNET}input_blocks.0.0.bias", torch.tensor(1.0), "expected a multiple of 32")])
def test_a_tensor_that_is_wrong_is_named_in_one_line(theirs, tmp_path, name, weight, words):
    torch.save(theirs | {name: weight}, tmp_path / "model.ckpt")  # a plain state_dict
    with pytest.raises(data.UserError, match=f"^[^\n]*{words}[^\n]*$"):
        released.convert(tmp_path / "model.ckpt", "shapes3d")

def test_code_in_a_file_does_not_run_and_of_a_damaged_one_a_line_says_how_to_re_save_it(tmp_path):
    path, victim = tmp_path / "model.ckpt", tmp_path / "victim"
    call = type("Call", (), {"__reduce__": lambda self: (open, (victim, "w"))})()
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": call}, path)  # as old Lightning's
    assert list(released.read(path)) == ["a"] and not victim.exists()
    path.write_bytes(b"PK")
    for path in (path, tmp_path / "none"):
        with pytest.raises(data.UserError, match="re-save"):
            released.read(path)
