"""Other programs' checkpoints: every format is read exactly, and hostile or damaged files do nothing but give an error."""

import io
import sys
import tracemalloc

import checkpoint_files as files
import numpy as np
import pytest
import torch
from checkpoint_files import ARGUMENTS, INNER, STATE, WRITERS, write_as
from torch import nn

from fastcm.errors import CheckpointError
from fastcm.io.torch_files import find_modules, module_arguments, module_state, read_checkpoint
from fastcm.passive_pickle import Record

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]
# Those that have no storage class of their own.
DTYPES += [torch.uint16, torch.float8_e4m3fn]
MODULES = {
    name: "net" if "state" in name else "ema" for name in ("edm 2", "edm 4", "edm 5", "ect", "edm2", "state", "old state")
}


@pytest.fixture(autouse=True)
def no_official_module():
    yield
    assert not {"torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"} & set(sys.modules)


@pytest.mark.parametrize("writer", MODULES)
def test_module_of_every_format_gives_its_state_and_its_arguments(tmp_path, writer):
    modules = find_modules(read_checkpoint(WRITERS[writer](tmp_path / "file")))
    assert list(modules) == [MODULES[writer]]
    module = modules[MODULES[writer]]
    assert module.name == {"ect": "ECMPrecond", "edm2": "Precond"}.get(writer, "EDMPrecond")
    assert module_arguments(module) == ARGUMENTS
    inner = module.state["_modules"]["model"]
    assert (inner.name, module_arguments(inner)) == INNER["model"]
    assert module.state["sigma_data"] == 0.5
    assert inner.state["_modules"]["enc"].name == "ModuleDict"
    state = module_state(module)
    assert list(state) == list(STATE)
    for name, value in state.items():
        expected = STATE[name].half() if writer == "edm2" and STATE[name].is_floating_point() else STATE[name]
        assert torch.equal(value, expected)
        assert value.dtype == expected.dtype
        assert not value.requires_grad


def test_what_stands_beside_the_network_is_passive(tmp_path):
    content = read_checkpoint(WRITERS["ect"](tmp_path / "a.pkl"))
    assert content["dataset_kwargs"] == files.DATASET
    assert content["loss_fn"].name == "ECMLoss"
    assert content["loss_fn"].state["P_mean"] == -1.1
    # The bound method of the loss stays a name.
    method = content["loss_fn"].state["t_to_r"]
    assert (type(method), method.name, method.args[0].state is content["loss_fn"].state) == (Record, "getattr", True)
    assert content["augment_pipe"].state["taps"].tolist() == [1, 1, 1, 1]
    assert content["augment_pipe"].state["scale_std"] == 0.2
    content = read_checkpoint(WRITERS["edm2"](tmp_path / "b.pkl"))
    assert type(content) is dict
    assert content["encoder"].state["scale"].dtype == np.float32


def test_training_states_carry_the_optimizer(tmp_path):
    optimizer = read_checkpoint(WRITERS["state"](tmp_path / "a.pt"))["optimizer_state"]
    assert optimizer["param_groups"][0]["betas"] == (0.9, 0.999)
    assert optimizer["state"][0]["step"] == 1
    content = read_checkpoint(WRITERS["edm2 state"](tmp_path / "b.pt"))
    assert content["state"] == {"cur_nimg": 1024, "total_elapsed_time": 3.5}
    assert content["ema"]["stds"] == [0.05, 0.1]
    assert all(torch.equal(content["ema"]["emas"][1][name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict_comes_out_as_it_was(tmp_path, legacy):
    state = read_checkpoint(files.write_state_dict(tmp_path / "a.pt", STATE, legacy=legacy))
    assert list(state) == list(STATE)
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
    assert find_modules(state) == {}


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_strides_and_shared_storages_are_kept(tmp_path, dtype, form):
    base = (torch.arange(24) % 7).to(dtype).reshape(4, 6)
    content = {"base": base, "turned": base.T, "part": base[1:, ::2], "scalar": base[2, 3], "empty": base[:0], "dtype": dtype}
    content |= {"size": base.shape, "device": torch.device("cpu")}
    result = read_checkpoint(write_as(form, tmp_path / "a", content))
    for name in ("base", "turned", "part", "scalar", "empty"):
        assert torch.equal(result[name].to(torch.complex128), content[name].to(torch.complex128))
        assert result[name].dtype == dtype
        assert result[name].numel() == 0 or result[name].stride() == content[name].stride()
    assert (result["dtype"], result["size"]) == (dtype, base.shape)
    if form != "pickle":
        assert result["turned"].data_ptr() == result["base"].data_ptr()


def test_ordinary_modules_parameters_and_nested_tensors_are_read(tmp_path):
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.SiLU(), nn.Linear(3, 3, bias=False))
    module[0].register_buffer("passing", torch.ones(2), persistent=False)
    for form in ("zip", "legacy", "pickle"):
        record = read_checkpoint(write_as(form, tmp_path / form, module))
        assert find_modules(record) == {"": record}
        state = module_state(record)
        assert list(state) == list(module.state_dict())
        assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
        with pytest.raises(CheckpointError, match="Sequential was saved without its constructor's arguments"):
            module_arguments(record)


def test_torch_itself_reads_what_the_helper_writes(tmp_path):
    for legacy in (False, True):
        path = files.write_state_dict(tmp_path / "a.pt", STATE, legacy=legacy)
        assert torch.equal(torch.load(path, weights_only=True)["model.enc.8x8_conv.bias"], STATE["model.enc.8x8_conv.bias"])


def test_source_text_and_official_modules_on_the_path_are_never_run(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')\ndef _reconstruct_persistent_obj(meta): ...\nclass EasyDict(dict): ..."
    for name in ("torch_utils/persistence.py", "torch_utils/__init__.py", "dnnlib/util.py", "dnnlib/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    monkeypatch.setattr(files.Persistent, "source", code)
    for writer in ("edm 4", "edm2", "state", "old state"):
        path = WRITERS[writer](tmp_path / "file")
        monkeypatch.syspath_prepend(tmp_path)
        assert module_state(find_modules(read_checkpoint(path))[MODULES[writer]])
    assert not canary.exists()


def module_record(children: dict | None = None, **state) -> Record:
    return Record("m", "Net", state={"_parameters": {}, "_buffers": {}, "_modules": children or {}, **state})


def test_modules_that_contain_themselves_or_no_tensors_are_refused():
    circle = module_record()
    circle.state["_modules"]["again"] = circle
    wide = module_record()
    for _ in range(40):
        wide = module_record({"a": wide, "b": wide})
    for record in (circle, wide):
        with pytest.raises(CheckpointError, match="Net has too many parts within parts; does it contain itself"):
            module_state(record)
    with pytest.raises(CheckpointError, match=r"a\.weight is a int, expected a tensor"):
        module_state(module_record({"a": module_record(_parameters={"weight": 3})}))
    with pytest.raises(CheckpointError, match=r"a\.is no module"):
        module_state(module_record({"a": Record("m", "Other")}))
    with pytest.raises(CheckpointError, match=r"_buffers is no dict with names"):
        module_state(module_record(_buffers=[1]))
    with pytest.raises(CheckpointError, match=r"_parameters is no dict with names"):
        module_state(module_record(_parameters={"x" * 1000: torch.ones(1)}))


def test_large_files_are_read_without_a_second_copy(tmp_path):
    state = {f"layer{number}.weight": torch.zeros(1 << 21) for number in range(6)}
    for legacy in (False, True):
        path = files.write_state_dict(tmp_path / "a.pt", state, legacy=legacy)
        tracemalloc.start()
        read_checkpoint(path)
        # Storages are torch's own memory, which is not traced; the bytes of one of them may be there.
        assert tracemalloc.get_traced_memory()[1] < 30e6
        tracemalloc.stop()


def test_pickle_of_another_protocol_within_a_zip_is_read(tmp_path):
    path = files.write_torch(tmp_path / "a.pt", {"a": torch.ones(2)}, protocol=4)
    assert read_checkpoint(path)["a"].tolist() == [1, 1]
    stream = io.BytesIO()
    torch.save(torch.ones(3), stream, pickle_protocol=3, _use_new_zipfile_serialization=False)
    path.write_bytes(stream.getvalue())
    assert read_checkpoint(path).tolist() == [1, 1, 1]
