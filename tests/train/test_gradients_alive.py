"""The identity path keeps gradients alive: plain and residual networks of the same depth."""

import pytest
import torch

from fastres.train.gradients_alive import KINDS, batches, network, study, write


@pytest.fixture(scope="module")
def studies():
    images, labels = batches(steps=30, batch=32)
    return {(kind, blocks): study(kind, blocks, images, labels) for kind in KINDS for blocks in (4, 16)}


def test_gradients_stay_of_one_size_in_residual_networks_only(studies):
    growth = {kind: studies[kind, 16].spread / studies[kind, 4].spread for kind in KINDS}
    assert studies["residual", 16].spread < 20
    assert studies["plain", 16].spread > 50
    assert growth["plain"] > 5 * growth["residual"]


def test_depth_helps_residual_networks_and_hurts_plain_ones(studies):
    last = {key: sum(s.losses[-5:]) / 5 for key, s in studies.items()}
    assert last["residual", 16] < last["residual", 4]
    assert last["residual", 16] < 0.7 * last["plain", 16]


def test_every_block_is_recorded_at_every_step_and_written(studies, tmp_path):
    for (_, blocks), s in studies.items():
        assert len(s.norms) == len(s.losses) == 30 and {len(row) for row in s.norms} == {blocks}
    table, chart = write(tmp_path, list(studies.values()))
    assert len(table.read_text().splitlines()) == 1 + 30 * 2 * (4 + 16)
    assert chart.read_bytes()[:4] == b"\x89PNG"


def test_recorded_norms_are_those_of_autograd():
    images, labels = batches(steps=1, batch=8)
    torch.manual_seed(0)
    model = network("residual", 2, 16, int(labels.max()) + 1)
    x = model[1](model[0](images[0]))
    x.retain_grad()
    torch.nn.functional.cross_entropy(model[3:](model[2](x)), labels[0]).backward()
    assert study("residual", 2, images, labels).norms[0][0] == pytest.approx(x.grad.norm().item(), rel=1e-5)


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="kind: expected one of plain, residual, got 'dense'"):
        network("dense", 2, 16, 10)
