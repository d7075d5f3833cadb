"""Does a line mix tensors of two devices? train.py and evaluate.py on a pretended GPU. Not seen:
official files, torchrun, bfloat16 (torch refuses it without a GPU), what CUDA lacks."""
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import evaluate
import train
from conftest import TINY

# 480 images; two steps of stage 1, two of stage 2, a fit after each.
TRAIN = TINY + (
    "--dataset shapes3d --source rendered --vary shape,scale,orientation "
    "--stage1.images 32 --images 64 --pool_images 32 --fit_images 40 --ddim_steps 2 "
    "--dyga.k_max 4 --dyga.k_init 2 --unet.multipliers 1 --extractor.n_units 3 "
    "--optimizer muon --select_at 0.5 --unmix_at 0.5").split()

class Pretended(torch.Tensor):
    """A tensor that says it is on cuda:0; its numbers are in the CPU tensor `held`."""
    device, is_meta = torch.device("cuda:0"), False  # what Python code is told
    __torch_dispatch__ = "must be there, but Pretence comes first"
    def __new__(cls, held):  # C++ is told "meta": its autograd refuses cuda without a GPU
        assert held.device.type == "cpu"
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device="meta")
        self.held = held
        return self

    # What torch does in C++ beside its operations would find no numbers on "meta".
    __getitem__ = lambda self, place: torch.Tensor.__getitem__(self, indices(place))
    __setitem__ = lambda self, place, x: torch.Tensor.__setitem__(self, indices(place), x)
    tolist = lambda self: self.held.tolist()
    __reduce_ex__ = lambda self, protocol: self.held.__reduce_ex__(protocol)  # saved as plain

def indices(place):
    """What stands in [...], with lists and arrays as pretended tensors."""
    if isinstance(place, tuple):
        return tuple(map(indices, place))
    if isinstance(place, (list, np.ndarray)):  # [] too has whole numbers
        place = torch.tensor(place, dtype=None if len(place) else torch.int64, device="cuda:0")
    return place

class Pretence(TorchDispatchMode):
    """Every operation of torch comes by here: computed on what is held, refused if it mixes."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        there, here = {}, []  # pretended tensors by what they hold; the CPU's
        def held(x):
            if isinstance(x, Pretended):
                there[id(x.held)] = x
                return x.held
            if isinstance(x, (torch.Tensor, torch.Generator)):
                here.append(x)
            return x
        def pretended(x):  # what was changed in place stays what it was
            new = isinstance(x, torch.Tensor) and id(x) not in there
            return Pretended(x) if new else there.get(id(x), x)

        args, kwargs = tree_map(held, (args, kwargs or {}))
        on_gpu = bool(there)
        if kwargs.get("device"):  # it makes a tensor, or brings one there
            on_gpu, kwargs["device"] = kwargs["device"].type != "cpu", "cpu"
            here = [x for x in here if isinstance(x, torch.Generator)]
        elif torch.Tag.pointwise in func.tags:  # it may take one number from the CPU
            here = [x for x in here if x.ndim]
        if on_gpu and here and func is not torch.ops.aten.copy_.default:
            raise AssertionError(f"{func}: two devices")
        out = func(*args, **kwargs)
        return tree_map(pretended, out) if on_gpu else out

@pytest.fixture
def gpu(monkeypatch):
    made = torch.tensor  # it would put numbers on a device unseen by Pretence
    monkeypatch.setattr(torch, "tensor", lambda x, device="cpu", **o: made(x, **o).to(device))
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    monkeypatch.setattr(train, "in_bfloat16", lambda device: False)
    train.data.weight_maps()  # always on the CPU, and kept
    with Pretence():
        x = torch.zeros(3, device="cuda:0")
        for mixed in (lambda: x + torch.ones(3), lambda: torch.ones(3)[x.long()], x.numpy):
            with pytest.raises((AssertionError, RuntimeError), match="two devices|numpy"):
                mixed()  # as on a real one
        yield

def test_too_large_a_step_is_one_line_and_no_line_of_a_run_resumption_or_evaluation_mixes_devices(
        gpu, main, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    monkeypatch.setattr(evaluate, "ACTIVE", 0.0)  # so that there are anchors to look at
    here = ["--device", "cuda:0", "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(train.Model, "forward", Mock(side_effect=torch.OutOfMemoryError))
        assert main(train, *TRAIN, *here) == 2
        assert "--batch 32: a step of stage 2 does not fit" in capsys.readouterr().err
    here.append("--resume")  # stage 1 is kept
    with monkeypatch.context() as patch:  # before stage 2's last step
        patch.setattr(train, "fit_anchors", lambda run, *_: setattr(run, "stopped_by", 15))
        assert main(train, *TRAIN, *here) == 130
    assert main(train, *TRAIN, *here) == 0
    only = ["--quick", "--only", "mig,control,figures", "--device", "cuda:0"]
    assert main(evaluate, tmp_path / "ckpt.pt", *only) == 0
    model, ckpt = train.load_checkpoint(tmp_path / "ckpt.pt", torch.device("cuda:0"))
    assert ckpt["finished"]
    z0, net = model.noise(2, torch.Generator()), lambda z_t, t, c_tilde: z_t
    train.diffusion_loss(net, z0, None, model.alpha_bar, "mse", "logit_normal")  # the other choices
