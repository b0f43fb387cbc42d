"""Which preconditioner a checkpoint's network was trained with: by the class around it, by options, or by a guess."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastcm.convert.told import Told
from fastcm.diffusion.preconditioners import PRECONDITIONERS
from fastcm.errors import CheckpointError, ConfigError

# Official class: kind in PRECONDITIONERS, and the attributes that are its constants.
CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "EDMPrecond": ("edm", ("sigma_data",)),
    "ECMPrecond": ("edm_boundary", ("sigma_data", "sigma_min")),
    "VPPrecond": ("vp", ("beta_d", "beta_min", "M", "epsilon_t")),
    "VEPrecond": ("ve", ("sigma_min", "sigma_max")),
    "iDDPMPrecond": ("iddpm", ("C_1", "C_2", "M")),
    "Precond": ("edm", ("sigma_data",)),
}
TABLE_CLASS = "iDDPMPrecond"  # the only one that keeps a table in the state dict
EXCHANGEABLE = {"edm", "edm_boundary"}  # trained under the one, evaluated under the other
SIGMA_DATA = 0.5
MAX_LEVELS, MAX_CONSTANT = 100_000, 1e9


@dataclass(frozen=True)
class BareDefaults:
    """What to guess of a bare state dict, and why: the kind, and sigma_min where it has boundary scalings."""

    kind: str
    sigma_min: float
    why: str


def preconditioner_of(told: Told, class_name: str, attributes: Mapping[str, Any], bare: BareDefaults) -> dict[str, Any]:
    """{"kind": .., constants}, as the header of a bundle has it.

    class_name is "" for a bare state dict. Raises CheckpointError for a class that is unknown, or whose constants are no
    numbers, and where options contradict it; ConfigError for options that no preconditioner has a use for.
    """
    precond = _preconditioner_of(told, class_name, attributes, bare)
    for name in ("sigma_data", "sigma_min"):
        if getattr(told.options, name) is not None and name not in precond:
            raise ConfigError(f"{told.flag(name)} was given, but the preconditioner {precond['kind']} has no such constant")
    return precond


def _preconditioner_of(told: Told, class_name: str, attributes: Mapping[str, Any], bare: BareDefaults) -> dict[str, Any]:
    if class_name not in CLASSES and class_name and told.options.preconditioner is None:
        known = ", ".join(CLASSES)
        raise CheckpointError(f"its network is in a {class_name}, which is none of {known}; give --preconditioner")
    if class_name not in CLASSES:
        return _bare(told, told.get("preconditioner", bare.kind, bare.why), bare)
    kind, names = CLASSES[class_name]
    wanted = told.options.preconditioner or kind
    if wanted != kind and not {wanted, kind} <= EXCHANGEABLE:
        raise CheckpointError(f"preconditioner was given as {wanted}, but its {class_name} is {kind}")
    constants = {name: _number(attributes, name, class_name, kind) for name in names}
    if wanted == kind:
        for name in constants.keys() & {"sigma_data", "sigma_min"}:
            told.check(name, constants[name], f"its {class_name}")
        return {"kind": kind, **constants}
    constants.pop("sigma_min", None)
    boundary = {"sigma_min": told.get("sigma_min", bare.sigma_min, "as ECT's is")} if wanted == "edm_boundary" else {}
    return {"kind": wanted, **constants, **boundary}


def _bare(told: Told, kind: str, bare: BareDefaults) -> dict[str, Any]:
    if kind not in PRECONDITIONERS:
        raise ConfigError(f"--preconditioner: there is none called '{kind}'; choose one of {', '.join(PRECONDITIONERS)}")
    if kind not in {*EXCHANGEABLE, "direct"}:
        return {"kind": kind}
    constants = {"sigma_data": told.get("sigma_data", SIGMA_DATA, "as in all published networks")}
    if kind == "edm_boundary":
        constants["sigma_min"] = told.get("sigma_min", bare.sigma_min, "as in the published networks")
    return {"kind": kind, **constants}


def _number(attributes: Mapping[str, Any], name: str, class_name: str, kind: str) -> float:
    """A constant of a preconditioner; where the object does not keep it, that of the paper."""
    usual = getattr(PRECONDITIONERS[kind](), name)
    value = attributes.get(name, usual)
    whole = isinstance(usual, int)  # the number of levels, a table of which is made
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise CheckpointError(f"{name} of its {class_name} is a {type(value).__name__}, expected a number")
    if not 0 <= value <= (MAX_LEVELS if whole else MAX_CONSTANT):
        raise CheckpointError(f"{name} of its {class_name} is {value}, which cannot be; usually it is {usual}")
    return value
