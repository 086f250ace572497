"""Training: interruption, fine-tuning, accumulation, several processes, agreement with torchvision."""

import copy
import csv
import os
import signal

import pytest
import torch
import torch.multiprocessing as mp
import torchvision
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from fastres.train import Interrupted, Recipe, cli, data, distributed, train
from fastres.train.finetune import load_backbone
from train.conftest import tiny

QUICK = {"data": "synthetic", "model": "resnet11", "epochs": 2, "batch": 16, "warmup": 0.5, "lr": 0.02}
TIMES = {"images_per_s", "seconds"}


def numbers(result):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in result.history]


def assert_same_weights(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert [k for k in want if not torch.equal(got[k], want[k])] == []


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_interrupted_and_resumed_gives_the_bits_of_uninterrupted(tiny_data, tmp_path, stop_after):
    """Three steps an epoch: stopped within the first epoch, between the epochs, and within the second."""
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    want = train(Recipe(**QUICK))
    recipe = Recipe(**QUICK, out=str(tmp_path))
    done = []

    def interrupt(progress):
        done.append(progress)
        if len(done) == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"stopped (after|in) epoch"):
        train(recipe, on_step=interrupt)
    assert len(done) == stop_after
    got = train(recipe, resume=True)
    assert numbers(got) == numbers(want)
    assert_same_weights(got.model, want.model)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_killed_run_goes_on_from_its_last_checkpoint(tiny_data, tmp_path):
    want = train(Recipe(**QUICK))
    recipe = Recipe(**QUICK, out=str(tmp_path), checkpoint_every=2)

    def die(progress):
        if (progress.epoch, progress.step) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, on_step=die)
    assert_same_weights(train(recipe, resume=True).model, want.model)


def test_files_of_a_run(tiny_data, tmp_path):
    result = train(Recipe(**QUICK, out=str(tmp_path)))
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [float(row["test_loss"]) for row in rows] == [row["test_loss"] for row in result.history]
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(state["fc.weight"], result.model.fc.weight)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_checkpoint_of_another_recipe_is_refused(tiny_data, tmp_path):
    train(Recipe(**QUICK, out=str(tmp_path)))
    with pytest.raises(ValueError, match=r"another recipe: lr: 0.02 there, 0.5 here"):
        train(Recipe(**(QUICK | {"lr": 0.5}), out=str(tmp_path)), resume=True)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        train(Recipe(**QUICK, out=str(tmp_path / "other")), resume=True)


def test_fine_tuning_keeps_what_is_frozen_and_replaces_the_classifier(tiny_data, tmp_path, monkeypatch):
    before = train(Recipe(**QUICK, out=str(tmp_path))).model.state_dict()
    monkeypatch.setattr(data, "load", lambda recipe: data.synthetic(16, 48, 16, classes=3))
    checkpoint = str(tmp_path / "checkpoint.pt")
    tuned = train(Recipe(**QUICK, finetune=checkpoint, freeze=0, frozen_bn=True)).model
    state = tuned.state_dict()
    assert state["fc.weight"].shape == (3, 256)
    for key in ("conv1.weight", "bn1.weight", "bn1.running_mean", "layer1.0.bn2.running_var"):
        assert torch.equal(state[key], before[key]), key
    for key in ("layer1.0.conv2.weight", "layer1.2.bn3.weight"):
        assert not torch.equal(state[key], before[key]), key
    whole = train(Recipe(**QUICK, finetune=str(tmp_path / "model.pt"), freeze=1)).model.state_dict()
    kept = [key for key in before if not key.startswith("fc.")]
    assert all(torch.equal(whole[key], before[key]) for key in kept)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"does not fit the model: layer1\.0\.bn3"):
        load_backbone(data_model(), tmp_path / "w.pt")


def data_model():
    return Recipe(**QUICK).make_model(4)


def test_accumulated_parts_give_the_step_of_the_whole_batch(tiny_data, tmp_path):
    """Over fixed statistics, where the parts do not see each other."""
    torch.save(data_model().state_dict(), tmp_path / "w.pt")
    arguments = QUICK | {"epochs": 1, "finetune": str(tmp_path / "w.pt"), "frozen_bn": True, "lr": 0.001}
    whole, parts = train(Recipe(**arguments)), train(Recipe(**arguments, accumulate=4))
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_types_train(tiny_data, precision):
    recipe = Recipe(**(QUICK | {"epochs": 1}), precision=precision)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(2, 3, 16, 16))
    result = train(recipe, model=model)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in result.model.parameters())
    assert result.history[0]["train_loss"] < 3


def test_the_same_curve_as_torchvision_from_the_same_seed(tiny_data):
    recipe = Recipe(**(QUICK | {"epochs": 4}))
    torch.manual_seed(0)
    fast = recipe.make_model(4)
    reference = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [3, 1, 1, 1], num_classes=4)
    reference.layer2, reference.layer3, reference.layer4 = (nn.Identity() for _ in range(3))
    reference.fc = nn.Linear(256, 4)
    reference.load_state_dict(fast.state_dict())
    curves = [train(recipe, model=model).history for model in (fast, reference)]
    for name in ("train_loss", "test_loss"):
        ours, theirs = ([row[name] for row in history] for history in curves)
        assert ours == pytest.approx(theirs, rel=0.02), name
    assert curves[0][-1]["train_loss"] < curves[0][0]["train_loss"]


def _two_processes(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = (folder / "port").read_text()
    data.load = tiny
    recipe = Recipe(**(QUICK | {"epochs": 1}), finetune=str(folder / "w.pt"), frozen_bn=True)
    result = train(recipe, device="cpu")
    if rank == 0:
        torch.save((result.history, result.model.state_dict()), folder / "result.pt")
    distributed.leave(distributed.Processes(rank, 2, torch.device("cpu")))


def test_two_processes_train_as_one(tiny_data, tmp_path):
    """Over fixed statistics; with the batch's own, tests/nn/test_distributed.py."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(probe.getsockname()[1]))
    torch.save(data_model().state_dict(), tmp_path / "w.pt")
    recipe = Recipe(**(QUICK | {"epochs": 1}), finetune=str(tmp_path / "w.pt"), frozen_bn=True)
    want = train(recipe, device="cpu")
    mp.spawn(_two_processes, args=(tmp_path,), nprocs=2)
    history, state = torch.load(tmp_path / "result.pt", weights_only=False)
    torch.testing.assert_close(state, want.model.state_dict(), rtol=1e-3, atol=1e-4)
    assert history[0]["test_accuracy"] == want.history[0]["test_accuracy"]
    assert history[0]["train_loss"] == pytest.approx(want.history[0]["train_loss"], rel=1e-3)


def _command(*arguments):
    app = Typer()
    app.command()(cli.train)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_trains_reports_and_resumes(tiny_data, tmp_path):
    arguments = (
        "--data",
        "synthetic",
        "--model",
        "resnet11",
        "--batch",
        16,
        "--out",
        tmp_path,
        "--epochs",
        1,
    )
    result = _command(*arguments)
    assert result.exit_code == 0, result.output
    assert "epoch   1/1" in result.output and "test accuracy" in result.output
    assert _command(*arguments, "--resume").exit_code == 0


def test_the_command_says_what_is_wrong(tiny_data, tmp_path):
    result = _command("--model", "resnet7")
    assert result.exit_code == 2 and "model: expected one of" in result.output
    result = _command("--sync-bn", "--device", "cpu", "--data", "synthetic", "--batch", 16)
    assert result.exit_code == 2 and "sync_bn" in result.output


@pytest.mark.train
def test_digits_from_scratch_reach_97_percent():
    """The short form of `fastres train --data digits --model resnet18`."""
    result = train(Recipe(data="digits", model="resnet18", epochs=6))
    assert result.accuracy >= 0.97, result.history[-1]


@pytest.mark.train
def test_resnet11_trains_from_scratch():
    result = train(Recipe(data="digits", model="resnet11", epochs=10, lr=0.2))
    assert result.accuracy >= 0.9, result.history[-1]


@pytest.mark.train
def test_fine_tuning_on_other_labels_learns(tmp_path, monkeypatch):
    """From telling digits to telling odd from even, with stem and first stage frozen."""
    train(Recipe(data="digits", model="resnet11", epochs=4, lr=0.2, out=str(tmp_path)))
    loaded = data.digits(32)
    odd = copy.deepcopy(loaded.test.tensors[1]) % 2
    loaded.test.tensors = (loaded.test.tensors[0], odd)
    images = loaded.train.images
    images.tensors = (images.tensors[0], images.tensors[1] % 2)
    monkeypatch.setattr(
        data, "load", lambda recipe: data.Data(loaded.train, loaded.test, ("even", "odd"), 32)
    )
    weights = str(tmp_path / "model.pt")
    tuned = train(
        Recipe(data="digits", model="resnet11", epochs=3, finetune=weights, freeze=0, frozen_bn=True)
    )
    assert tuned.model.fc.out_features == 2 and tuned.accuracy >= 0.9, tuned.history[-1]
