"""Writes files as the official programs of EDM, EDM2, ECT and the consistency models do, with stand-in classes of our own.

The pickles carry the same names, opcodes and object trees: persistent objects are a call of
``torch_utils.persistence._reconstruct_persistent_obj`` with a dict, ``enc`` and ``dec`` are ``torch.nn.ModuleDict``, tensors
are parameters and buffers of ``torch.nn.Module``. The official modules exist in ``sys.modules`` only while a file is written.

A state dict of any network turns into such a module::

    write_edm_pickle(path, state, arguments={"sigma_data": 0.5}, inner={"model": ("SongUNet", {"model_channels": 128})})
"""

import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PERSISTENCE_VERSION = 6
SOURCE = "raise RuntimeError('the source text of the file was run')\n"
BUFFERS = frozenset({"resample_filter", "freqs", "phases", "u"})
CONTAINERS = {"enc": nn.ModuleDict, "dec": nn.ModuleDict}
DATASET = {"class_name": "training.dataset.ImageFolderDataset", "path": "datasets/cifar10-32x32.zip", "use_labels": False}

# What a part of a module is: its class name and the arguments it was constructed with.
Parts = Mapping[str, tuple[str, Mapping[str, Any]]]


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a reader called what the file names")


class EasyDict(dict):
    """Stand-in for the official dict with attribute access."""


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
EasyDict.__module__ = "dnnlib.util"


@contextmanager
def official_names() -> Iterator[None]:
    """While it is open, ``torch_utils.persistence`` and ``dnnlib.util`` can be imported, as pickle's writer demands."""
    persistence, util = ModuleType("torch_utils.persistence"), ModuleType("dnnlib.util")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util.EasyDict = EasyDict
    modules = {module.__name__: module for module in (ModuleType("torch_utils"), persistence, ModuleType("dnnlib"), util)}
    sys.modules |= modules
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


class Persistent:
    """Is pickled as an object of a class with embedded source text."""

    official_name = "Layer"
    source = SOURCE

    def __reduce__(self):
        meta = {"type": "class", "version": PERSISTENCE_VERSION, "module_src": self.source}
        return _reconstruct_persistent_obj, (meta | {"class_name": self.official_name, "state": self.__dict__},), None


class PersistentModule(Persistent, nn.Module): ...


class ConsistencyLoss(Persistent):
    """Keeps a bound method of itself, as ECT's loss does; the pickle then names ``getattr`` and contains the object twice."""

    def __init__(self, **arguments: Any) -> None:
        vars(self).update(arguments, t_to_r=self.mapping, _init_args=(), _init_kwargs=arguments)

    def mapping(self, t):
        raise AssertionError("a reader called a method of the file")


def persistent_object(class_name: str, arguments: Mapping[str, Any], of: type = Persistent, **attributes: Any) -> Any:
    """An object of a persistent class that was constructed with keyword arguments and has more attributes."""
    made = of() if of is not ConsistencyLoss else of(**arguments)
    kind = type(class_name, (type(made),), {"official_name": class_name})
    made.__class__ = kind
    vars(made).update(attributes)
    if of is not ConsistencyLoss:
        vars(made).update(_init_args=(), _init_kwargs=dict(arguments))
    return made


def persistent_module(
    state: Mapping[str, Tensor],
    class_name: str = "EDMPrecond",
    arguments: Mapping[str, Any] | None = None,
    inner: Parts | None = None,
    *,
    buffers: frozenset[str] = BUFFERS,
) -> nn.Module:
    """A tree of modules whose state dict is ``state``.

    ``inner`` gives class name and arguments of parts by dotted path ("model": ("SongUNet", {...})); other parts are "Layer".
    ``arguments`` and those of the parts also become attributes, as constructors do. Parts named enc and dec are
    ``torch.nn.ModuleDict``. Leaves named in ``buffers`` and all that is not floating become buffers.
    """
    root = _part("", {"": (class_name, arguments or {})})
    for name, value in state.items():
        *path, leaf = name.split(".")
        owner = root
        for depth, word in enumerate(path, 1):
            if word not in owner._modules:
                owner.add_module(word, _part(".".join(path[:depth]), inner or {}))
            owner = owner._modules[word]
        if leaf in buffers or not value.is_floating_point():
            owner.register_buffer(leaf, value)
        else:
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    return root


def _part(path: str, inner: Parts) -> nn.Module:
    if path.split(".")[-1] in CONTAINERS:
        return CONTAINERS[path.split(".")[-1]]()
    class_name, arguments = inner.get(path, ("Layer", {"init_weight": np.sqrt(1 / 3)}))
    part = persistent_object(class_name, arguments, of=PersistentModule)
    vars(part).update({name: value for name, value in arguments.items() if name not in vars(part)})
    return part


def write_pickle(path: Path, content: Any, protocol: int = 4) -> Path:
    """``pickle.dump`` with the official modules importable."""
    with official_names():
        path.write_bytes(pickle.dumps(content, protocol))
    return path


def write_torch(path: Path, content: Any, *, legacy: bool = False, protocol: int = 2) -> Path:
    """``torch.save`` with the official modules importable: a zip, or the format before torch 1.6."""
    with official_names():
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return path


def write_edm_pickle(
    path: Path,
    state: Mapping[str, Tensor],
    class_name: str = "EDMPrecond",
    arguments: Mapping[str, Any] | None = None,
    inner: Parts | None = None,
    *,
    ect: bool = False,
    protocol: int = 4,
) -> Path:
    """A ``network-snapshot-*.pkl`` of EDM, or of ECT: {ema, loss_fn, augment_pipe, dataset_kwargs}.

    ``state`` has official names with the leading "model."; see ``persistent_module`` for the other arguments.
    """
    if ect:
        loss = persistent_object("ECMLoss", {"P_mean": -1.1, "P_std": 2.0, "q": 2.0, "c": 0.0}, of=ConsistencyLoss)
    else:
        loss = persistent_object("EDMLoss", {}, P_mean=-1.2, P_std=1.2, sigma_data=0.5)
    augment = persistent_object("AugmentPipe", {"p": 0.12}, p=0.12, scale_std=np.float64(0.2), taps=np.ones(4, np.float32))
    ema = persistent_module(state, class_name, arguments, inner).eval()
    return write_pickle(path, {"ema": ema, "loss_fn": loss, "augment_pipe": augment, "dataset_kwargs": DATASET}, protocol)


def write_edm2_pickle(
    path: Path,
    state: Mapping[str, Tensor],
    arguments: Mapping[str, Any] | None = None,
    inner: Parts | None = None,
    *,
    class_name: str = "Precond",
    dtype: torch.dtype = torch.float16,
    protocol: int = 4,
) -> Path:
    """A snapshot of EDM2: EasyDict{encoder, dataset_kwargs, loss_fn, ema}, floating tensors in ``dtype``.

    ``state`` has official names ("unet.enc...."); see ``persistent_module`` for the other arguments.
    """
    halved = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    scale = np.float32(0.5) / np.float32([4.17, 4.62, 3.71, 3.28])
    content = EasyDict(
        encoder=persistent_object("StabilityVAEEncoder", {}, vae_name="stabilityai/sd-vae-ft-mse", scale=scale, batch_size=8),
        dataset_kwargs=EasyDict(DATASET),
        loss_fn=persistent_object("EDM2Loss", {"P_mean": -0.4, "P_std": 1.0}, P_mean=-0.4, P_std=1.0, sigma_data=0.5),
        ema=persistent_module(halved, class_name, arguments, inner).eval(),
    )
    return write_pickle(path, content, protocol)


def write_training_state(
    path: Path,
    state: Mapping[str, Tensor],
    class_name: str = "EDMPrecond",
    arguments: Mapping[str, Any] | None = None,
    inner: Parts | None = None,
    *,
    legacy: bool = False,
) -> Path:
    """A ``training-state-*.pt`` of EDM or ECT: {net: whole module, optimizer_state} through ``torch.save``."""
    net = persistent_module(state, class_name, arguments, inner)
    return write_torch(path, {"net": net, "optimizer_state": optimizer_state(net)}, legacy=legacy)


def write_edm2_training_state(path: Path, state: Mapping[str, Tensor], stds: tuple[float, ...] = (0.05, 0.1)) -> Path:
    """A ``training-state-*.pt`` of EDM2: state dicts of everything, the averages under "ema"."""
    content = {
        "state": EasyDict(cur_nimg=1024, total_elapsed_time=3.5),
        "net": named(state),
        "loss_fn": {"P_mean": -0.4, "P_std": 1.0},
        "optimizer": optimizer_state(persistent_module(state)),
        "ema": {"stds": list(stds), "emas": [named(state) for _ in stds]},
    }
    return write_torch(path, content)


def write_state_dict(path: Path, state: Mapping[str, Tensor], *, legacy: bool = False) -> Path:
    """A bare state dict, as OpenAI's and CTM's ``.pt`` files are: an OrderedDict with torch's ``_metadata``."""
    return write_torch(path, named(state), legacy=legacy)


def named(state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """What ``Module.state_dict()`` returns."""
    made = OrderedDict(state)
    made._metadata = OrderedDict({"": {"version": 1}})
    return made


def optimizer_state(module: nn.Module) -> dict[str, Any]:
    """The state dict of Adam after one step; the module's values stay as they are."""
    parameters = list(module.parameters())
    state = {
        number: {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
        for number, value in enumerate(parameters)
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "foreach": None}
    return {"state": state, "param_groups": [group | {"params": list(range(len(parameters)))}]}


def write_as(form: str, path: Path, content: Any) -> Path:
    """Any content as "pickle", "zip" or "legacy"."""
    return write_pickle(path, content) if form == "pickle" else write_torch(path, content, legacy=form == "legacy")


# A small example, and a writer of it in every format by name.
GENERATOR = torch.Generator().manual_seed(0)
STATE = {
    "model.map_noise.freqs": torch.arange(4.0),
    "model.map_layer0.weight": torch.randn(4, 3, generator=GENERATOR),
    "model.enc.8x8_conv.weight": torch.randn(2, 3, 3, 3, generator=GENERATOR),
    "model.enc.8x8_conv.bias": torch.randn(2, generator=GENERATOR),
    "model.dec.8x8_up.resample_filter": torch.ones(1, 1, 2, 2) / 4,
    "model.dec.8x8_up.count": torch.tensor(3),
}
ARGUMENTS = {"img_resolution": 8, "sigma_data": 0.5, "use_fp16": True, "model_type": "SongUNet", "channel_mult": [1, 2]}
INNER = {"model": ("SongUNet", {"model_channels": 4, "init": {"init_mode": "xavier_uniform", "init_weight": np.sqrt(1 / 3)}})}
WRITERS = {
    "edm 2": lambda path: write_edm_pickle(path, STATE, "EDMPrecond", ARGUMENTS, INNER, protocol=2),
    "edm 4": lambda path: write_edm_pickle(path, STATE, "EDMPrecond", ARGUMENTS, INNER),
    "edm 5": lambda path: write_edm_pickle(path, STATE, "EDMPrecond", ARGUMENTS, INNER, protocol=5),
    "ect": lambda path: write_edm_pickle(path, STATE, "ECMPrecond", ARGUMENTS, INNER, ect=True),
    "edm2": lambda path: write_edm2_pickle(path, STATE, ARGUMENTS, INNER),
    "state": lambda path: write_training_state(path, STATE, "EDMPrecond", ARGUMENTS, INNER),
    "old state": lambda path: write_training_state(path, STATE, "EDMPrecond", ARGUMENTS, INNER, legacy=True),
    "edm2 state": lambda path: write_edm2_training_state(path, STATE),
    "weights": lambda path: write_state_dict(path, STATE),
    "old weights": lambda path: write_state_dict(path, STATE, legacy=True),
}
