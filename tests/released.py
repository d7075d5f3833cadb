"""Turn a model file of the paper's own repository into a checkpoint that evaluate.py reads.

    python tests/released.py model.ckpt --dataset shapes3d --out out/released/ckpt.pt

The README of GitHub's youngjun-jun/dis-dis links such models for all four datasets: Lightning files
of the same networks under other names. The checkpoint has no anchors: nothing is aligned."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402

UNITS, STAGE1, UNET = "cond_stage_model.", "first_stage_model.", "model.diffusion_model."
OURS = ("dyga.", "vqgan.codebook.uses", "extractor.kept")  # not in their file, or of another kind
# Layers within a block: ours -> theirs. Of several ours is put together.
VQGAN_LAYERS = {
    "branch.0.0": "norm1", "branch.1": "conv1", "branch.2.0": "norm2", "branch.3": "conv2",
    "shortcut": "nin_shortcut", "to_qkv": "q k v", "to_out": "proj_out",
    "downsample.1": "downsample.conv", "upsample.1": "upsample.conv", "norm_out.0": "norm_out"}
INNER = "transformer_blocks.0."
UNET_LAYERS = {
    "norm_in": "in_layers.0", "conv_in": "in_layers.2", "time": "emb_layers.1",
    "norm_out": "out_layers.0", "conv_out": "out_layers.3", "shortcut": "skip_connection",
    "norm_self": INNER + "norm1", "norm_cross": INNER + "norm2", "norm_ff": INNER + "norm3",
    "self_attention": INNER + "attn1", "cross_attention": INNER + "attn2", "to_out": "to_out.0",
    "ff_in": INNER + "ff.net.0.proj", "ff_out": INNER + "ff.net.2", "to_kv": "to_k to_v"}
UNUSED = STAGE1 + "loss.", STAGE1 + "model_ema."  # in a network's part, but no weights of it

def read(path):
    """A Lightning file, or a plain state_dict -> {name: tensor}. UserError if it is neither."""
    # In place of every class and function that the file names: nothing of it can run.
    foreign = type("Foreign", (), {"__init__": lambda self, *args: None})
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(foreign, name) for name in names]):
            found = torch.load(path, map_location="cpu", weights_only=True)
        return {name: x for name, x in found.get("state_dict", found).items()
                if torch.is_tensor(x) and not name.startswith(UNUSED)}
    except Exception as error:  # foreign bytes can fail in any way
        raise data.UserError(f"{path}: cannot be read safely ({type(error).__name__}); re-save its "
                             "torch.load(FILE, weights_only=False)['state_dict']") from error

def settings(take):
    """train.py's settings of a file's networks: Tables 7 to 9, but for these sizes."""
    def widths(name, places):
        return [take(f"{name}.{i}.bias").numel() for i in places]
    *hidden, n_units = widths(f"{UNITS}image_encoder.fc", (0, 2, 4))
    *unit_hidden, unit_dim = widths(f"{UNITS}mlps.0.layers", (0, 2, 4))
    return vars(train.build_parser().parse_args([])) | {
        "extractor.channels": widths(f"{UNITS}image_encoder.encoder", (0, 3, 6, 9, 12)),
        "extractor.hidden": hidden, "extractor.n_units": n_units,
        "extractor.unit_hidden": unit_hidden, "extractor.unit_dim": unit_dim,
        "unet.base": take(f"{UNET}input_blocks.0.0.bias").numel(), "vqgan.group_channels": 1}

def places():
    """Where our blocks are in their file, with the levels of Tables 7 and 8: {ours: theirs}."""
    middle = ["mid.block_1", "mid.attn_1", "mid.block_2"]
    encoder, decoder = ["conv_in"], ["conv_in", *middle]
    for k in range(3):  # levels; theirs counts the decoder's from the finest
        encoder += [f"down.{k}.{x}" for x in ("block.0", "block.1", "downsample")]
        decoder += [f"up.{2 - k}.{x}" for x in ("block.0", "block.1", "block.2", "upsample")]
    encoder[-1:] = [*middle, "norm_out", "conv_out"]  # the last levels do not resample
    decoder[-1:] = ["norm_out", "conv_out"]
    encoder = ["", *(f"encoder.{x}" for x in encoder), "quant_conv"]
    decoder = ["post_quant_conv", *(f"decoder.{x}" for x in decoder)]
    return {
        "extractor.cnn": UNITS + "image_encoder.encoder", "vqgan.latent_std": "scale_factor",
        "extractor.to_scalars": UNITS + "image_encoder.fc", "unet.up": UNET + "output_blocks",
        "unet.middle": UNET + "middle_block", "unet.conv_in": UNET + "input_blocks.0.0",
        "unet.norm_out": UNET + "out.0", "unet.conv_out": UNET + "out.2",
        "unet.time_mlp": UNET + "time_embed",
        "vqgan.codebook.codes": STAGE1 + "quantize.embedding.weight",
        **{f"vqgan.encoder.{i}": STAGE1 + name for i, name in enumerate(encoder)},
        **{f"vqgan.decoder.{i}": STAGE1 + name for i, name in enumerate(decoder)},
        **{f"unet.down.{i}": f"{UNET}input_blocks.{i + 1}" for i in range(11)}}

def their_names(name, n_units):
    """The name of a tensor of ours -> those of the tensors in their file that it is made of."""
    if name.startswith("extractor.unit_mlp."):  # a small network per unit
        layer = name.removeprefix("extractor.unit_mlp.")
        return [f"{UNITS}mlps.{u}.layers.{layer}" for u in range(n_units)]
    found = places()
    place = max((ours for ours in found if f"{name}.".startswith(f"{ours}.")), key=len)
    names = [found[place] + name.removeprefix(place)]
    for ours, theirs in (VQGAN_LAYERS if name.startswith("vqgan.") else UNET_LAYERS).items():
        if f".{ours}." in names[0]:
            names = [x.replace(f".{ours}.", f".{one}.") for x in names for one in theirs.split()]
    return names

def convert(path, dataset):
    """A file of theirs -> a checkpoint of train.py. UserError names the tensor that is wrong."""
    weights, used = read(path), set()
    def take(name):
        if name not in weights:
            raise data.UserError(f"{path}: has no {name}; expected a model of dis-dis")
        used.add(name)
        return weights[name]

    cfg = settings(take)
    train.check_settings(cfg, world=1)
    state = train.Model(cfg).state_dict()
    for name in [name for name in state if not name.startswith(OURS)]:
        names = their_names(name, cfg["extractor.n_units"])
        for theirs, place in zip(names, torch.atleast_1d(state[name]).chunk(len(names))):
            x = take(theirs)
            if name.startswith("unet.") and "model_ema.decay" in weights:  # these draw the samples
                x = take("model_ema." + theirs.removeprefix("model.").replace(".", ""))
            if "unit_mlp" in name and x.ndim == 2:
                x = x.mT  # (out, in) -> (in, out)
            if x.squeeze().shape != place.squeeze().shape:  # sizes of 1: they have 1x1 convolutions
                raise data.UserError(f"{path}: {theirs} is {x.shape}; expected {place.shape}")
            place.copy_(x.reshape(place.shape))
    state["vqgan.latent_std"].reciprocal_()  # they multiply by it
    for name in weights:
        if name.startswith((UNITS, STAGE1, UNET)) and name not in used:
            raise data.UserError(f"{path}: {name} has no place in the networks of dis-dis")
    return {"format": train.FORMAT, "stage": 2, "model": state, "average": state, "seen": None,
            "minutes": None, "config": cfg | {"dataset": dataset, "source": "auto"}}

def main():
    p = data.Parser(description="A model file of the paper's code -> a checkpoint of train.py.")
    p.add_argument("model", help="a .ckpt of youngjun-jun/dis-dis")
    p.add_argument("--dataset", required=True, choices=list(data.DATASETS))
    p.add_argument("--out", required=True, help="the checkpoint to write")
    args = p.parse_args()
    with data.replacing(args.out) as temporary:
        torch.save(convert(args.model, args.dataset), temporary)

if __name__ == "__main__":
    data.run(main)
