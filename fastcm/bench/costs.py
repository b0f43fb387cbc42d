"""The least a case must move and compute, from the cost model that lies beside each kernel."""

from importlib import import_module
from typing import Any

from fastcm.bench.backends import FOLDERS
from fastcm.bench.cases import BOUNDARY_EVERY, PASSES, Case
from fastcm.kernels.runtime.cost import Cost


def case_cost(case: Case) -> Cost:
    """Bytes and operations of one call."""
    return COSTS[case.op](case)


def _model(case: Case, **sizes: Any) -> Cost:
    """The cost model of the op's pass with these sizes."""
    return getattr(import_module(f"fastcm.kernels.{FOLDERS[case.op]}.cost"), PASSES[case.direction])(**sizes)


def _add_noise(case: Case) -> Cost:
    elements = case.shape.channels * case.shape.resolution**2
    return _model(case, num=case.batch, elements=elements, levels=2, clean_bytes=4, input_bytes=case.dtype.itemsize)


def _group_norm(case: Case) -> Cost:
    shape = case.shape
    sizes = {"num": case.batch, "channels": shape.channels, "pixels": shape.resolution**2, "itemsize": case.dtype.itemsize}
    return _model(case, **sizes, num_groups=shape.num_groups, rows=shape.addend + 2 * shape.film)


def _attention(case: Case) -> Cost:
    return _model(case, num=case.batch, **case.shape._asdict(), itemsize=case.dtype.itemsize)


def _consistency_loss(case: Case) -> Cost:
    elements = case.shape.channels * case.shape.resolution**2
    clean_rows = -(-case.batch // BOUNDARY_EVERY)
    return _model(case, num=case.batch, elements=elements, network_bytes=case.dtype.itemsize, clean_rows=clean_rows)


def _optimizer(case: Case) -> Cost:
    """One average, and a low-precision copy unless everything is fp32; gradients are fp32."""
    from fastcm.kernels.optimizer.cost import step_cost

    return step_cost(case.shape.num_parameters, 1, copy_itemsize=0 if case.dtype.itemsize == 4 else case.dtype.itemsize)


COSTS = {
    "group_norm": _group_norm,
    "attention": _attention,
    "consistency_loss": _consistency_loss,
    "add_noise": _add_noise,
    "optimizer": _optimizer,
}
