"""One adversarial step of CTM with the feature networks that are published, their weights random, on the CPU."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_ctm import adversarial_config

from fastcm.config import parse_config
from fastcm.data.dataset import ResidentDataset
from fastcm.random import Stream
from fastcm.train.phase import Phase
from fastcm.train.preflight import check_phases

NAMES = ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0")
CPU = torch.device("cpu")


@pytest.mark.slow
def test_both_published_networks_load_from_files_and_train_both_sides(tmp_path):
    sources = {}
    for name in NAMES:
        sources[name] = str(tmp_path / f"{name}.safetensors")
        save_file(timm.create_model(name, pretrained=False).state_dict(), sources[name])
    config = adversarial_config(gan={"start_images": 0, "width": 64, "augment": True}, dsm="fixed")
    config["features"] = {"discriminator": sources, "dtype": "bfloat16"}
    config["phases"]["distill"] |= {"batch_size": 2, "duration_images": 8}
    config = parse_config(config, "tiny")
    pixels = Stream(0, "pixels").integers(torch.arange(4), 256, (8, 8, 3)).to(torch.uint8)
    data = ResidentDataset(pixels, None, 0, "pixels", "pixels")
    check_phases(config, data, "pretrain")
    before = Phase(config, "pretrain", data, CPU, 0)
    before.start(None)
    phase = Phase(config, "distill", data, CPU, 64)
    phase.start(before.averaged_weights())
    discriminator = phase.adversary.discriminator
    assert discriminator.names == NAMES
    assert discriminator.num_logits == 2 * 4 * 16
    student, heads = ({n: p.clone() for n, p in net.named_parameters()} for net in (phase.model.net, discriminator.heads))
    frozen = {name: value.clone() for name, value in discriminator.features.state_dict().items() if value.numel() < 10_000}
    phase.step()
    assert all(torch.equal(p, heads[name]) for name, p in discriminator.heads.named_parameters())
    assert any(not torch.equal(p, student[name]) for name, p in phase.model.net.named_parameters())
    student = {name: p.clone() for name, p in phase.model.net.named_parameters()}
    phase.step()
    assert all(torch.equal(p, student[name]) for name, p in phase.model.net.named_parameters())
    changed = [name for name, p in discriminator.heads.named_parameters() if not torch.equal(p, heads[name])]
    assert {name.split(".")[0] for name in changed} == {"0", "1"}
    after = discriminator.features.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    losses = phase.adversary.read()
    assert losses.keys() == {"generator_loss", "discriminator_loss"}
    assert all(torch.tensor(value).isfinite() for value in losses.values())
    assert phase.meter.read()["skipped_steps"] == 0
