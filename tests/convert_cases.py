"""Checkpoints in every published format, made from golden weights, with what their bundles must compute."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoint_files as files
import torch
from golden_cases import Case, load_case
from golden_models import edm2_model_of
from safetensors.torch import save_file
from torch import Tensor

from fastcm.model import Model

OPENAI_HEADS = {
    "E_unet_uncond": ("--channels-per-head", "16"),
    "E_unet_cond": ("--heads", "2", "--heads-up", "1"),
    "F_sony_net": ("--channels-per-head", "16"),
}
EDM_CASES = [
    "A_ddpmpp_uncond",
    "A_ddpmpp_cond_aug",
    "A_ncsnpp_uncond",
    "A_adm32",
    "A_adm64",
    "A_VPPrecond",
    "A_VEPrecond",
    "A_iDDPMPrecond",
    "C_ecm_net",
]


@dataclass(frozen=True)
class Source:
    """A file of golden weights: how it is written, the options it needs, and a check of the bundle's model."""

    case: str
    write: Callable[[Path], Path]
    check: Callable[[Case, Model], None]
    options: tuple[str, ...] = ()
    says: tuple[str, ...] = field(default=())


def official_state(name: str) -> dict[str, Tensor]:
    """The state dict of a case under the names that its file has."""
    weights = load_case(name).weights
    around = "model." if name[0] in "AC" or name == "F_kim_net" else ""
    return {key if key == "u" else around + key: value for key, value in weights.items()}


def edm_arguments(name: str) -> tuple[str, dict[str, Any], dict[str, tuple[str, dict[str, Any]]]]:
    """(class, its arguments, classes within) of an EDM network."""
    config = load_case(name).config
    own = {key: value for key, value in config.items() if key not in ("precond", "model_kwargs")}
    arguments = {**own, **config["model_kwargs"]}
    arguments |= {key: float(value) for key, value in arguments.items() if value == "inf"}
    return config["precond"], arguments, {"model": (config["model_type"], config["model_kwargs"])}


def edm2_arguments(name: str) -> dict[str, Any]:
    """The arguments that an EDM2 network was constructed with."""
    config = load_case(name).config
    return {**config["precond"], **config["unet"], **config["block"]}


def edm_pickle(name: str, **changes: Any) -> Callable[[Path], Path]:
    """A writer of a snapshot of EDM or ECT; ``changes`` are of ``write_edm_pickle``."""

    def write(path: Path) -> Path:
        class_name, arguments, inner = edm_arguments(name)
        kwargs = {"class_name": class_name, "ect": class_name == "ECMPrecond"} | changes
        kwargs["arguments"] = arguments | changes.get("arguments", {})
        return files.write_edm_pickle(path, official_state(name), inner=inner, **kwargs)

    return write


def training_state(name: str, legacy: bool) -> Callable[[Path], Path]:
    """A writer of a training state of EDM or ECT."""
    class_name, arguments, inner = edm_arguments(name)
    return lambda path: files.write_training_state(path, official_state(name), class_name, arguments, inner, legacy=legacy)


def edm2_pickle(name: str, without: str = "-", **kwargs: Any) -> Callable[[Path], Path]:
    """A writer of a snapshot of EDM2, without the entries that begin with ``without``."""
    state = {key: value for key, value in official_state(name).items() if not key.startswith(without)}
    return lambda path: files.write_edm2_pickle(path, state, edm2_arguments(name), **kwargs)


def edm2_training_state(name: str) -> Callable[[Path], Path]:
    """A writer of EDM2's training state with two averages."""
    return lambda path: files.write_edm2_training_state(path, official_state(name))


def state_dict(name: str, *, legacy: bool = False, without: str = "") -> Callable[[Path], Path]:
    """A writer of a bare state dict; ``without`` is a prefix to take from its names."""
    state = {key.removeprefix(without): value for key, value in official_state(name).items()}
    return lambda path: files.write_state_dict(path, state, legacy=legacy)


def tensors_file(name: str) -> Callable[[Path], Path]:
    """A writer of safetensors."""

    def write(path: Path) -> Path:
        save_file(official_state(name), path)
        return path

    return write


def denoises(output: str) -> Callable[[Case, Model], None]:
    """The bundle's D(x; sigma) is the official one."""

    def check(case: Case, model: Model) -> None:
        inputs = case.tensors
        sigma = inputs["in/sigma"] if "in/sigma" in inputs else inputs["in/t"]
        labels = inputs["in/class_labels"] if "in/class_labels" in inputs else inputs.get("in/y")
        extra = {"augment": inputs["in/augment_labels"]} if "in/augment_labels" in inputs else {}
        case.close(model(inputs["in/x"], sigma, labels, **extra), output)

    return check


def jumps(case: Case, model: Model) -> None:
    """The bundle's jumps are the official ones, and D(x; t) is g(x, t, t), which the last row is."""
    x, t, s = (case.tensors[f"in/{key}"] for key in "xts")
    labels = case.tensors.get("in/y")
    case.close(model.jump(x, t, s, labels), "out/G_edm_euler")
    expected = case.tensors["out/denoised_edm_euler"][2:]
    actual = model(x[2:], t[2:], None if labels is None else labels[2:])
    torch.testing.assert_close(actual, expected, rtol=case.tolerance["rtol"], atol=case.tolerance["atol"])


def as_rounded(case: Case, model: Model) -> None:
    """The bundle's D(x; sigma) is that of the weights as fp16."""
    name = "G_net_cond" if model.label_dim else "G_net_uncond"
    expected = edm2_model_of(name, {key: value.half().float() for key, value in case.weights.items()})
    x, sigma, labels = case.tensors["in/x"], case.tensors["in/sigma"], case.tensors.get("in/class_labels")
    torch.testing.assert_close(model(x, sigma, labels), expected(x, sigma, labels), rtol=0, atol=0)


D_X, BOUNDARY, TEACHER = denoises("out/D_x"), denoises("out/denoised_boundary"), denoises("out/denoised_edm")
EVAL = denoises("out/D_x_eval")
EDM_OPTIONS = ("--preconditioner", "edm")
ONE = ("found: EDM",)

SOURCES: dict[str, Source] = {
    **{f"EDM pickle {name}": Source(name, edm_pickle(name), D_X, says=ONE) for name in EDM_CASES if name[0] == "A"},
    "EDM pickle, protocol 2": Source("A_ddpmpp_uncond", edm_pickle("A_ddpmpp_uncond", protocol=2), D_X),
    "EDM training state": Source("A_ddpmpp_cond_aug", training_state("A_ddpmpp_cond_aug", False), D_X),
    "old EDM training state": Source("A_adm32", training_state("A_adm32", True), D_X),
    "EDM state dict": Source("A_adm32", state_dict("A_adm32"), D_X, says=("guess: preconditioner edm", "guess: sigma_data")),
    "EDM state dict without model.": Source("A_ddpmpp_uncond", state_dict("A_ddpmpp_uncond", without="model."), D_X),
    "EDM safetensors": Source("A_ncsnpp_uncond", tensors_file("A_ncsnpp_uncond"), D_X, EDM_OPTIONS),
    "VP state dict": Source("A_VPPrecond", state_dict("A_VPPrecond"), D_X, ("--preconditioner", "vp")),
    "iDDPM state dict": Source("A_iDDPMPrecond", state_dict("A_iDDPMPrecond"), D_X, says=("preconditioner: iddpm",)),
    "ECT pickle": Source("C_ecm_net", edm_pickle("C_ecm_net"), EVAL, says=("found: ECT", "sampling: consistency")),
    "ECT training state": Source("C_ecm_net", training_state("C_ecm_net", False), EVAL),
    "ECT pickle in training form": Source("C_ecm_net", edm_pickle("C_ecm_net"), denoises("out/D_x_train"), EDM_OPTIONS),
    "ECT weights in an EDM pickle": Source(
        "C_ecm_net", edm_pickle("C_ecm_net", class_name="EDMPrecond"), denoises("out/D_x_train")
    ),
    **{
        f"EDM2 {name}": Source(name, edm2_pickle(name, dtype=torch.float32), D_X, says=("found: EDM2", "sampling: heun"))
        for name in ("G_net_uncond", "G_net_cond")
    },
    "EDM2 fp16": Source("G_net_cond", edm2_pickle("G_net_cond"), as_rounded, says=("dtype: float16",)),
    "EDM2 without log variance": Source(
        "G_net_uncond",
        edm2_pickle("G_net_uncond", without="logvar", dtype=torch.float32),
        D_X,
        says=("guess: sampler consistency", "between its steps 1.526"),
    ),
    "EDM2 training state": Source(
        "G_net_uncond", edm2_training_state("G_net_uncond"), D_X, ("--weights", "0.1", "--channels-per-head", "16")
    ),
    "EDM2 state dict": Source("G_net_cond", state_dict("G_net_cond"), D_X, ("--channels-per-head", "32")),
    **{
        f"OpenAI {name}": Source(name, state_dict(name), BOUNDARY, OPENAI_HEADS[name], ("guess: preconditioner edm_boundary",))
        for name in ("E_unet_uncond", "E_unet_cond")
    },
    "OpenAI teacher": Source("E_unet_cond", state_dict("E_unet_cond"), TEACHER, OPENAI_HEADS["E_unet_cond"] + EDM_OPTIONS),
    "OpenAI safetensors": Source("E_unet_uncond", tensors_file("E_unet_uncond"), BOUNDARY, OPENAI_HEADS["E_unet_uncond"]),
    "CTM on CIFAR-10": Source("F_kim_net", state_dict("F_kim_net"), jumps, says=("found: CTM", "guess: outer euler")),
    "CTM on CIFAR-10 by preset": Source("F_kim_net", state_dict("F_kim_net"), jumps, ("--preset", "ctm_cifar10_cond")),
    "CTM on ImageNet": Source("F_sony_net", state_dict("F_sony_net", legacy=True), jumps, OPENAI_HEADS["F_sony_net"]),
}
