"""The run-time checks of shapes are on in the tests and nowhere else."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from fastcm import ops
from fastcm.diffusion.consistency import consistency_weight, t_to_r
from fastcm.diffusion.preconditioners import EDM
from fastcm.evaluate.frechet import frechet_distance
from fastcm.kernels.philox import philox4x32
from fastcm.nn.layers import Linear
from fastcm.random import Stream
from fastcm.sampling import sample_heun

INDEX = torch.arange(3)
IMAGES = torch.zeros(3, 4, 2, 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: t_to_r(torch.ones(3, 1), 0.5),
        lambda: consistency_weight(torch.ones(3), torch.zeros(4)),
        lambda: EDM(0.5).scalings(torch.ones(3, 1, 1, 1)),
        lambda: frechet_distance(np.zeros((4, 3)), np.zeros((4, 2))),
        lambda: philox4x32((INDEX.float(),) * 4, (0, 0)),
        lambda: Stream(0, "noise").normal(INDEX.float()),
        lambda: ops.attention(IMAGES[0], 1),
        lambda: ops.group_norm(IMAGES, 1, torch.ones(4), torch.zeros(3), 1e-5),
        lambda: Linear(3, 3, None).forward(torch.zeros(3)),
        lambda: sample_heun(lambda x, sigma: x, IMAGES[0], torch.tensor([1.0, 0.0], dtype=torch.float64)),
    ],
)
def test_a_wrong_shape_or_dtype_fails(call):
    with pytest.raises((TypeCheckError, ValueError)) as caught:
        call()
    assert caught.type is TypeCheckError


def test_right_shapes_pass():
    assert t_to_r(torch.ones(3), 0.5).shape == (3,)
    assert t_to_r(torch.ones(3, dtype=torch.float64), torch.tensor(0.5)).shape == (3,)


def test_a_compiled_function_is_left_alone():
    compiled = torch.compile(lambda t: t_to_r(t, 0.5), fullgraph=True, backend="eager")
    assert compiled(torch.ones(3)).shape == (3,)


def test_nothing_is_checked_outside_the_tests():
    code = "import sys; from fastcm.diffusion.consistency import t_to_r\n"
    code += "assert not hasattr(t_to_r, '__wrapped__') and 'beartype' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
