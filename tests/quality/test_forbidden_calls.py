"""No global random numbers, no unpickling, no printing, no evaluated text."""

import ast
import re
from collections.abc import Iterator

import pytest
from source_tree import Source, source_of, sources

# Names that draw from, seed or replace a global generator. Randomness comes from fastcm.random.Stream only.
RANDOM = re.compile(
    r"torch\.(manual_seed|seed|initial_seed|[gs]et_rng_state|default_generator|Generator|rand\w*|normal|bernoulli|multinomial|poisson"
    r"|binomial|\w*dropout_?|random(\.\w+)*|distributions(\.\w+)*|(cuda|mps|xpu)\.(manual_seed\w*|seed\w*|\w*rng_state\w*))"
    r"|torch\.nn\.(\w*Dropout\w*|functional\.\w*dropout\w*|functional\.gumbel_softmax|init(\.\w+)*)"
    # These constructors draw their first weights from the global generator.
    r"|torch\.nn\.(Linear|Bilinear|Lazy\w+|(Lazy)?Conv\w+|Embedding\w*|RNN\w*|LSTM\w*|GRU\w*|Transformer\w*|MultiheadAttention)"
    r"|numpy\.random(\.\w+)*|random(\.\w+)*|secrets(\.\w+)*|os\.urandom"
)
RANDOM_METHODS = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_"}
RANDOM_METHODS |= {"multinomial", "reset_parameters", "manual_seed"}

UNPICKLING = re.compile(
    r"torch\.(load|package(\.\w+)*|hub(\.\w+)*)|(c?[pP]ickle|cloudpickle|dill|joblib|shelve|marshal|copyreg)(\.\w+)*"
)
EVALUATING = {"eval", "exec", "compile", "__import__", "breakpoint"}

ALLOWED: dict[tuple[str, str], str] = {}


def aliases(source: Source) -> dict[str, str]:
    """What each imported name stands for: {"F": "torch.nn.functional"}."""
    names = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted_name(node: ast.AST, names: dict[str, str]) -> str | None:
    """``np.random.rand`` as "numpy.random.rand"; None where the chain does not begin at an imported name."""
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value, names)
        return base and f"{base}.{node.attr}"
    return names.get(node.id) if isinstance(node, ast.Name) else None


def forbidden(source: Source) -> Iterator[tuple[str, str]]:
    """(kind, where) of everything in a file that no file may do."""
    names = aliases(source)
    for node in ast.walk(source.tree):
        for kind in kinds(node, dotted_name(node, names)):
            yield kind, f"{source.at(node)} {ast.unparse(node)}"


def kinds(node: ast.AST, name: str | None) -> Iterator[str]:
    if name and RANDOM.fullmatch(name):
        yield "global random numbers"
    if name and UNPICKLING.fullmatch(name):
        yield "unpickling"
    if not isinstance(node, ast.Call):
        return
    if isinstance(node.func, ast.Attribute) and node.func.attr in RANDOM_METHODS:
        yield "global random numbers"
    if isinstance(node.func, ast.Name) and node.func.id == "print":
        yield "printing"
    if isinstance(node.func, ast.Name) and node.func.id in EVALUATING:
        yield "evaluated text"
    if any(keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False" for keyword in node.keywords):
        yield "unpickling"


@pytest.mark.parametrize("source", sources("fastcm", "kernels"), ids=lambda source: source.path)
def test_package_file_does_nothing_forbidden(source):
    assert [where for kind, where in forbidden(source) if (source.path, kind) not in ALLOWED] == []


@pytest.mark.parametrize("source", sources("benchmarks", "setup.py"), ids=lambda source: source.path)
def test_other_file_may_print_and_draw_as_a_plain_baseline_does_but_no_more(source):
    assert [where for kind, where in forbidden(source) if kind not in ("printing", "global random numbers")] == []


def test_exceptions_are_still_needed():
    assert set(ALLOWED) <= {(source.path, kind) for source in sources("fastcm", "kernels") for kind, _ in forbidden(source)}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("global random numbers", "import torch\ntorch.manual_seed(0)"),
        ("global random numbers", "import torch\nx = torch.randn(3)"),
        ("global random numbers", "import torch\nf = torch.randperm"),
        ("global random numbers", "from torch import rand_like as r\nr(x)"),
        ("global random numbers", "from torch import nn\nnn.Dropout(0.1)"),
        ("global random numbers", "from torch import nn\nnn.init.normal_(w)"),
        ("global random numbers", "from torch import nn\nnn.Conv2d(1, 1, 3)"),
        ("global random numbers", "import torch.nn.functional as F\nF.dropout(x, 0.1)"),
        ("global random numbers", "x.normal_()"),
        ("global random numbers", "import numpy as np\nnp.random.default_rng(0)"),
        ("global random numbers", "from numpy import random\nrandom.rand()"),
        ("global random numbers", "import random\nrandom.shuffle(x)"),
        ("global random numbers", "def f():\n    from random import choice\n    return choice(x)"),
        ("unpickling", "import torch\ntorch.load(path)"),
        ("unpickling", "from pickle import loads\nloads(b)"),
        ("unpickling", "import numpy as np\nnp.load(path, allow_pickle=True)"),
        ("printing", "print(1)"),
        ("evaluated text", "eval('1')"),
    ],
)
def test_a_violation_is_noticed(kind, text):
    assert kind in dict(forbidden(source_of(text)))


@pytest.mark.parametrize(
    "text",
    [
        "from fastcm import random\nrandom.Stream(0, 'noise').normal(index)",
        "from fastcm.random import Stream\nStream(0, 'labels').bernoulli(index, 0.5).uniform(index)",
        "import torch\nmodel.eval()\ntorch.compile(f)\nimport re\nre.compile('x')",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "from torch import nn\nnn.Module(), nn.Parameter(x), nn.functional.conv2d(x, w)",
    ],
)
def test_what_is_allowed_passes(text):
    assert list(forbidden(source_of(text))) == []
