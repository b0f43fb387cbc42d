"""State dicts under the names of the official projects: which layouts there are, and the export of a bundle to one."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fastcm.diffusion.preconditioners import IDDPM, Preconditioner
from fastcm.errors import CheckpointError, ConfigError
from fastcm.integrations.files import write_weights
from fastcm.integrations.hub_layout import model_of_bundle
from fastcm.io.edm2_layout import from_edm2, to_edm2
from fastcm.io.edm_layout import from_edm, to_edm
from fastcm.io.openai_layout import from_openai, to_openai
from fastcm.nn.network import Network

SOURCE = "source"  # where ``BundleHeader.trained`` says what a converted bundle was made of
FAMILIES = {"edm": ("ddpmpp", "ncsnpp", "adm"), "openai": ("openai",), "edm2": ("edm2",)}
TABLE = "u"  # iDDPM's noise levels, which the official preconditioner saves beside the network


@dataclass(frozen=True)
class Layout:
    """Names and row orders of one official project.

    name        "edm" (also CTM on CIFAR-10), "openai" (also CTM on ImageNet) or "edm2"
    prefix      before the names of EDM's network, "model." where its preconditioner is around it
    head_major  OpenAI's qkv is ordered (heads, 3, D)
    conv1d      the weights around OpenAI's attention are [O, I, 1]
    """

    name: Literal["edm", "openai", "edm2"]
    prefix: str = ""
    head_major: bool = False
    conv1d: bool = False

    def changes(self) -> str:
        """What differs between the tensors of a source and those of its bundle, in words."""
        if self.name == "openai":
            order = "(heads, 3, D) to (3, heads, D)" if self.head_major else "kept"
            shapes = ", vectors of one pixel are [O, I, 1, 1]" if self.conv1d else ""
            return f"OpenAI's names to EDM's, class vectors are columns, rows of qkv: {order}{shapes}"
        renamed = {
            "edm": f"'{self.prefix}' taken from the names" if self.prefix else "none",
            "edm2": "'unet.' taken from the names",
        }
        filters = ", resample filters are computed anew" if self.name == "edm" else ""
        return f"{renamed[self.name]}, rows of qkv: (heads, D, 3) to (3, heads, D){filters}"

    def ours(
        self, state: Mapping[str, Float[Tensor, "..."]], net: Network, precond: Preconditioner
    ) -> dict[str, Float[Tensor, "..."]]:
        """What ``net.load_state_dict`` takes, in the dtype of ``state``.

        Raises CheckpointError naming the key that is missing, unknown or of another shape, or a table of noise levels
        that is not the preconditioner's.
        """
        if self.name == "edm2":
            return from_edm2(state, net)
        if self.name == "openai":
            return from_openai(state, net, head_major=self.head_major)
        state = dict(state)
        table = state.pop(TABLE, None) if isinstance(precond, IDDPM) else None
        levels = precond.levels().float() if table is not None else None
        if table is not None and (table.shape != levels.shape or not torch.allclose(table.float(), levels, rtol=1e-3)):
            raise CheckpointError(f"{TABLE} is not the table of noise levels of {precond}")
        strange = [name for name in state if not name.startswith(self.prefix)]
        if strange:
            raise CheckpointError(f"the checkpoint has {strange[0]} beside a network under '{self.prefix}'")
        return from_edm({name.removeprefix(self.prefix): value for name, value in state.items()}, net)

    def official(
        self, state: Mapping[str, Float[Tensor, "..."]], net: Network, precond: Preconditioner
    ) -> dict[str, Float[Tensor, "..."]]:
        """The official state dict with the values of ``state``, a state dict of ``net``; the inverse of ``ours``."""
        if self.name == "edm2":
            return to_edm2(state, net)
        if self.name == "openai":
            return to_openai(state, net, head_major=self.head_major, conv1d=self.conv1d)
        named = {self.prefix + name: value for name, value in to_edm(state, net).items()}
        # A bare network has no preconditioner around it that could keep the table.
        return named | {TABLE: precond.levels().float()} if isinstance(precond, IDDPM) and self.prefix else named


def export_official(path: str | Path, file: str | Path, name: Literal["edm", "openai", "edm2"], *, ema: str = "") -> str:
    """Write the weights of a bundle or run folder, chosen by ``ema`` as in ``load``, as safetensors under official names.

    A converted bundle is written as it came: names, row orders and dtype, bit for bit. Others are fp32, under "model." for
    EDM, with [O, I, 1, 1] and (3, heads, D) for OpenAI. Returns what the state dict does not say: the scalings.
    Raises ConfigError for a network of another family, CheckpointError for a bundle that is damaged.
    """
    model, header = model_of_bundle(path, ema)
    family = header.network.get("family")
    if family not in FAMILIES[name]:
        known = ", ".join(FAMILIES[name])
        raise ConfigError(f"a network of the family {family} has no names in the layout '{name}'; it takes {known}")
    try:
        source = header.trained.get(SOURCE, {})
        layout = recorded_layout(source, name)
        dtype = getattr(torch, source.get("dtype", "float32") if source.get("layout", {}).get("name") == name else "float32")
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged header: trained.{SOURCE}: {error}") from None
    official = layout.official(model.net.state_dict(), model.net, model.precond)
    write_weights(Path(file), {key: value.to(dtype) for key, value in official.items()})
    constants = ", ".join(f"{key} {value}" for key, value in header.preconditioner.items() if key != "kind")
    return f"not in a state dict: the preconditioner, {header.preconditioner['kind']}{f' ({constants})' if constants else ''}"


def recorded_layout(source: Mapping[str, Any], name: Literal["edm", "openai", "edm2"]) -> Layout:
    """The layout of the file that a bundle was made of where it is this one, otherwise the plain one."""
    recorded = source.get("layout", {})
    if recorded.get("name") == name:
        return Layout(**recorded)
    return Layout(name, prefix="model." if name == "edm" else "")


def layout_record(layout: Layout, dtypes: Mapping[str, int]) -> dict[str, Any]:
    """What an export reads: the layout, and the dtype of the tensors (numbers of them by dtype) where there is one."""
    return {"layout": asdict(layout), "dtype": next(iter(dtypes)) if len(dtypes) == 1 else "float32"}
