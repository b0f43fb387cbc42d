"""From a set of weights to a plan of the bundle: which network, under which scalings, sampled how, and what was guessed.

The kind is found by names of tensors and classes only, never by the name of the file.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastcm.config import FamilyOverrides, NetworkConfig
from fastcm.convert.edm2_facts import SIZES, describe_edm2
from fastcm.convert.options import Options, Preset
from fastcm.convert.scalings import CLASSES, TABLE_CLASS, BareDefaults, preconditioner_of
from fastcm.convert.source import Weights
from fastcm.convert.told import Told
from fastcm.diffusion.trajectory import Trajectory
from fastcm.errors import CheckpointError, ConfigError
from fastcm.integrations.official import TABLE, Layout
from fastcm.io.edm_layout import describe_edm
from fastcm.io.openai_layout import describe_openai
from fastcm.io.unet_facts import UNetFacts
from fastcm.model import SamplingDefaults
from fastcm.sampling.consistency import consistency_sigmas

MODEL = "model."
SECOND_TIME = ("time_embed_s.", "map_layer0_s.")
ECT_LOSS = "ECMLoss"
ECT_MID_SIGMA, ECT_MID_SIGMA_64 = 0.821, 1.526  # arXiv 2310.14189 and 2406.14548, two steps on CIFAR-10 and ImageNet
PUBLISHED_HEAD = 64
LARGEST, MAX_CHANNELS = 1024, 1024  # of images
PUBLISHED_LOWEST, LARGEST_LOWEST = 8, 32  # sides of the lowest level
FAMILY_NAMES = {"ddpmpp": "DDPM++", "ncsnpp": "NCSN++", "adm": "ADM", "openai": "OpenAI's ADM"}


@dataclass(frozen=True)
class Plan:
    """What the bundle is to say of its model, and how the tensors are named in the source."""

    kind: str
    layout: Layout
    network: NetworkConfig
    image_shape: tuple[int, int, int]
    label_dim: int
    preconditioner: dict[str, Any]
    sampling: SamplingDefaults
    augment_dim: int = 0
    trajectory: dict[str, Any] | None = None
    guesses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def recognize(weights: Weights, options: Options, preset: Preset | None = None) -> Plan:
    """The plan for a set of weights; ``options`` count before those of ``preset``.

    Raises CheckpointError for weights of no known kind, or that are damaged, and where options or preset contradict
    names, shapes or attributes in the file; ConfigError for options that contradict each other.
    """
    told = Told(options.over(preset.options) if preset else options)
    name = layout_of(weights)
    if preset and preset.layout != name:
        raise CheckpointError(f"the preset is for files of the layout '{preset.layout}', but this one has the layout '{name}'")
    second_time = any(name.removeprefix(MODEL).startswith(SECOND_TIME) for name in weights.state)
    if preset and preset.second_time != second_time:
        has, needs = ("a", "without one") if second_time else ("no", "with one")
        raise CheckpointError(f"its network has {has} second time, but the preset is for networks {needs}")
    plan = KINDS[name](weights, told)
    if not 1 <= plan.image_shape[0] <= MAX_CHANNELS or plan.image_shape[1] > LARGEST:
        raise CheckpointError(f"its images would be of (C, H, W) = {plan.image_shape}, which cannot be")
    _check_attributes(weights, plan)
    _check_outputs(weights, plan)
    told.check("label_dim", plan.label_dim, "its embedding of classes")
    told.check("resolution", plan.image_shape[1], "the names of its levels")
    if plan.sampling.sampler == "trajectory" and not second_time:
        raise ConfigError("--sampler trajectory was given, but this network has no second time and cannot jump")
    too_low = [sigma for sigma in plan.sampling.mid_sigmas if sigma <= plan.sampling.renoise_sigma_min]
    if too_low:
        raise ConfigError(f"--mid-sigma {too_low[0]:g} is not above sigma_min {plan.sampling.renoise_sigma_min:g}")
    half = ("its author ran the network in fp16 (use_fp16); the bundle's weights are fp32 and its dtype is yours to choose",)
    notes = plan.notes + (half if weights.attributes.get("use_fp16") is True else ())
    return replace(plan, guesses=tuple(told.guesses), notes=notes)


def layout_of(weights: Weights) -> str:
    """Whose names the tensors have: "edm", "openai" or "edm2". Raises CheckpointError where they are nobody's."""
    state = weights.state
    if any(name.startswith("unet.enc.") for name in state):
        return "edm2"
    if any(name.removeprefix(MODEL).startswith("enc.") for name in state):
        return "edm"
    if any(name.startswith("input_blocks.") for name in state):
        return "openai"
    if any(name.startswith("down_blocks.") for name in state):
        raise CheckpointError("its names are those of diffusers: give the folder with the file and its config.json")
    some = ", ".join(list(state)[:3]) or "none"
    raise CheckpointError(
        f"its names ({some}, ..) are of no network that fastcm has: it knows EDM's, EDM2's, OpenAI's and CTM's"
    )


def _edm(weights: Weights, told: Told) -> Plan:
    state, table = dict(weights.state), weights.state.get(TABLE)
    state.pop(TABLE, None)
    prefix = MODEL if any(name.startswith(f"{MODEL}enc.") for name in state) else ""
    _refuse(told, "head_major", "EDM's networks order qkv in one way")
    for name in ("channels_per_head", "num_heads", "num_heads_up"):
        _refuse(told, name, "EDM's networks have one head, or heads of 64 channels (ADM)")
    facts = describe_edm({name.removeprefix(prefix): value for name, value in state.items()})
    second_time = facts.network.second_time
    if facts.network.out_channels:
        bare = BareDefaults("iddpm", 0.003, "as EDM's networks with more output channels than the image are")
    else:
        bare = BareDefaults("edm", 0.003, "as CTM's are" if second_time else "as most networks under these names are")
    known = weights.class_name or (TABLE_CLASS if table is not None else "")
    attributes = weights.attributes if weights.class_name else {} if table is None else {"M": table.numel() - 1}
    precond = preconditioner_of(told, known, attributes, bare)
    consistency = precond["kind"] == "edm_boundary"
    middle = ECT_MID_SIGMA_64 if facts.image_shape[1] == 64 else ECT_MID_SIGMA
    usual = "trajectory" if second_time else "consistency" if consistency else "heun"
    sampling = _sampling(told, usual, (middle,))
    kind = "CTM's network for CIFAR-10" if second_time else "ECT" if consistency else "EDM"
    layout = Layout("edm", prefix=prefix)
    return _plan_of(kind, layout, facts, told, precond, sampling)


def _openai(weights: Weights, told: Told) -> Plan:
    given = _openai_heads(weights, told)
    levels = len(_describe_openai(weights, LARGEST, given).network.channel_mult)
    smallest = "its lowest level is then 8x8, as in all published networks"
    resolution = told.get("resolution", PUBLISHED_LOWEST << (levels - 1), smallest)
    if resolution >> (levels - 1) > LARGEST_LOWEST:  # attention there would take all memory
        raise ConfigError(
            f"--resolution {resolution}: the lowest of its {levels} levels would have a side of {resolution >> (levels - 1)}; "
            f"in published networks that is {PUBLISHED_LOWEST}, which makes {PUBLISHED_LOWEST << (levels - 1)}"
        )
    facts = _describe_openai(weights, resolution, given)
    if facts.network.out_channels and not weights.class_name and told.options.preconditioner is None:
        raise CheckpointError(
            f"its network has {facts.network.out_channels} output channels for {facts.image_shape[0]} of the image, and names "
            "and shapes do not tell its scalings: give --preconditioner, iddpm where its variances are learned under a cosine "
            "schedule"
        )
    head_major = _head_major(weights, told, facts)
    second_time = facts.network.second_time
    bare = (
        BareDefaults("edm", 0.002, "as CTM's are")
        if second_time
        else BareDefaults("edm_boundary", 0.002, "as consistency models are; OpenAI's teachers (edm_*_ema.pt) need edm")
    )
    precond = preconditioner_of(told, weights.class_name, weights.attributes, bare)
    consistency = precond["kind"] == "edm_boundary" and not second_time
    usual = "trajectory" if second_time else "consistency" if consistency else "heun"
    sampling = _sampling(told, usual, (), precond.get("sigma_min", 0.0))
    kind = "CTM's network for ImageNet" if second_time else f"OpenAI's {'consistency' if consistency else 'diffusion'} model"
    layout = Layout("openai", head_major=head_major, conv1d=_has_conv1d(weights))
    return _plan_of(kind, layout, facts, told, precond, sampling)


def _edm2(weights: Weights, told: Told) -> Plan:
    for name in ("num_heads", "num_heads_up", "head_major", "outer"):
        _refuse(told, name, "EDM2's networks have no such choice")
    network, image_shape, label_dim = describe_edm2(weights.state, weights.attributes)
    if not weights.class_name or told.options.channels_per_head is not None:
        per_head = told.get("channels_per_head", network.channels_per_head, "as in all published networks")
        network = network.model_copy(update={"channels_per_head": per_head})
    precond = preconditioner_of(told, weights.class_name, weights.attributes, BareDefaults("edm", 0.003, "as EDM2's are"))
    ect = weights.loss == ECT_LOSS or not network.logvar_channels
    if ect and weights.loss != ECT_LOSS:
        told.get("sampler", "consistency", "it has no log variance, as ECT's networks; a diffusion model needs heun")
    sampling = _sampling(told, "consistency" if ect else "heun", (ECT_MID_SIGMA_64,))
    kind = f"{'ECT on EDM2' if ect else 'EDM2'}-{SIZES.get(network.model_channels, '?')}"
    return Plan(kind, Layout("edm2"), network, image_shape, label_dim, precond, sampling, notes=_edm2_notes(image_shape))


KINDS: dict[str, Callable[[Weights, Told], Plan]] = {"edm": _edm, "openai": _openai, "edm2": _edm2}


def _edm2_notes(image_shape: tuple[int, int, int]) -> tuple[str, ...]:
    latent = "its images are latents of 4 channels; fastcm has no decoder for them"
    return (latent,) if image_shape[0] == 4 else ()


def _plan_of(
    kind: str, layout: Layout, facts: UNetFacts, told: Told, precond: dict[str, Any], sampling: SamplingDefaults
) -> Plan:
    family = facts.network.family
    return Plan(
        f"{kind} ({FAMILY_NAMES[family]})", layout, facts.network, facts.image_shape, facts.label_dim, precond, sampling,
        augment_dim=facts.augment_dim, trajectory=_trajectory(told, facts, precond),
    )  # fmt: skip


def _trajectory(told: Told, facts: UNetFacts, precond: dict[str, Any]) -> dict[str, Any] | None:
    if not facts.network.second_time:
        _refuse(told, "outer", "this network has no second time")
        return None
    outer = told.get("outer", "euler", "as in CTM's paper")
    return asdict(Trajectory(outer, precond["sigma_data"])) if "sigma_data" in precond else asdict(Trajectory(outer))


def _sampling(told: Told, usual: str, mid_sigmas: tuple[float, ...], renoise_sigma_min: float = 0.0) -> SamplingDefaults:
    sampler = told.options.sampler or usual
    if sampler != "consistency":
        return with_mid_sigmas(SamplingDefaults(sampler), told.options.mid_sigmas or None)
    return with_mid_sigmas(SamplingDefaults(sampler, mid_sigmas, renoise_sigma_min), told.options.mid_sigmas)


def with_mid_sigmas(sampling: SamplingDefaults, mid_sigmas: tuple[float, ...] | None) -> SamplingDefaults:
    """The same with other noise levels between the steps, unless None. Raises ConfigError for levels that cannot be."""
    if mid_sigmas is None:
        return sampling
    if sampling.sampler not in ("consistency", "trajectory"):
        raise ConfigError(
            f"--mid-sigma was given, but the sampler is {sampling.sampler}; only consistency and trajectory have such levels"
        )
    consistency_sigmas(len(mid_sigmas) + 1, mid_sigmas)
    return replace(sampling, mid_sigmas=tuple(mid_sigmas))


def _refuse(told: Told, name: str, reason: str) -> None:
    if getattr(told.options, name) is not None:
        raise ConfigError(f"{told.flag(name)} was given, but {reason}")


def _openai_heads(weights: Weights, told: Told) -> FamilyOverrides:
    options = told.options
    if options.num_heads is None and options.num_heads_up is None:
        if not any(name.endswith(".qkv.weight") for name in weights.state):
            return FamilyOverrides()
        why = "as in all published networks; names and shapes do not tell heads apart"
        return FamilyOverrides(channels_per_head=told.get("channels_per_head", PUBLISHED_HEAD, why))
    if options.channels_per_head is not None:
        raise ConfigError("--heads was given beside --channels-per-head or a preset that says it; one follows from the other")
    if options.num_heads is None:
        raise ConfigError("--heads-up was given without --heads")
    return FamilyOverrides(
        channels_per_head=0, num_heads=options.num_heads, num_heads_up=options.num_heads_up or options.num_heads
    )


def _describe_openai(weights: Weights, resolution: int, given: FamilyOverrides) -> UNetFacts:
    try:
        return describe_openai(weights.state, resolution, given)
    except CheckpointError as error:
        hint = "; give --channels-per-head or --heads" if "channels_per_head" in str(error) else ""
        raise CheckpointError(f"{error}{hint}") from None


def _has_conv1d(weights: Weights) -> bool:
    around = (".qkv.weight", ".proj_out.weight")
    return any(value.ndim == 3 for name, value in weights.state.items() if name.endswith(around))


def _head_major(weights: Weights, told: Told, facts: UNetFacts) -> bool:
    """The order of rows matters where there is more than one head."""
    overrides = facts.network.overrides
    single = overrides.num_heads == 1 and overrides.num_heads_up == 1 and overrides.channels_per_head == 0
    if single or not any(name.endswith(".qkv.weight") for name in weights.state):
        return bool(told.options.head_major)
    return told.get("head_major", False, "rows of qkv are ordered (3, heads, D), as in OpenAI's and Sony's files")


def _check_attributes(weights: Weights, plan: Plan) -> None:
    """What the object around the network says of itself must fit its tensors."""
    found = {"img_resolution": plan.image_shape[1], "img_channels": plan.image_shape[0], "label_dim": plan.label_dim}
    for name, value in found.items():
        said = weights.attributes.get(name, value) if weights.class_name in CLASSES else value
        if said != value:
            raise CheckpointError(f"its {weights.class_name} says {name} {said}, but its tensors are of {value}")


def _check_outputs(weights: Weights, plan: Plan) -> None:
    """iDDPM's networks give a variance beside the image (arXiv 2102.09672, section 3.1), EDM's other classes nothing.

    Networks that are of none of these classes may give more than the image, which is dropped.
    """
    channels, kind = plan.image_shape[0], plan.preconditioner["kind"]
    found = getattr(plan.network, "out_channels", 0) or channels
    needed = 2 * channels if kind == "iddpm" else channels
    official = weights.class_name in CLASSES or TABLE in weights.state
    if found < needed or (found > needed and (official or kind == "iddpm")):
        # Where the file says its scalings, or gives less than an image, no other scalings fit either.
        advice = "" if official or found < channels else "; give another --preconditioner"
        raise CheckpointError(
            f"its network has {found} output channels for {channels} of the image, but under the preconditioner {kind} it "
            f"would have {needed}{advice}"
        )
