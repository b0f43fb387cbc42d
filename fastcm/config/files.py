"""Configuration files: shipped or the user's, one optional ``base:``, dotted overrides, messages that name the key."""

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from fastcm.config.run import Config
from fastcm.errors import ConfigError


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
    """Read a configuration: a shipped name or a YAML file, then ``key.path=value`` overrides; ``null`` removes what is there.

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
    if not text.strip():  # perhaps a variable of the shell that is not set
        raise ConfigError(f"override '{override}': give a value, null to remove what is there, or '' for an empty text")
    *sections, key = path.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override '{override}': '{section}' is a value, not a section")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': not valid YAML: {' '.join(str(error).split())}") from None
    if value is None and key in data:
        del data[key]
    else:  # null for a key that is not there is for its type to judge
        data[key] = value
