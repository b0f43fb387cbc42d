"""A training step replayed as a CUDA graph is the step itself: on a CPU with recorded operators, on a GPU with real graphs."""

import pytest
import torch
from conftest import run_cli
from recorded_calls import OperatorRecorder
from test_ctm import GAN
from test_training import TINY

from fastcm.config import parse_config
from fastcm.data.dataset import load_resident
from fastcm.data.sources import open_source
from fastcm.graphs import WARMUP_CALLS, CudaRecorder
from fastcm.kernels.optimizer import reference
from fastcm.objectives import consistency
from fastcm.train import phase as phase_module
from fastcm.train.phase import Phase, graph_recorder

BATCH = 8
CTM = {"kind": "ctm", "num_levels": 8, "max_solver_steps": 3, "distance": "squared"}
CASES = {
    "edm": {"phase": {"objective": {"kind": "edm"}, "dropout": 0.1, "augment": 0.2}, "conditional": True},
    "ect": {"phase": {"objective": {"kind": "ect", "double_images": 4 * BATCH, "max_stage": 2}, "dropout": 0.1}},
    "microbatches": {"phase": {"objective": {"kind": "ect"}, "microbatch_size": 2, "dropout": 0.1}},
    "cd": {"phase": {"objective": {"kind": "cd", "distance": "l1"}}, "conditional": True},
    "ct": {"phase": {"objective": {"kind": "ct", "distance": "squared", "end_scales": 20}}},
    "pd": {"phase": {"objective": {"kind": "pd", "start_steps": 4, "stage_images": 5 * BATCH}, "optimizer": {"lr": 1e-3}}},
    "edm2": {
        "phase": {"objective": {"kind": "edm", "uncertainty": True}},
        "network": {"family": "edm2", "model_channels": 32, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4],
                    "logvar_channels": 16},
    },
    "ctm": {"phase": {"objective": CTM, "microbatch_size": 4}, "second_time": True, "conditional": True},
    "ctm_self": {"phase": {"objective": {**CTM, "x_u": "self", "dsm": "none"}}, "second_time": True},
    "ctm_gan": {"phase": {"objective": {**CTM, "gan": {**GAN["gan"], "start_images": 3 * BATCH}}}, "second_time": True},
}  # fmt: skip
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def config_of(case, device, **compute):
    """A phase of fresh weights, which are the teacher's, and the phase of the case."""
    optimizer = {"kind": "radam", "lr": 1e-3, "warmup_images": 2 * BATCH, "cooldown_images": 40 * BATCH}
    power = {"fast": {"halflife_images": 10}, "slow": {"kind": "power", "std": 0.1}}
    sizes = {"duration_images": 100 * BATCH, "batch_size": BATCH}
    network = {**case.get("network", TINY["network"]), **({"second_time": True} if case.get("second_time") else {})}
    return parse_config(
        {
            "data": {"kind": "digits", "conditional": case.get("conditional", False), "xflip": True},
            "network": network,
            "phases": {
                "before": {"objective": {"kind": "edm"}, **sizes},
                "phase": {"optimizer": optimizer, "emas": power, **sizes, **case["phase"]},
            },
            "compute": {"device": device, "compile": "off", **compute},
            "features": GAN["features"],
        },
        "tiny",
    )


def phase_of(name, device, recorder, monkeypatch, **compute):
    monkeypatch.setattr(phase_module, "graph_recorder", lambda config, device: recorder)
    # On a CPU some look at numbers, which costs nothing there; a device must not be asked.
    for module in (reference, consistency):
        monkeypatch.setattr(module, "on_cpu", lambda value: False)
    config, device = config_of(CASES[name], device, **compute), torch.device(device)
    data = load_resident(open_source("digits", "", labels=config.data.conditional), device=device)
    before = Phase(config, "before", data, device, 0)
    before.start(None)
    phase = Phase(config, "phase", data, device, 0)
    phase.start(before.averaged_weights())
    return phase


def state_of(phase):
    return {name: value.detach().cpu().clone() for name, value in phase.tensors().items()}


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_equal_plain_ones_bit_for_bit(name, monkeypatch):
    recorder = OperatorRecorder()
    plain, graphed = phase_of(name, "cpu", None, monkeypatch), phase_of(name, "cpu", recorder, monkeypatch)
    for _ in range(2 * WARMUP_CALLS + 8):
        plain.step()
        graphed.step()
    assert recorder.num_replayed > recorder.num_recorded > 0
    assert num_recorded(graphed) == ((1, 1) if name == "ctm_gan" else (1, 0))
    assert differing(state_of(plain), state_of(graphed)) == []
    assert plain.meter.read() == graphed.meter.read()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize(("name", "compiled"), [*((name, "off") for name in CASES), ("ect", "on"), ("ctm_gan", "on")])
def test_replayed_steps_equal_plain_ones_on_a_gpu(name, compiled, monkeypatch):
    recorder = CudaRecorder(torch.device("cuda"))
    plain, graphed = (phase_of(name, "cuda", each, monkeypatch, compile=compiled) for each in (None, recorder))
    for _ in range(4 * WARMUP_CALLS):
        plain.step()
        graphed.step()
    # From here on every turn is replayed: what the steps change, they change alike.
    before, recorded = state_of(plain), num_recorded(graphed)
    assert recorded == ((1, 1) if name == "ctm_gan" else (1, 0))
    for _ in range(5):
        plain.step()
        graphed.step()
    assert num_recorded(graphed) == recorded
    one, other = state_of(plain), state_of(graphed)
    for key, value in one.items():
        change, difference = (value.double() - before[key].double()).norm(), (other[key].double() - value.double()).norm()
        assert difference <= 1e-2 * change + 1e-6 * value.double().norm(), f"{key}: {difference} of {change}"


def num_recorded(phase):
    """Recordings of the student's turn and of the discriminator's."""
    turns = phase._student_step, phase._discriminator_step
    return tuple(sum(recording.replay is not None for recording in turn._recordings.values()) for turn in turns)


def test_one_recording_serves_every_number_of_solver_steps(monkeypatch):
    recorder = OperatorRecorder()
    phase = phase_of("ctm", "cpu", recorder, monkeypatch)
    numbers = set()
    for _ in range(12):
        numbers.add(phase.objective.num_solver_steps(0, phase.images))
        phase.step()
    assert numbers == {1, 2, 3}
    assert recorder.num_recorded == 3  # what is drawn, a Heun step of the teacher, and the rest


def test_what_varies_reaches_a_recorded_step(monkeypatch):
    # Learning rate, decay of the averages and stage of the objective change after the recording; so do the images.
    recorder = OperatorRecorder()
    phase = phase_of("ect", "cpu", recorder, monkeypatch)
    seen = []
    for _ in range(12):
        seen.append((phase.learning_rate, *phase._ema_betas().tolist(), *phase.objective.schedule(phase.images).values()))
        phase.step()
    assert recorder.num_recorded == 1
    assert len(set(seen[WARMUP_CALLS:])) == len(seen[WARMUP_CALLS:])


def test_a_run_resumed_between_recorded_steps_goes_on_bit_for_bit(monkeypatch):
    whole = phase_of("ctm_gan", "cpu", OperatorRecorder(), monkeypatch)
    part = phase_of("ctm_gan", "cpu", OperatorRecorder(), monkeypatch)
    for _ in range(15):
        whole.step()
    for _ in range(9):
        part.step()
    resumed = phase_of("ctm_gan", "cpu", OperatorRecorder(), monkeypatch)
    resumed.load_tensors(state_of(part), part.images, phase_module.Path("saved"))
    for _ in range(6):
        resumed.step()
    assert differing(state_of(whole), state_of(resumed)) == []


def test_a_recorded_step_that_is_not_finite_changes_nothing(monkeypatch):
    phase = phase_of("ect", "cpu", OperatorRecorder(), monkeypatch)
    for _ in range(WARMUP_CALLS + 1):
        phase.step()
    phase.meter.read()
    before = state_of(phase)
    batch = phase.loader.batch
    monkeypatch.setattr(phase.loader, "batch", lambda first: with_nan(batch(first)))
    phase.step()
    assert differing(before, state_of(phase)) == ["meter"]
    assert phase.meter.read()["skipped_steps"] == 1


def with_nan(batch):
    batch.images[0, 0, 0, 0] = float("nan")
    return batch


@pytest.mark.parametrize("cuda_graph", ["auto", "off"])
def test_a_cpu_replays_nothing(cuda_graph):
    assert graph_recorder(config_of(CASES["ect"], "cpu", cuda_graph=cuda_graph), torch.device("cpu")) is None


def test_graphs_asked_for_on_a_cpu_are_refused_before_the_run_folder_is_touched(tmp_path):
    (tmp_path / "tiny.yaml").write_text(parse_config(TINY, "tiny").to_yaml())
    run = run_cli(tmp_path, "train", "tiny.yaml", "compute.cuda_graph=on", "--out", "run")
    assert run.returncode == 2
    assert "compute.cuda_graph is 'on', but a CPU has no graphs" in run.stderr
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.gpu
def test_a_gpu_replays_unless_it_is_told_not_to():
    device = torch.device("cuda")
    assert isinstance(graph_recorder(config_of(CASES["ect"], "cuda"), device), CudaRecorder)
    assert graph_recorder(config_of(CASES["ect"], "cuda", cuda_graph="off"), device) is None
