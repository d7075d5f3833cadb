"""Turn a model file of the paper's own repository into a checkpoint that evaluate.py reads.

    python tests/released.py model.ckpt --dataset shapes3d --out out/released/ckpt.pt

GitHub's youngjun-jun/dis-dis links first stage, model, representations, Gaussians and labels for
all four datasets in its README. This reads its models: Lightning files of latent diffusion's
networks, which are ours under other names. The checkpoint has no anchors: nothing is aligned.
Sizes come from the tensors' shapes; what no shape tells, such as 8 heads, is Table 8's.
"""

import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from data import UserError  # noqa: E402

UNITS, STAGE1, UNET = "cond_stage_model.", "first_stage_model.", "model.diffusion_model."
# Layers within a block: ours -> theirs. A tuple: ours is theirs put together.
VQGAN_LAYERS = {
    "branch.0.0": "norm1", "branch.1": "conv1", "branch.2.0": "norm2", "branch.3": "conv2",
    "shortcut": "nin_shortcut", "to_qkv": ("q", "k", "v"), "to_out": "proj_out",
    "upsample.1": "upsample.conv", "norm_out.0": "norm_out"}
INNER = "transformer_blocks.0."
UNET_LAYERS = {
    "norm_in": "in_layers.0", "conv_in": "in_layers.2", "time": "emb_layers.1",
    "norm_out": "out_layers.0", "conv_out": "out_layers.3", "shortcut": "skip_connection",
    "norm_self": INNER + "norm1", "norm_cross": INNER + "norm2", "norm_ff": INNER + "norm3",
    "self_attention": INNER + "attn1", "cross_attention": INNER + "attn2", "to_out": "to_out.0",
    "ff_in": INNER + "ff.net.0.proj", "ff_out": INNER + "ff.net.2", "to_kv": ("to_k", "to_v")}
# What a file may hold beyond weights: the noise schedule, counters, stage 1's losses.
UNUSED = re.compile(r"betas|(alphas|sqrt|log_one|posterior)_\w+|(shift|ddim)_coef|logvar"
                    r"|lvlb_weights|model_ema\..+|first_stage_model\.(loss|model_ema)\..+")


class Foreign:
    """Takes the place of every class and function that a file names: nothing of it can run."""

    def __init__(self, *args):
        pass


def read(path):
    """A Lightning file, or a plain state_dict -> {name: tensor}. UserError if it is neither."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Foreign, name) for name in names]):
            found = torch.load(path, map_location="cpu", weights_only=True)
        found = found.get("state_dict", found)
        return {name: x for name, x in found.items() if torch.is_tensor(x)}
    except Exception as error:  # foreign bytes can fail in any way
        raise UserError(f"{path}: cannot be read safely ({type(error).__name__}); expected a model "
                        "of youngjun-jun/dis-dis; if you trust it, re-save its weights alone, with "
                        "torch.load(FILE, weights_only=False)['state_dict']") from error


def settings(take):
    """train.py's settings of the networks in a file. take(name): its tensor of that name."""
    def widths(name, places):
        return [len(take(f"{name}.{i}.bias")) for i in places]

    hidden = widths(f"{UNITS}image_encoder.fc", (0, 2, 4))
    unit = widths(f"{UNITS}mlps.0.layers", (0, 2, 4))
    return train.default_settings() | {
        "preset": "paper", "seed": 0, "minutes": None, "anchors": "none",
        "extractor.channels": widths(f"{UNITS}image_encoder.encoder", (0, 3, 6, 9, 12)),
        "extractor.hidden": hidden[:2], "extractor.n_units": hidden[2],
        "extractor.unit_hidden": unit[:2], "extractor.unit_dim": unit[2],
        "vqgan.channels": len(take(STAGE1 + "encoder.conv_in.bias")),
        "vqgan.z_channels": len(take(STAGE1 + "quant_conv.bias")),
        "vqgan.codebook_size": len(take(STAGE1 + "quantize.embedding.weight")),
        "vqgan.group_channels": 1,  # LDM's 32 groups at every width
        "unet.base": widths(UNET + "input_blocks.0", (0,))[0]}


def blocks(cfg):
    """Where our blocks are in their file: {the first part of a name, ours: theirs}."""
    levels, n = len(cfg["vqgan.multipliers"]), cfg["vqgan.res_blocks"]
    middle = ["mid.block_1", "mid.attn_1", "mid.block_2"]
    encoder, decoder = ["", "conv_in"], ["post_quant_conv", "conv_in", *middle]
    for k in range(levels):
        up = levels - 1 - k  # theirs counts the decoder's levels from the finest
        encoder += [f"down.{k}.block.{b}" for b in range(n)]
        decoder += [f"up.{up}.block.{b}" for b in range(n + 1)]
        if k < levels - 1:
            encoder.append(f"down.{k}.downsample")
            decoder.append(f"up.{up}.upsample")
    encoder += [*middle, "norm_out", "conv_out", "quant_conv"]
    decoder += ["norm_out", "conv_out"]
    found = {
        "extractor.cnn": f"{UNITS}image_encoder.encoder", "vqgan.latent_std": "scale_factor",
        "extractor.to_scalars": f"{UNITS}image_encoder.fc", "unet.time_mlp": UNET + "time_embed",
        "vqgan.codebook.codes": STAGE1 + "quantize.embedding.weight",
        "unet.conv_in": UNET + "input_blocks.0.0", "unet.middle": UNET + "middle_block",
        "unet.up": UNET + "output_blocks", "unet.norm_out": UNET + "out.0",
        "unet.conv_out": UNET + "out.2"}
    for part, names in (("encoder", encoder), ("decoder", decoder)):
        for i, name in enumerate(names):
            inside = "" if "quant" in name else part + "."  # two convolutions are outside
            found[f"vqgan.{part}.{i}"] = STAGE1 + inside + name
    stages = len(cfg["unet.multipliers"]) * (cfg["unet.res_blocks"] + 1) - 1
    return found | {f"unet.down.{i}": f"{UNET}input_blocks.{i + 1}" for i in range(stages)}


def their_names(name, places, n_units):
    """The name of a tensor of ours -> those of the tensors in their file that it is made of."""
    if name.startswith("extractor.unit_mlp."):  # a small network per unit; odd layers are ReLUs
        _, _, layer, kind = name.split(".")
        return [f"{UNITS}mlps.{u}.layers.{2 * int(layer)}.{kind}" for u in range(n_units)]
    place = max((ours for ours in places if f"{name}.".startswith(f"{ours}.")), key=len)
    names = [places[place] + name.removeprefix(place)]
    for ours, theirs in (VQGAN_LAYERS if name.startswith("vqgan.") else UNET_LAYERS).items():
        if f".{ours}." in names[0]:
            several = theirs if isinstance(theirs, tuple) else (theirs,)
            names = [x.replace(f".{ours}.", f".{one}.") for x in names for one in several]
    return names


def convert(path, dataset):
    """A file of theirs -> a checkpoint of train.py. UserError names the tensor that is wrong."""
    weights, used = read(path), set()

    def take(name):
        if name not in weights or weights[name].ndim == 0 and name != "scale_factor":
            raise UserError(f"{path}: has no {name}; expected a model of youngjun-jun/dis-dis")
        used.add(name)
        return weights[name]

    cfg = settings(take)
    if cfg["unet.base"] % 32:
        raise UserError(f"{path}: its U-Net is {cfg['unet.base']} wide; expected a multiple of 32")
    state, places = train.Model(cfg).state_dict(), blocks(cfg)
    for name, ours in state.items():
        if name.startswith("dyga.") or name == "vqgan.codebook.uses":
            continue
        names = their_names(name, places, cfg["extractor.n_units"])
        parts = [take(one) for one in names]
        if name.startswith("unet.") and "model_ema.decay" in weights:
            # Samples are drawn with averaged weights, which only the U-Net has; no dots in names.
            parts = [take("model_ema." + x.removeprefix("model.").replace(".", "")) for x in names]
        if "unit_mlp" in name:  # N of (out, in) -> (N, in, out); N of (out,) -> (N, 1, out)
            parts = [x.mT[None] if x.ndim == 2 else x[None, None] for x in parts]
        if name.startswith("unet.") and ".proj_" in name:  # 1x1 convolutions there
            parts = [x.flatten(1) if x.ndim == 4 else x for x in parts]
        alike = len({x.shape for x in parts}) == 1
        whole = torch.cat(parts) if alike and len(parts) > 1 else parts[0]
        if not alike or whole.shape != ours.shape:
            raise UserError(f"{path}: {names[0]} makes shape {tuple(whole.shape)}; expected "
                            f"{tuple(ours.shape)}")
        ours.copy_(1 / whole if name == "vqgan.latent_std" else whole)  # they multiply by it
    for name in weights:
        if name not in used and not UNUSED.fullmatch(name):
            raise UserError(f"{path}: {name} has no place in these networks; expected a model of "
                            "youngjun-jun/dis-dis")
    return {"format": train.FORMAT, "stage": 2, "config": cfg, "model": state, "average": {},
            "dataset": {"name": dataset, "source": "auto"}, "images_seen": None, "minutes": None}


def main():
    p = data.Parser(description="A model file of the paper's code -> a checkpoint of train.py.")
    p.add_argument("model", help="a .ckpt of youngjun-jun/dis-dis")
    p.add_argument("--dataset", required=True, choices=list(data.DATASETS))
    p.add_argument("--out", required=True, help="the checkpoint to write")
    args = p.parse_args()
    ckpt = convert(args.model, args.dataset)
    with data.replacing(args.out) as temporary:
        torch.save(ckpt, temporary)
    print(f"wrote {args.out}; next: python evaluate.py {args.out}")


if __name__ == "__main__":
    data.run(main)
