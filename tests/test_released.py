"""evaluate.py --released: a file in the layout of the paper's released code, or of EncDiff's, gives what that code's
networks give.

The reference below is a plain reading of those networks, one function each, that asks for its weights by their names
there. A name asked for the first time gets random numbers, so running it also writes the file that it describes: names,
shapes and what is computed with them all come from one place, and none of it from this project's networks.
"""

import io
import math
import pickle
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate

UNITS, STAGE1, UNET = "cond_stage_model.", "first_stage_model.", "model.diffusion_model."


class Released:
    """Their networks. base: of the U-Net's widths (theirs: 64); n, dim: units; wide: divides the extractor's widths."""

    def __init__(self, base=32, n=3, dim=8, wide=16):
        self.base, self.n, self.dim, self.wide, self.weights = base, n, dim, wide, {}
        self.random = torch.Generator().manual_seed(0)

    def get(self, name, *shape, scale=1.0, shift=0.0):
        if name not in self.weights:
            self.weights[name] = shift + scale * torch.randn(shape, generator=self.random)
        assert self.weights[name].shape == shape
        return self.weights[name]

    def linear(self, name, x, d_out, bias=True):
        w = self.get(f"{name}.weight", d_out, x.shape[-1], scale=x.shape[-1] ** -0.5)
        return F.linear(x, w, self.get(f"{name}.bias", d_out, scale=0.1) if bias else None)

    def conv(self, name, x, c_out, k=3, stride=1, padding=None):
        w = self.get(f"{name}.weight", c_out, x.shape[1], k, k, scale=(x.shape[1] * k * k) ** -0.5)
        padding = k // 2 if padding is None else padding
        return F.conv2d(x, w, self.get(f"{name}.bias", c_out, scale=0.1), stride, padding)

    def affine(self, name, c):
        return self.get(f"{name}.weight", c, scale=0.1, shift=1.0), self.get(f"{name}.bias", c, scale=0.1)

    def norm(self, name, x, eps):
        """GroupNorm of 32 groups at every width: 1e-6 in stage 1 and before attention, 1e-5 in residual blocks."""
        return F.group_norm(x, 32, *self.affine(name, x.shape[1]), eps)

    def batch_norm(self, name, x):
        self.weights[f"{name}.num_batches_tracked"] = torch.tensor(7)
        mean = self.get(f"{name}.running_mean", x.shape[1], scale=0.1)
        var = self.get(f"{name}.running_var", x.shape[1], scale=0.05, shift=0.5).abs()
        return F.batch_norm(x, mean, var, *self.affine(name, x.shape[1]))

    # ---- Extractor: image -> (B, N, D) ----

    def units(self, x):
        for i, c, k in zip((0, 3, 6, 9, 12), (64, 128, 256, 256, 256), (7, 4, 4, 4, 4)):
            name = f"{UNITS}image_encoder.encoder"
            x = self.conv(f"{name}.{i}", x, c // self.wide, k, stride=1 if k == 7 else 2, padding=3 if k == 7 else 1)
            x = F.relu(self.batch_norm(f"{name}.{i + 1}", x))
        x = x.flatten(1)
        for i, width in ((0, 4096 // self.wide), (2, 256 // self.wide), (4, self.n)):
            x = self.linear(f"{UNITS}image_encoder.fc.{i}", x, width)
            x = F.relu(x) if i < 4 else x
        out = []
        for u in range(self.n):  # the released loop, one small network after another
            h = x[:, u:u + 1]
            for i, width in ((0, 256 // self.wide), (2, 512 // self.wide), (4, self.dim)):
                h = F.relu(self.linear(f"{UNITS}mlps.{u}.layers.{i}", h, width))
            out.append(h)
        return torch.stack(out, 1)

    # ---- Stage 1 ----

    def block(self, name, x, c):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x, 1e-6)), c)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h, 1e-6)), c)
        return h + (x if x.shape[1] == c else self.conv(f"{name}.nin_shortcut", x, c, 1))

    def middle(self, name, x):
        c = x.shape[1]
        x = self.block(f"{name}.block_1", x, c)
        h = self.norm(f"{name}.attn_1.norm", x, 1e-6)
        q, k, v = (self.conv(f"{name}.attn_1.{part}", h, c, 1).flatten(2) for part in "qkv")  # (B, C, H*W) each
        attention = (q.transpose(1, 2) @ k / math.sqrt(c)).softmax(2)  # (B, H*W, H*W)
        h = (v @ attention.transpose(1, 2)).view_as(x)
        return self.block(f"{name}.block_2", x + self.conv(f"{name}.attn_1.proj_out", h, c, 1), c)

    def encode(self, x):
        """Image -> latent as the U-Net sees it: not quantised, times scale_factor."""
        name = f"{STAGE1}encoder"
        x = self.conv(f"{name}.conv_in", x, 32)
        for level, c in enumerate((32, 64, 128)):
            for b in range(2):
                x = self.block(f"{name}.down.{level}.block.{b}", x, c)
            if level < 2:
                x = self.conv(f"{name}.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), c, stride=2, padding=0)
        x = F.silu(self.norm(f"{name}.norm_out", self.middle(f"{name}.mid", x), 1e-6))
        x = self.conv(f"{STAGE1}quant_conv", self.conv(f"{name}.conv_out", x, 3), 3, 1)
        self.weights["scale_factor"] = torch.tensor(0.37)
        return x * self.weights["scale_factor"]

    def decode(self, z):
        codes, name = self.get(f"{STAGE1}quantize.embedding.weight", 2048, 3), f"{STAGE1}decoder"
        flat = (z / self.weights["scale_factor"]).movedim(1, 3)  # (B, H, W, 3)
        z = codes[torch.cdist(flat.reshape(-1, 3), codes).argmin(1)].view_as(flat).movedim(3, 1)
        x = self.conv(f"{name}.conv_in", self.conv(f"{STAGE1}post_quant_conv", z, 3, 1), 128)
        x = self.middle(f"{name}.mid", x)
        for level, c in ((2, 128), (1, 64), (0, 32)):
            for b in range(3):
                x = self.block(f"{name}.up.{level}.block.{b}", x, c)
            if level:
                x = self.conv(f"{name}.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2), c)
        return self.conv(f"{name}.conv_out", F.silu(self.norm(f"{name}.norm_out", x, 1e-6)), 3)

    # ---- U-Net ----

    def res(self, name, x, emb, c, resize=lambda x: x):
        h = self.conv(f"{name}.in_layers.2", resize(F.silu(self.norm(f"{name}.in_layers.0", x, 1e-5))), c)
        scale, shift = self.linear(f"{name}.emb_layers.1", F.silu(emb), 2 * c)[:, :, None, None].chunk(2, 1)
        h = F.silu(self.norm(f"{name}.out_layers.0", h, 1e-5) * (1 + scale) + shift)
        h, x = self.conv(f"{name}.out_layers.3", h, c), resize(x)
        return h + (x if x.shape[1] == c else self.conv(f"{name}.skip_connection", x, c, 1))

    def attend(self, name, x, context):
        c, heads = x.shape[2], []
        q, k, v = (self.linear(f"{name}.to_{part}", s, c, bias=False) for part, s in zip("qkv", (x, context, context)))
        for q, k, v in zip(*(part.chunk(8, 2) for part in (q, k, v))):  # head by head
            heads.append((q @ k.transpose(1, 2) * (c // 8) ** -0.5).softmax(2) @ v)
        return self.linear(f"{name}.to_out.0", torch.cat(heads, 2), c)

    def transformer(self, name, x, context):
        c, inner = x.shape[1], f"{name}.transformer_blocks.0"
        h = self.conv(f"{name}.proj_in", self.norm(f"{name}.norm", x, 1e-6), c, 1).flatten(2).transpose(1, 2)
        s = F.layer_norm(h, (c,), *self.affine(f"{inner}.norm1", c))
        h = h + self.attend(f"{inner}.attn1", s, s)
        h = h + self.attend(f"{inner}.attn2", F.layer_norm(h, (c,), *self.affine(f"{inner}.norm2", c)), context)
        s = self.linear(f"{inner}.ff.net.0.proj", F.layer_norm(h, (c,), *self.affine(f"{inner}.norm3", c)), 8 * c)
        h = h + self.linear(f"{inner}.ff.net.2", s[..., :4 * c] * F.gelu(s[..., 4 * c:]), c)
        return x + self.conv(f"{name}.proj_out", h.transpose(1, 2).reshape(x.shape), c, 1)

    def unet(self, x, t, context):
        angles = t[:, None] * 10000 ** -(torch.arange(self.base // 2) / (self.base // 2))
        emb = self.linear(f"{UNET}time_embed.0", torch.cat([angles.cos(), angles.sin()], 1), 4 * self.base)
        emb = self.linear(f"{UNET}time_embed.2", F.silu(emb), 4 * self.base)
        h = self.conv(f"{UNET}input_blocks.0.0", x, self.base)
        skips, i = [h], 1
        for level, m in enumerate((1, 2, 4, 4)):
            for _ in range(2):
                h = self.res(f"{UNET}input_blocks.{i}.0", h, emb, m * self.base)
                h = self.transformer(f"{UNET}input_blocks.{i}.1", h, context) if level < 3 else h
                skips, i = skips + [h], i + 1
            if level < 3:
                h = self.res(f"{UNET}input_blocks.{i}.0", h, emb, m * self.base, lambda x: F.avg_pool2d(x, 2))
                skips, i = skips + [h], i + 1
        h = self.res(f"{UNET}middle_block.0", h, emb, 4 * self.base)
        h = self.transformer(f"{UNET}middle_block.1", h, context)
        h = self.res(f"{UNET}middle_block.2", h, emb, 4 * self.base)
        for i in range(12):
            level, m = 3 - i // 3, (4, 4, 2, 1)[i // 3]
            h = self.res(f"{UNET}output_blocks.{i}.0", torch.cat([h, skips.pop()], 1), emb, m * self.base)
            h = self.transformer(f"{UNET}output_blocks.{i}.1", h, context) if level < 3 else h
            if level and i % 3 == 2:
                name = f"{UNET}output_blocks.{i}.{1 + (level < 3)}"
                h = self.res(name, h, emb, m * self.base, lambda x: F.interpolate(x, scale_factor=2))
        return self.conv(f"{UNET}out.2", F.silu(self.norm(f"{UNET}out.0", h, 1e-5)), 3)

    def run(self, x, z, t):
        """Everything once -> units, latent, decoded image, noise; fills self.weights."""
        c = self.units(x)
        latent = self.encode(x)
        return c, latent, self.decode(latent), self.unet(z, t, c)


class EncDiff(Released):
    """EncDiff's networks: the same but for the extractor."""

    def residual(self, name, x):
        h = self.batch_norm(f"{name}.2", self.conv(f"{name}.1", F.relu(x), x.shape[1]))
        return x + self.conv(f"{name}.4", F.relu(h), x.shape[1], 1)

    def units(self, x):
        name = f"{UNITS}encoder"
        for i in (0, 3, 6, 8):
            x = self.batch_norm(f"{name}.{i + 1}", self.conv(f"{name}.{i}", x, 128 // self.wide, 4, 2, 1))
            x = x if i == 6 else F.relu(x)  # the third has none
        x = F.relu(self.batch_norm(f"{name}.12", self.residual(f"{name}.11.convs", x)))
        s = self.linear(f"{name}.16", self.residual(f"{name}.14.convs", x).flatten(1), self.n)
        out = []
        for u in range(self.n):
            h = s[:, u:u + 1]
            for i, width in ((0, 64 // self.wide), (2, 128 // self.wide)):
                h = F.elu(self.linear(f"{UNITS}net.{u}.{i}", h, width))
            out.append(self.linear(f"{UNITS}net.{u}.4", h, self.dim))
        return torch.stack(out, 1)


def schedule():
    betas = torch.linspace(0.0015 ** 0.5, 0.0155 ** 0.5, 1000, dtype=torch.float64) ** 2
    return {"betas": betas.float(), "alphas_cumprod": (1 - betas).cumprod(0).float(),
            "sqrt_recipm1_alphas_cumprod": torch.ones(1000), "posterior_mean_coef1": torch.ones(1000),
            "log_one_minus_alphas_cumprod": torch.ones(1000), "shift_coef": torch.ones(1000)}


IMAGES = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
Z, T = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 900])


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return small_file(Released(), tmp_path_factory.mktemp("released") / "epoch=1.ckpt")


@pytest.fixture(scope="module")
def encdiff(tmp_path_factory):
    return small_file(EncDiff(dim=16, wide=4), tmp_path_factory.mktemp("encdiff") / "last.ckpt")


def small_file(theirs, path):
    """A small file of theirs, and what their networks make of two images with it."""
    with torch.no_grad():
        expected = theirs.run(IMAGES / 127.5 - 1, Z, T)
    weights = theirs.weights | schedule()
    # The average is what samples are drawn with: here the training weights are far from it.
    for name in [name for name in weights if name.startswith(UNET)]:
        weights["model_ema." + name.removeprefix("model.").replace(".", "")] = weights[name]
        weights[name] = torch.full_like(weights[name], 9.0)
    weights |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    torch.save({"epoch": 1, "global_step": 9, "state_dict": weights}, path)
    return path, weights, expected


@pytest.mark.parametrize("whose", ["released", "encdiff"])
def test_every_network_computes_what_theirs_does(whose, request):
    path, _, (c, latent, drawn, eps) = request.getfixturevalue(whose)
    model, _ = evaluate.load_released(path, "shapes3d")
    with torch.no_grad():
        assert torch.allclose(model.units(IMAGES), c, atol=1e-5)
        assert torch.allclose(model.vqgan.encode(IMAGES), latent, atol=1e-4)
        assert torch.allclose(model.unet(Z, T, c), eps, atol=1e-4)
        exact = model.vqgan.decoder(model.vqgan.codebook(latent * model.vqgan.latent_std)[0])
        assert torch.allclose(exact, drawn, atol=1e-4)
    assert torch.equal(model.alpha_bar, schedule()["alphas_cumprod"])


def test_without_anchors_alignment_changes_nothing(released):
    model, ckpt = evaluate.load_released(released[0], "shapes3d")
    assert torch.equal(model.dyga.align(released[2][0]), released[2][0])
    assert ckpt["dataset"]["name"] == "shapes3d" and ckpt["config"]["extractor.n_units"] == 3


def test_at_the_papers_size_their_layout_has_the_papers_numbers_of_parameters(monkeypatch):
    theirs = Released(base=64, n=20, dim=32, wide=1)
    with torch.no_grad():
        theirs.run(IMAGES[:1] / 127.5 - 1, Z[:1], T[:1])

    def count(prefix):
        return sum(w.numel() for name, w in theirs.weights.items()
                   if name.startswith(prefix) and not name.endswith(("running_mean", "running_var", "tracked")))
    assert round(count(UNET) / 1e6, 3) == 37.550 and round(count(UNITS) / 1e6, 3) == 23.570
    monkeypatch.setattr(evaluate, "read_released", lambda path: theirs.weights | schedule())  # no average: as they are
    _, ckpt = evaluate.load_released("a.ckpt", "cars3d")
    assert ckpt["config"]["extractor.hidden"] == [4096, 256] and ckpt["config"]["unet.base"] == 64


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop(f"{UNET}middle_block.1.proj_out.bias"), "has no model.diffusion_model.middle_block.1.proj_out"),
    (lambda w: w.update({f"{UNET}label_emb.weight": torch.ones(2)}), "label_emb.weight has no place"),
    (lambda w: w.update({f"{STAGE1}encoder.mid.attn_1.k.weight": torch.ones(2, 128, 1, 1)}), "attn_1.q.weight makes"),
    (lambda w: [w.pop(name) for name in list(w) if "image_encoder" in name], "has no cond_stage_model.image_encoder"),
    (lambda w: w.update({f"{UNITS}net.0.0.bias": torch.ones(2)}), "has no cond_stage_model.net.0.2"),  # half an EncDiff
    (lambda w: w.update({f"{UNITS}mlps.2.layers.0.bias": torch.ones(3)}), "mlps.0.layers.0.bias makes"),
    (lambda w: w.update({f"{UNET}input_blocks.0.0.bias": torch.ones(33)}), "sizes of its tensors"),
    (lambda w: w.update({f"{UNET}input_blocks.0.0.bias": torch.tensor(1.0)}), "sizes of its tensors"),
    (lambda w: w.pop("scale_factor"), "has no scale_factor"), (lambda w: w.clear(), "has no cond_stage_model")])
def test_an_unexpected_layout_is_one_line_that_names_the_tensor(released, tmp_path, change, words):
    weights = dict(released[1])
    change(weights)
    torch.save(weights, tmp_path / "plain.pt")  # a plain state_dict does, too
    with pytest.raises(data.UserError, match=words) as error:
        evaluate.load_released(tmp_path / "plain.pt", "shapes3d")
    assert "\n" not in str(error.value)


def pickled_with(path, weights, text):
    """Save weights, then put a pickle of `text` (Lightning's callbacks, or worse) beside them into the same file."""
    plain = io.BytesIO()
    torch.save({"state_dict": weights, "callbacks": "PLACE"}, plain, pickle_protocol=2)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
        for item in source.infolist():
            content = source.read(item)
            if item.filename.endswith("data.pkl"):
                assert content.count(b"X\x05\x00\x00\x00PLACE") == 1
                content = content.replace(b"X\x05\x00\x00\x00PLACE", text)
            target.writestr(item, content)


def test_classes_of_old_lightning_in_the_file_are_passed_over(released, tmp_path):
    # {ModelCheckpoint: {}}, as Lightning 1.4 wrote it
    pickled_with(tmp_path / "old.ckpt", released[1],
                 b"}cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n}s")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "old.ckpt", weights_only=True)
    assert evaluate.read_released(tmp_path / "old.ckpt").keys() == released[1].keys()


@pytest.mark.parametrize("call", [b"cbuiltins\neval\n", b"cposix\nsystem\n", b"cshutil\nrmtree\n"])
def test_code_in_a_file_does_not_run(tmp_path, call):
    victim = tmp_path / "victim"
    victim.mkdir()
    argument = {b"cshutil\nrmtree\n": str(victim), b"cposix\nsystem\n": f"rmdir {victim}"}.get(
        call, f"__import__('os').rmdir({str(victim)!r})").encode()
    pickled_with(tmp_path / "hostile.ckpt", {"a": torch.ones(1)},
                 call + b"X" + len(argument).to_bytes(4, "little") + argument + b"\x85R")
    with pytest.raises(data.UserError) as error:
        evaluate.load_released(tmp_path / "hostile.ckpt", "shapes3d")
    assert victim.is_dir() and "\n" not in str(error.value)


def test_damaged_and_missing_files_are_one_line_that_says_how_to_re_save(released, tmp_path):
    with pytest.raises(data.UserError, match="no such file"):
        evaluate.read_released(tmp_path / "none.ckpt")
    (tmp_path / "half.ckpt").write_bytes(released[0].read_bytes()[:100_000])
    with pytest.raises(data.UserError, match="torch.save"):
        evaluate.read_released(tmp_path / "half.ckpt")


def test_the_command_scores_a_released_file(released, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(released[0]), "--released", "shapes3d", "--quick", "--only",
                                      "modularity", "--device", "cpu", "--out", str(tmp_path)])
    evaluate.main()
    said = capsys.readouterr().out
    assert "released weights; shapes3d" in said and "there are no anchors in it" in said
    assert "Modularity" in said and (tmp_path / "index.html").is_file()
