"""Tables of measured times: what is looked up, in which order, and that writing is sorted, merged and
atomic."""

import json
import threading

import pytest
import torch

from fastres.activation import RELU
from fastres.plan.problem import ConvSpec, Problem, Target
from fastres.tuning import table

TARGET = Target("cuda", "sm90", sms=132, bandwidth=3e12, flops=(("bf16", 7.5e14),))
HEADER = {"gpu": "a GPU", "triton": "3.6.0", "date": "2026-01-01"}


def problem(n=32, c=64, k=256, dtype=torch.bfloat16):
    spec = ConvSpec(n, c, 56, 56, k, (1, 1), act=RELU)
    return Problem("conv_bn_act", (("conv", spec),), dtype, ("conv.x",), ("conv",))


def raw(ms, **config):
    return {"config": config, "ms": ms}


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "shipped"


@pytest.fixture
def user(tmp_path):
    return tmp_path / "user"


def put(root, entries, kind="measured", candidate="x.conv"):
    return table.write(root, "sm90", candidate, {**HEADER, "kind": kind}, entries)


def test_lookup_returns_none_when_nothing_is_known(shipped, user):
    assert table.lookup("x.conv", problem(), TARGET, user=user) is None


def test_lookup_returns_the_exact_entry_with_its_header(shipped, user):
    put(shipped, {problem().key: {**raw(0.5, block=64), "peers": {"cudnn.conv": 0.7}}})
    entry = table.lookup("x.conv", problem(), TARGET, user=user)
    assert (entry.config, entry.ms, entry.kind, entry.batch) == ({"block": 64}, 0.5, "measured", 32)
    assert entry.header["gpu"] == "a GPU" and entry.peers == {"cudnn.conv": 0.7}


def test_the_users_table_comes_before_the_shipped_one(shipped, user):
    put(shipped, {problem().key: raw(0.5)})
    put(user, {problem().key: raw(0.9)})
    assert table.lookup("x.conv", problem(), TARGET, user=user).ms == 0.9


def test_an_exact_shipped_entry_comes_before_the_users_nearest_batch(shipped, user):
    put(shipped, {problem(32).key: raw(0.5)})
    put(user, {problem(64).key: raw(0.9)})
    assert table.lookup("x.conv", problem(32), TARGET, user=user).kind == "measured"


def test_a_time_is_carried_over_along_the_line_through_two_batches(shipped, user):
    put(shipped, {problem(256).key: raw(8.0, block=1), problem(16).key: raw(0.8, block=2)})
    entry = table.lookup("x.conv", problem(32), TARGET, user=user)
    assert (entry.kind, entry.batch, entry.config) == ("nearest", 16, {"block": 2})
    assert entry.ms == pytest.approx(0.8 + 16 * 7.2 / 240)
    assert table.lookup("x.conv", problem(512), TARGET, user=user).ms == pytest.approx(8.0 + 256 * 7.2 / 240)
    assert table.lookup("x.conv", problem(1), TARGET, user=user).ms == pytest.approx(0.8 - 15 * 7.2 / 240)


def test_one_measured_batch_is_scaled_but_for_what_every_kernel_takes(shipped, user):
    put(shipped, {problem(256).key: raw(0.256 + 5e-3)})
    assert table.lookup("x.conv", problem(512), TARGET, user=user).ms == pytest.approx(0.512 + 5e-3)
    assert table.lookup("x.conv", problem(1), TARGET, user=user).ms == pytest.approx(0.001 + 5e-3)


def test_noise_never_makes_a_larger_batch_faster_or_a_time_negative(shipped, user):
    put(shipped, {problem(64).key: raw(1.0), problem(256).key: raw(0.9)})
    assert table.lookup("x.conv", problem(512), TARGET, user=user).ms >= 0.9
    put(shipped, {problem(64).key: raw(1.0), problem(128).key: raw(4.0)})
    assert table.lookup("x.conv", problem(1), TARGET, user=user).ms > 0


def test_a_scaled_time_stays_above_the_floor(shipped, user):
    put(shipped, {problem(256).key: raw(1e-6)})
    floor = TARGET.floor_ms(problem(128))
    assert table.lookup("x.conv", problem(128), TARGET, user=user).ms == floor > 0


@pytest.mark.parametrize("other", [{"c": 128}, {"k": 64}, {"dtype": torch.float16}])
def test_another_layer_or_dtype_never_matches(shipped, user, other):
    put(shipped, {problem(**other).key: raw(1.0)})
    assert table.lookup("x.conv", problem(), TARGET, user=user) is None


def test_another_architecture_never_matches(shipped, user):
    put(shipped, {problem().key: raw(1.0)})
    sm80 = Target("cuda", "sm80")
    assert table.lookup("x.conv", problem(), sm80, user=user) is None


def test_a_prototypes_time_counts_only_where_nothing_is_measured(shipped, user):
    put(shipped, {problem().key: raw(0.1, block=1)}, kind="prototype")
    entry = table.lookup("x.conv", problem(), TARGET, user=user)
    assert (entry.kind, entry.ms) == ("prototype", 0.1)
    put(user, {problem(64).key: raw(4.0, block=2)})
    entry = table.lookup("x.conv", problem(), TARGET, user=user)
    assert (entry.kind, entry.config) == ("nearest", {"block": 2})
    assert entry.ms == pytest.approx(2.0, rel=0.01)


def test_writing_sorts_merges_and_is_reproducible(user):
    file = put(user, {problem(256).key: raw(3.0), problem(32, c=128).key: raw(2.0)})
    put(user, {problem(32).key: raw(1.0), problem(256).key: raw(4.0)})
    content = json.loads(file.read_text())
    keys = list(content["entries"])
    assert keys == [problem(32, c=128).key, problem(32).key, problem(256).key]
    assert content["entries"][problem(256).key]["ms"] == 4.0
    assert content["header"]["candidate"] == "x.conv" and content["header"]["kind"] == "measured"
    before = file.read_bytes()
    put(user, {})
    assert file.read_bytes() == before


def test_a_reader_sees_what_was_written_last(shipped, user):
    for ms in (1.0, 2.0, 3.0):
        put(user, {problem().key: raw(ms)})
        assert table.lookup("x.conv", problem(), TARGET, user=user).ms == ms


def test_writers_beside_each_other_lose_nothing(user):
    problems = [problem(n) for n in range(1, 17)]
    threads = [threading.Thread(target=put, args=(user, {p.key: raw(1.0)})) for p in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = table.load(table.path(user, "sm90", "x.conv")).entries()
    assert set(entries) == {p.key for p in problems}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"header": {}}', '{"header": {}, "entries": {"n1 x": {}}}'])
def test_a_table_that_cannot_be_read_is_left_out_with_a_warning(shipped, user, caplog, text):
    file = table.path(user, "sm90", "x.conv")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert table.lookup("x.conv", problem(), TARGET, user=user) is None
    assert str(file) in caplog.text


def test_times_that_are_no_numbers_are_refused_and_leave_the_old_table(user):
    file = put(user, {problem().key: raw(1.0)})
    with pytest.raises(ValueError):
        put(user, {problem().key: raw(float("nan"))})
    assert json.loads(file.read_text())["entries"][problem().key]["ms"] == 1.0
    assert [f.name for f in file.parent.iterdir() if not f.name.endswith(".lock")] == [file.name]


def test_every_shipped_table_can_be_read_and_says_where_it_comes_from():
    for file in table.SHIPPED.glob("*/*.json"):
        loaded = table.load(file)
        assert loaded is not None, file
        assert loaded.header["kind"] in ("measured", "prototype"), file
        assert {"gpu", "torch", "triton", "date", "source"} <= set(loaded.header), file
        assert all(raw["ms"] > 0 for raw in loaded.entries().values()), file
