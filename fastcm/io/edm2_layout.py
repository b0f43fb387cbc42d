"""State dicts of the official EDM2 networks (arXiv 2312.02696) to and from those of ``fastcm.nn.EDM2UNet``.

Names agree but for the prefix "unet.", which the official preconditioner puts before all that is not the log variance, and
shapes agree. Official attention interleaves q, k and v as EDM's does (``io.edm_layout``).
"""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from fastcm.io.layout import check_state, to_interleaved, to_major
from fastcm.nn.edm2 import EDM2UNet, MPBlock

_PREFIX = "unet."
_LOGVAR = ("logvar_fourier.", "logvar_linear.")


def from_edm2(state: Mapping[str, Float[Tensor, "..."]], net: EDM2UNet) -> dict[str, Float[Tensor, "..."]]:
    """What ``net.load_state_dict`` takes, from a state dict under official names ("unet.enc.64x64_conv.weight").

    Neither ``state`` nor ``net`` is changed; values keep their dtype (snapshots are fp16). A network to be trained on needs
    ``net.constrain_weights`` once after loading. A checkpoint without log variance needs a network without logvar_channels.
    Raises CheckpointError naming the key that is missing, unknown or of another shape.
    """
    names, heads = _official_names(net), _attention_heads(net)
    check_state(state, {names[name]: value.shape for name, value in net.state_dict().items()})
    ours = {name: state[official] for name, official in names.items()}
    return {name: to_major(value, heads[name]) if name in heads else value for name, value in ours.items()}


def to_edm2(state: Mapping[str, Float[Tensor, "..."]], net: EDM2UNet) -> dict[str, Float[Tensor, "..."]]:
    """The official state dict with the values of ``state``, a state dict of ``net``.

    Raises CheckpointError naming the key that is missing, unknown or of another shape.
    """
    names, heads = _official_names(net), _attention_heads(net)
    check_state(state, {name: value.shape for name, value in net.state_dict().items()})
    return {names[name]: to_interleaved(value, heads[name]) if name in heads else value for name, value in state.items()}


def _official_names(net: EDM2UNet) -> dict[str, str]:
    """The official name of each entry of the network's state dict."""
    return {name: name if name.startswith(_LOGVAR) else _PREFIX + name for name in net.state_dict()}


def _attention_heads(net: EDM2UNet) -> dict[str, int]:
    """Number of heads by name of each qkv parameter."""
    blocks = {name: block for name, block in net.named_modules() if isinstance(block, MPBlock) and block.num_heads}
    return {f"{name}.attn_qkv.weight": block.num_heads for name, block in blocks.items()}
