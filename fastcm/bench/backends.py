"""The contestants of every op: our kernel, the PyTorch reference eager and compiled, and what others offer.

All take the arguments of the op's reference by name. This is the one place that knows how a baseline is called.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastcm.bench.cases import Case, Problem
from fastcm.kernels.attention import attention_xformers, xformers_unavailable
from fastcm.kernels.consistency_loss import derivatives as loss_derivatives
from fastcm.kernels.consistency_loss.derivatives import Denoiser, Target
from fastcm.kernels.group_norm import derivatives as norm_derivatives
from fastcm.kernels.group_norm.call import Call, Tangents
from fastcm.kernels.group_norm.registration import checked_call
from fastcm.kernels.philox import PhiloxKey, random_bits
from fastcm.kernels.runtime.fallback import unavailable

FOLDERS = {name: name for name in ("group_norm", "attention", "consistency_loss", "optimizer")} | {"add_noise": "noise"}
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
# Where one of these raises, the installation or the shape is to blame, and the row says so; ours and PyTorch's must run.
OPTIONAL = {*SDPA, "xformers", "apex"}

Thunk = Callable[[], tuple[Tensor, ...]]


class Backend(NamedTuple):
    """A way to compute an op: its forward, a JVP of its own if it has one, and why it cannot run here (None: it can)."""

    name: str
    run: Callable[..., Any]
    jvp: Callable[[Problem], Any] | None = None
    unavailable: str | None = None


def backends(case: Case, device: torch.device) -> list[Backend]:
    """All contestants of a case, ours first."""
    op = case.op
    plain = reference(op)
    rows = [
        Backend("triton", partial(_public, op), partial(_explicit_jvp, op), unavailable(device)),
        Backend("torch", plain, _sdpa_math_jvp if op == "attention" else None),
        _compiled(plain, op),
    ]
    if op == "attention":
        rows += [Backend(name, partial(with_sdpa, kind), unavailable=_no_sdpa_jvp(case, kind)) for name, kind in SDPA.items()]
        rows.append(Backend("xformers", attention_xformers, unavailable=_no_xformers(case, device)))
    if op == "group_norm":
        rows.append(Backend("apex", _apex_group_norm, unavailable=_no_apex(case, device)))
    return rows


def names() -> list[str]:
    """Every name that ``--backend`` takes."""
    return ["triton", "torch", "compile", *SDPA, "xformers", "apex", "fused"]


def reference(op: str) -> Callable[..., Any]:
    """The plain PyTorch truth of an op."""
    return getattr(import_module(f"fastcm.kernels.{FOLDERS[op]}.reference"), op)


def prepare(backend: Backend, problem: Problem, direction: str) -> Thunk:
    """A call that computes one pass of one problem: the results, the gradients, or results and tangents.

    The forward that a backward pass needs has run when this returns.
    """
    if direction == "fwd":
        return partial(_forward, backend, problem)
    if direction == "jvp":
        _load_forward_mode()
        return partial(_flat, backend.jvp or partial(automatic_jvp, backend.run), problem)
    leaves = {name: problem.tensors[name].detach().requires_grad_() for name in problem.differentiable}
    # A compiled backward that runs many times must not give its saved tensors away.
    with torch._functorch.config.patch(donated_buffer=False):
        result = _flat(backend.run, **(problem.tensors | leaves), **problem.options)[0]
    return partial(torch.autograd.grad, result, list(leaves.values()), problem.cotangent.to(result.dtype), retain_graph=True)


def _forward(backend: Backend, problem: Problem) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return _flat(backend.run, **problem.tensors, **problem.options)


def _flat(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """What a function returns, as a tuple of tensors; a result that was not asked for (None) is left out."""
    result = function(*args, **kwargs)
    return (result,) if isinstance(result, Tensor) else tuple(value for value in result if value is not None)


def automatic_jvp(function: Callable[..., Any], problem: Problem) -> tuple[Tensor, Tensor]:
    """Result and tangent by PyTorch's forward-mode differentiation."""
    moved = list(problem.tangents)

    def call(*values: Tensor) -> Tensor:
        return function(**(problem.tensors | dict(zip(moved, values, strict=True))), **problem.options)

    with torch.no_grad():
        primals = tuple(problem.tensors[name] for name in moved)
        return torch.func.jvp(call, primals, tuple(problem.tangents.values()))


@cache
def _load_forward_mode() -> None:
    """PyTorch's rules load at first use and then warn of PyTorch's own use of torch.jit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import_module("torch._decomp.decompositions_for_jvp")


def _public(op: str, **arguments: Any) -> Any:
    return getattr(import_module(f"fastcm.kernels.{FOLDERS[op]}"), op)(**arguments)


def _explicit_jvp(op: str, problem: Problem) -> Any:
    """The registered JVP op: a tangent has the name of what it belongs to with a t in front."""
    function = getattr(import_module(f"fastcm.kernels.{FOLDERS[op]}"), f"{op}_jvp")
    tangents = {f"t{name}": value for name, value in problem.tangents.items()}
    return function(**problem.tensors, **tangents, **problem.options)


def _compiled(plain: Callable[..., Any], op: str) -> Backend:
    """torch.compile of the reference, and of the JVP as a plain formula: it cannot trace forward-mode differentiation."""
    options = {"fullgraph": True, "dynamic": False}
    run = torch.compile(plain, **options)
    if op not in JVP_FORMULAS:
        return Backend("compile", run)
    arguments, formula = JVP_FORMULAS[op]
    compiled = torch.compile(formula, **options)

    def jvp(problem: Problem) -> Any:
        with torch.no_grad():
            return compiled(*arguments(problem))

    return Backend("compile", run, jvp)


def _group_norm_arguments(problem: Problem) -> tuple[Call, Tangents]:
    tensors, options, tangents = problem.tensors, problem.options, problem.tangents
    rows = [tensors.get(name) for name in ("addend_NC", "scale_NC", "shift_NC")]
    head = (tensors["x_NCHW"], options["num_groups"], tensors["weight_C"], tensors["bias_C"], options["eps"])
    dropout = (options.get("dropout", 0.0), options.get("dropout_key"))
    moved = [tangents.get(name) for name in ("x_NCHW", "addend_NC", "scale_NC", "shift_NC")]
    return checked_call(*head, *rows, options["silu"], *dropout), Tangents(*moved)


def _attention_arguments(problem: Problem) -> tuple[Tensor, Tensor, int]:
    return problem.tensors["qkv_NCHW"], problem.tangents["qkv_NCHW"], problem.options["num_heads"]


def _attention_formula(qkv_NCHW: Tensor, tqkv_NCHW: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """tS = (tq k^T + q tk^T) / sqrt(D), to = P tv + (P (tS - rowsum(P tS))) v; arXiv 2410.11081, appendix F.

    The products are in the dtype of qkv, as on matrix units, unlike those of the kernel's own fp32 derivative.
    """
    n, channels, height, width = qkv_NCHW.shape
    parts = [x.permute(0, 2, 3, 1).reshape(n, -1, 3, num_heads, channels // 3 // num_heads) for x in (qkv_NCHW, tqkv_NCHW)]
    (q, k, v), (tq, tk, tv) = ([part.transpose(1, 2) for part in x.unbind(2)] for x in parts)
    scale = q.shape[-1] ** -0.5
    P = torch.softmax((q @ k.mT).float() * scale, dim=-1)
    H = P * ((tq @ k.mT).float() + (q @ tk.mT).float()) * scale
    H = H - P * H.sum(-1, keepdim=True)
    out, tout = P.to(v.dtype) @ v, P.to(v.dtype) @ tv + H.to(v.dtype) @ v
    back = [x.transpose(1, 2).reshape(n, height, width, channels // 3).permute(0, 3, 1, 2) for x in (out, tout)]
    return back[0], back[1]


def _loss_arguments(problem: Problem) -> tuple[Any, ...]:
    tensors, tangents = problem.tensors, problem.tangents
    at_t, at_r = (Denoiser(*(tensors[f"{name}_{at}"] for name in Denoiser._fields)) for at in "tr")
    target = Target(tensors["clean"], at_r, tensors["boundary_N"])
    moved = loss_derivatives.Tangents(tangents["F_t"], tangents["x_t"], None)
    return moved, at_t, target, tensors["weight_N"], problem.options["distance"], 0.0


# The arguments of a JVP in closed form, and that form in plain PyTorch.
JVP_FORMULAS: dict[str, tuple[Callable[[Problem], tuple[Any, ...]], Callable[..., Any]]] = {
    "group_norm": (_group_norm_arguments, norm_derivatives.jvp),
    "attention": (_attention_arguments, _attention_formula),
    "consistency_loss": (_loss_arguments, loss_derivatives.jvp),
}


def with_sdpa(kind: SDPBackend, **arguments: Any) -> Tensor:
    """The attention reference on one of PyTorch's kernels, layout copies included where it needs them."""
    with sdpa_kernel(kind):
        return reference("attention")(**arguments)


def _sdpa_math_jvp(problem: Problem) -> Any:
    """PyTorch's fused attention kernels have no forward mode; the plain one has."""
    return automatic_jvp(partial(with_sdpa, SDPBackend.MATH), problem)


def _no_sdpa_jvp(case: Case, kind: SDPBackend) -> str | None:
    return "no forward-mode derivative in PyTorch" if case.direction == "jvp" and kind != SDPBackend.MATH else None


def _no_xformers(case: Case, device: torch.device) -> str | None:
    if case.direction == "jvp":
        return "xformers has no forward-mode derivative"
    return xformers_unavailable(device, case.dtype)


def _no_apex(case: Case, device: torch.device) -> str | None:
    if find_spec("apex") is None or find_spec("group_norm_cuda") is None:
        return "NVIDIA apex is not installed with its group norm"
    if device.type != "cuda":
        return "NVIDIA apex needs CUDA"
    return "NVIDIA apex has no forward-mode derivative" if case.direction == "jvp" else None


def _apex_group_norm(x_NCHW: Tensor, num_groups: int, weight_C: Tensor, bias_C: Tensor, eps: float, **extra: Any) -> Tensor:
    """NVIDIA apex's kernel with SiLU where it can be fused; what it does not know is plain PyTorch around it."""
    from apex.contrib.group_norm.group_norm import cuda_group_norm_nhwc_one_pass, cuda_group_norm_nhwc_two_pass

    addend, scale, shift = (extra.get(name) for name in ("addend_NC", "scale_NC", "shift_NC"))
    silu = "silu" if extra["silu"] and scale is None else ""
    norm = cuda_group_norm_nhwc_one_pass if x_NCHW.shape[2] * x_NCHW.shape[3] <= 1024 else cuda_group_norm_nhwc_two_pass
    y = norm(x_NCHW if addend is None else x_NCHW + addend[:, :, None, None], num_groups, weight_C, bias_C, eps, silu)
    if scale is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        y = torch.nn.functional.silu(y) if extra["silu"] else y
    p = extra.get("dropout", 0.0)
    return y if not p else torch.where(_bits_like(y, extra["dropout_key"]) >= round(p * 2**32), y / (1 - p), 0)


def _bits_like(x_NCHW: Tensor, key: PhiloxKey) -> Tensor:
    n, channels, height, width = x_NCHW.shape
    return random_bits(key, height * width * channels).reshape(n, height, width, channels).permute(0, 3, 1, 2)
