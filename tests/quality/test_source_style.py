"""Sizes, annotations and docstrings."""

import ast
from statistics import median

import pytest
from source_tree import Function, Source, source_of, sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_TRITON_LINES = 100
MEDIAN_FUNCTION_LINES = 10
MIN_ANNOTATED = 0.95

PACKAGE = ("fastcm", "kernels")
ALL = (*PACKAGE, "benchmarks", "setup.py")

# Public functions of these places are the mathematics: their tensors carry shapes.
MATHEMATICS = ("fastcm/diffusion", "fastcm/random.py", "fastcm/ops.py", "fastcm/evaluate/frechet.py", "kernels")
SHAPED = {"Float", "Float32", "Float64", "Int64", "Int32", "Int", "Integer", "Bool", "UInt8", "Num", "Real", "Shaped"}


def length(function: Function) -> int:
    return function.end_lineno - function.lineno + 1


def limit(function: Function) -> int:
    """A Triton kernel may be longer than a function."""
    return MAX_TRITON_LINES if is_triton(function) else MAX_FUNCTION_LINES


def is_triton(function: Function) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def too_long(source: Source) -> list[str]:
    lines = len(source.text.splitlines())
    found = [f"{source.path}: {lines} lines"] if lines > MAX_FILE_LINES else []
    long = [function for function in source.functions() if length(function) > limit(function)]
    return found + [f"{source.at(function)} {function.name}: {length(function)} lines" for function in long]


def unannotated(source: Source) -> tuple[int, list[str]]:
    """The number of arguments, and those without an annotation; self, cls and what Triton compiles do not count."""
    total, missing = 0, []
    for function in source.functions():
        if is_triton(function):
            continue
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
        counted = [argument for argument in every if argument and argument.arg not in ("self", "cls")]
        total += len(counted)
        missing += [f"{source.at(function)} {argument.arg}" for argument in counted if argument.annotation is None]
    return total, missing


def is_public(name: str) -> bool:
    return not any(word.startswith("_") for word in name.split("."))


def undocumented(source: Source) -> list[str]:
    found = [] if ast.get_docstring(source.tree) else [f"{source.path}: the module"]
    public = [(name, node) for name, node in source.definitions() if is_public(name)]
    return found + [f"{source.at(node)} {name}" for name, node in public if not ast.get_docstring(node)]


def bare_tensors(source: Source) -> list[str]:
    """Arguments and results of public functions annotated as Tensor or ndarray without a shape."""
    found = []
    for name, node in source.definitions():
        if is_public(name) and isinstance(node, Function):
            hints = [*(argument.annotation for argument in ast.walk(node.args) if isinstance(argument, ast.arg)), node.returns]
            found += [f"{source.at(node)} {name}: {ast.unparse(hint)}" for hint in hints if hint and has_bare_tensor(hint)]
    return found


def has_bare_tensor(hint: ast.expr) -> bool:
    if isinstance(hint, ast.Subscript) and ast.unparse(hint.value).split(".")[-1] in SHAPED | {"Callable"}:
        return False
    if isinstance(hint, ast.Name | ast.Attribute):
        return ast.unparse(hint).split(".")[-1] in ("Tensor", "ndarray")
    return any(map(has_bare_tensor, ast.iter_child_nodes(hint)))


def test_files_and_functions_are_short():
    assert [line for source in sources(*ALL) for line in too_long(source)] == []


def test_the_median_function_is_shorter_than_ten_lines():
    assert median(length(function) for source in sources(*ALL) for function in source.functions()) < MEDIAN_FUNCTION_LINES


def test_arguments_are_annotated():
    counts = [unannotated(source) for source in sources(*PACKAGE)]
    total, missing = sum(number for number, _ in counts), [line for _, lines in counts for line in lines]
    assert 1 - len(missing) / total >= MIN_ANNOTATED, missing


def test_everything_public_has_a_docstring():
    assert [line for source in sources(*ALL) for line in undocumented(source)] == []


def test_public_mathematics_carries_shapes():
    assert [line for source in sources(*MATHEMATICS) for line in bare_tensors(source)] == []


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (too_long, "x = 1\n" * 401),
        (too_long, "def f():\n" + "    x = 1\n" * 60),
        (too_long, "@triton.jit\ndef f():\n" + "    x = 1\n" * 100),
        (undocumented, "x = 1"),
        (undocumented, '"""Module."""\nclass C:\n    """Class."""\n    def f(self): ...'),
        (bare_tensors, "def f(x: Tensor) -> int: ..."),
        (bare_tensors, 'def f(x: Float[Tensor, "N"]) -> tuple[Tensor, int]: ...'),
        (bare_tensors, "def f(*, x: torch.Tensor | None = None) -> None: ..."),
    ],
)
def test_a_violation_is_noticed(rule, text):
    assert rule(source_of(text))


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (too_long, "@triton.jit\ndef f():\n" + "    x = 1\n" * 80),
        (undocumented, '"""Module."""\nclass _C:\n    def f(self): ...\ndef f():\n    """F."""\n    def g(): ...'),
        (bare_tensors, 'def f(x: Float[Tensor, "N"] | None, g: Callable[..., Tensor]) -> None: ...\ndef _g(x: Tensor): ...'),
    ],
)
def test_what_is_allowed_passes(rule, text):
    assert rule(source_of(text)) == []


def test_missing_annotations_are_counted():
    assert unannotated(source_of("class C:\n    def f(self, a, *b: int, c=1, **d): ..."))[0] == 4
    assert len(unannotated(source_of("class C:\n    def f(self, a, *b: int, c=1, **d): ..."))[1]) == 3


def test_warnings_are_errors(pytestconfig):
    assert pytestconfig.getini("filterwarnings")[0] == "error"
