"""Reader of tests/golden: numbers computed with the official implementations on small random networks."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    """One golden case; ``weights`` is the fp32 state dict under the official names, without the leading "model."."""

    config: dict
    tolerance: dict
    tensors: dict[str, Tensor]
    name_lists: dict[str, list[str]]
    weights: dict[str, Tensor]

    def close(self, actual: Tensor, name: str) -> None:
        """Assert that ``actual`` equals the stored tensor within the case's tolerance."""
        torch.testing.assert_close(
            actual.double(), self.tensors[name].double(), rtol=self.tolerance["rtol"], atol=self.tolerance["atol"]
        )


@lru_cache
def _index() -> dict[str, dict]:
    return {entry["case"]: entry for entry in json.loads((GOLDEN / "index.json").read_text())["cases"]}


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    floats = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    return {name.removeprefix("sd/").removeprefix("model."): value for name, value in floats.items() if name.startswith("sd/")}


def case_names(prefix: str) -> list[str]:
    """The names of all cases that begin with ``prefix``."""
    return sorted(name for name in _index() if name.startswith(prefix))


@lru_cache
def load_case(name: str) -> Case:
    """Read one case and the weights it uses (its own, or those of its ``weights_case``)."""
    entry = _index()[name]
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    source = load_file(GOLDEN / f"{entry['weights_case']}.safetensors") if entry.get("weights_case") else tensors
    return Case(entry["config"], entry["tolerance"], tensors, entry.get("name_lists", {}), _weights(source))
