"""Typed configuration: frozen sections, strict YAML, one optional ``base:``, dotted overrides, a stable hash.

Every duration, interval and half-life counts images, so a change of batch size changes no schedule.
"""

import difflib
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastcm.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for key in data:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown key '{key}'; {hint}")
        return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


class DataConfig(Section):
    """Which images to train on."""

    kind: Literal["digits", "cifar10", "edm_zip", "folder", "npz"] = "digits"
    path: str = ""  # archive or folder; empty for digits
    resolution: int = 0  # expected side in pixels; 0 accepts what the set has
    conditional: bool = False  # train a class-conditional network on the set's labels
    xflip: bool = False  # mirror each image with probability 1/2
    download: bool = False  # fetch CIFAR-10 into ``path`` if it is not there

    @model_validator(mode="after")
    def _check_path(self) -> "DataConfig":
        if self.kind == "digits" and self.path:
            raise ValueError(f"path is '{self.path}', but the digits come with the package: set kind to what lies there")
        return self


class NetworkConfig(Section):
    """A U-Net of EDM's families (arXiv 2206.00364, Table 7)."""

    family: Literal["ddpmpp", "ncsnpp", "adm"] = "ddpmpp"
    model_channels: Positive = 128
    channel_mult: tuple[Positive, ...] = (2, 2, 2)
    channel_mult_emb: Positive = 4
    num_blocks: Positive = 4
    attn_resolutions: tuple[Positive, ...] = (16,)
    fourier_scale: Annotated[float, Field(gt=0)] = 16.0  # NCSN++ only; ECT uses 0.02
    second_time: bool = False  # a second time input, as trajectory models need


class EDMObjectiveConfig(Section):
    """Denoising score matching: EDM, VP or VE noise distribution and weight (arXiv 2206.00364, Table 1)."""

    kind: Literal["edm"]
    variant: Literal["edm", "vp", "ve"] = "edm"
    p_mean: float = -1.2
    p_std: Annotated[float, Field(gt=0)] = 1.2
    sigma_data: Annotated[float, Field(gt=0)] = 0.5


class ECTObjectiveConfig(Section):
    """Easy Consistency Tuning (arXiv 2406.14548)."""

    kind: Literal["ect"]
    p_mean: float = -1.1
    p_std: Annotated[float, Field(gt=0)] = 2.0
    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    q: Annotated[float, Field(gt=1)] = 2.0  # r/t = 1 - adj(t) / q^(stage+1)
    double_images: Positive = 3_200_000  # images per stage
    max_stage: Annotated[int, Field(ge=0)] = 1000
    mapping: Literal["sigmoid", "const"] = "sigmoid"
    k: float = 8.0
    b: float = 1.0
    distance: Literal["l2", "squared", "pseudo_huber"] = "l2"
    c: Annotated[float, Field(ge=0)] = 0.0  # pseudo-Huber constant
    weight: Literal["inverse_gap", "snr_plus_one"] = "inverse_gap"  # 1/(t-r) or 1/t^2 + 1/sigma_data^2
    boundary_sigma: Annotated[float, Field(gt=0)] = 0.003  # sampling: D(x, boundary_sigma) = x
    mid_sigmas: tuple[Annotated[float, Field(gt=0)], ...] = (0.821,)  # default noise levels of 2-step sampling


class OptimizerConfig(Section):
    """Adam or RAdam with linear warm-up and, if asked for, a linear cool-down to zero at the end of the phase."""

    kind: Literal["adam", "radam"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    warmup_images: Annotated[int, Field(ge=0)] = 0
    cooldown_images: Annotated[int, Field(ge=0)] = 0


class EMAConfig(Section):
    """Weight averaging: fixed half-life (EDM) or power function of the images seen (EDM2, arXiv 2312.02696)."""

    kind: Literal["halflife", "power"] = "halflife"
    halflife_images: Annotated[float, Field(gt=0)] = 500_000.0
    rampup_ratio: Annotated[float, Field(ge=0)] = 0.0  # half-life <= ratio * images seen; 0 = no ramp-up
    std: Annotated[float, Field(gt=0, lt=0.28)] = 0.05  # power function: relative width of the averaged interval


class PhaseConfig(Section):
    """One objective trained for a while; phases run in the order they are written in."""

    objective: Annotated[EDMObjectiveConfig | ECTObjectiveConfig, Field(discriminator="kind")]
    init: str = "previous"  # "previous" (phase; fresh weights in the first one), "fresh", or the path of a bundle
    duration_images: Positive
    batch_size: Positive = 128
    microbatch_size: Annotated[int, Field(ge=0)] = 0  # gradient accumulation; 0 = the whole batch at once
    dropout: Fraction = 0.0
    augment: Fraction = 0.0  # strength p of EDM's augmentation pipe; 0 = off
    optimizer: OptimizerConfig = OptimizerConfig()
    emas: Annotated[dict[str, EMAConfig], Field(min_length=1)] = {"main": EMAConfig()}  # the first one is sampled from

    @model_validator(mode="after")
    def _check(self) -> "PhaseConfig":
        if self.microbatch_size and self.batch_size % self.microbatch_size:
            raise ValueError(f"microbatch_size {self.microbatch_size} does not divide batch_size {self.batch_size}")
        for name in self.emas:
            if not re.fullmatch(r"[A-Za-z0-9_]+", name):
                raise ValueError(f"EMA name '{name}' may hold letters, digits and underscores only")
        return self


class ComputeConfig(Section):
    """Where and in which precision to compute."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the network's torso; everything else stays fp32
    tf32: bool = False  # TensorFloat-32 for fp32 convolutions and matrix products on CUDA
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = on CUDA only
    backend: Literal["auto", "torch", "triton", "xformers", "apex"] = "auto"  # of the kernels; auto = the fastest that runs
    strict: bool = False  # a kernel that cannot run is an error instead of a warning and its PyTorch reference
    threads: Annotated[int, Field(ge=0)] = 0  # CPU threads; 0 = torch's choice; 1 gives the same bits on any number of cores

    @field_validator("compile", mode="before")
    @classmethod
    def _read_yaml_words(cls, value: object) -> object:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value  # YAML 1.1 reads on as true


class TelemetryConfig(Section):
    """What is written down, and how often."""

    log_images: Positive = 10_000  # one line of metrics.jsonl
    snapshot_images: Positive = 1_000_000  # checkpoint, bundle and picture grids; a kill loses at most this much
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    grid_size: Annotated[int, Field(gt=0, le=32)] = 8  # pictures per side of a grid
    heun_steps: Annotated[int, Field(ge=2)] = 18  # steps of the pretraining grids: 2 steps - 1 network evaluations
    evaluate: bool = False  # Frechet distances at the end of the run (digits only)


class Config(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    phases: Annotated[dict[str, PhaseConfig], Field(min_length=1)]
    compute: ComputeConfig = ComputeConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.telemetry.evaluate and self.data.kind != "digits":
            raise ValueError("telemetry.evaluate needs data.kind 'digits', the only set with a built-in feature network")
        for name in self.phases:
            if not re.fullmatch(r"[A-Za-z0-9_]+", name):
                raise ValueError(f"phase name '{name}' may hold letters, digits and underscores only")
        return self

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that loads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that change with any value of the configuration."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the floats of YAML 1.2 (``1e-4`` is a number) and without its silence about a key given twice."""

    yaml_implicit_resolvers: ClassVar = {first: list(rules) for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; raises ConstructorError for a key that stands in it twice."""
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key.value}' is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(
        path.name.removesuffix(".yaml") for path in resources.files("fastcm.configs").iterdir() if path.name.endswith(".yaml")
    )


def load_config(name: str, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Read a configuration: a shipped name or a YAML file, then ``key.path=value`` overrides.

    Raises ConfigError naming the file and key, the value found and what was expected.
    """
    data = _read_with_base(name)
    for override in overrides:
        _apply_override(data, override)
    return parse_config(data, name)


def parse_config(data: dict[str, Any], origin: str) -> Config:
    """Validate plain data into a Config; ``origin`` names the source in messages."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(_explain(data, dict(issue)) for issue in error.errors())) from None


def _explain(data: Any, issue: dict[str, Any]) -> str:
    """One validation error as "key.path: what is wrong (got value)"; union tags, which are no keys, are left out."""
    path = []
    for part in issue["loc"]:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if inside or issue["type"] == "missing":
            path.append(str(part))
            data = data[part] if inside else {}
    message = issue["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(issue["input"], dict) else f" (got {issue['input']!r})"
    return f"{'.'.join(path) or 'top level'}: {message}{shown}"


def _read_with_base(name: str) -> dict[str, Any]:
    data = _read_yaml(name)
    base = data.pop("base", None)
    if base is None:
        return data
    sibling = Path(name).parent / str(base)
    parent = _read_yaml(str(sibling) if sibling.is_file() else str(base))
    if "base" in parent:
        raise ConfigError(f"{name}: its base '{base}' has a base of its own; one level is allowed")
    return _merge(parent, data)


def _read_yaml(name: str) -> dict[str, Any]:
    if Path(name).is_file():
        text = _read_text(Path(name))
    elif name in shipped_configs():
        text = resources.files("fastcm.configs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    else:
        near = difflib.get_close_matches(name, shipped_configs(), n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"no configuration '{name}': {hint}give a YAML file or one of {', '.join(shipped_configs())}")
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: expected 'key: value' lines at the top level, found {type(data).__name__}")
    return data


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """Child over parent, section by section; ``null`` removes what the parent has."""
    merged = dict(parent)
    for key, value in child.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if both else value
    return {key: value for key, value in merged.items() if value is not None}


def _apply_override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override '{override}': expected key.path=value")
    *sections, key = path.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override '{override}': '{section}' is a value, not a section")
    try:
        data[key] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': not valid YAML: {' '.join(str(error).split())}") from None
