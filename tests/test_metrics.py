"""Do the numbers arrive where they were sent, and does a torn file not stand in a run's way?"""

import importlib.util
import json
import math
import struct

import pytest
import yaml

from kdjax.config import from_dict
from kdjax.errors import UserError
from kdjax.train import main
from kdjax.training.metrics import JsonLines, Metrics, TensorBoard, check_log, read_metrics


def configured(**log):
    values = {"student": {"path": "student"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    return from_dict(values | {"log": {"tensorboard": False} | log})


def wandb_records(data: bytes):
    """What an offline W&B file holds: seven bytes, then a log of records in blocks as LevelDB writes it."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = 7, b""
    while at < len(data):
        if (room := 2**15 - at % 2**15) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def test_records_come_back_as_they_were(tmp_path):
    with Metrics(tmp_path, configured()) as metrics:
        metrics.write(1, {"loss": 2.5, "eval/ce": math.nan, "grad_norm": math.inf})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record.keys() == {"step", "time", "loss", "eval/ce", "grad_norm"}
    assert record["loss"] == 2.5 and math.isnan(record["eval/ce"]) and record["grad_norm"] == math.inf
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)  # plain JSON, no NaN


@pytest.mark.parametrize("torn", [b'{"step": 5, "lo', b"\x00" * 40, b"\xff\xfe{", b"7"])
def test_a_torn_line_does_not_stop_a_resume(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    with Metrics(tmp_path, configured()) as metrics:
        for step in range(5):
            metrics.write(step, {"loss": step})
    with path.open("ab") as file:
        file.write(torn)
    with Metrics(tmp_path, configured(), resumed_at=3) as metrics:
        metrics.write(4, {"loss": 40})
    assert [record["loss"] for record in read_metrics(path)] == [0, 1, 2, 3, 40]
    assert len(path.read_text().splitlines()) == 5


def test_wandb_offline_receives_configuration_and_numbers(tmp_path):
    import wandb

    config = configured(wandb=True, wandb_mode="offline", wandb_project="mine", wandb_name="first", wandb_group="set")
    with Metrics(tmp_path, config) as metrics:
        metrics.write(3, {"loss": 2.5, "eval/ce": 1.25})
    with Metrics(tmp_path, config, resumed_at=3) as metrics:
        metrics.write(4, {"loss": 2.0})
    wandb.teardown()  # waits for W&B's own process, which writes the last records after finish() has returned
    runs, history = [], []
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for record in wandb_records(file.read_bytes()):
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("history"):
                items = record.history.item
                history.append({(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in items})
    assert {(run.project, run.display_name, run.run_group) for run in runs} == {("mine", "first", "set")}
    assert len({run.run_id for run in runs}) == 1  # the resumed run goes on in the same one
    assert any(update.key == "train" for update in runs[0].config.update)
    assert [(row["step"], row["loss"]) for row in history] == [(3, 2.5), (4, 2.0)]
    assert history[0]["eval/ce"] == 1.25


def tensorboard_events(file):
    """each event behind its length (8 bytes) and that one's checksum (4), and before its own (4), as in TFRecord"""
    from tensorboardX.proto.event_pb2 import Event

    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length


def test_tensorboard_receives_the_numbers_and_where_a_run_went_on(tmp_path):
    for resumed_at in (0, 3):
        folder = tmp_path / str(resumed_at)
        folder.mkdir()
        with Metrics(folder, configured(tensorboard=True), resumed_at) as metrics:
            metrics.write(resumed_at + 1, {"loss": 2.5, "eval/ce": 1.25})
        (file,) = (folder / "tensorboard").iterdir()
        events = list(tensorboard_events(file))
        told = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
        assert told == [(resumed_at + 1, "loss", 2.5), (resumed_at + 1, "eval/ce", 1.25)]
        # TensorBoard leaves out what an earlier life wrote from this step on.
        starts = [event.step for event in events if event.HasField("session_log")]
        assert starts == ([4] if resumed_at else [])


def test_a_sink_that_refuses_leaves_no_other_open(tmp_path, monkeypatch):
    closed = []

    def refuse(*_):
        raise UserError("log.wandb: no network")

    monkeypatch.setattr("kdjax.training.metrics.WeightsAndBiases", refuse)
    for sink in (JsonLines, TensorBoard):
        close = sink.close
        monkeypatch.setattr(sink, "close", lambda self, close=close: (closed.append(type(self)), close(self)))
    with pytest.raises(UserError, match="no network"):
        Metrics(tmp_path, configured(wandb=True, tensorboard=True))
    assert closed == [TensorBoard, JsonLines]


def test_wandb_that_is_not_installed_is_refused_before_anything_loads(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    with pytest.raises(UserError, match="pip install wandb"):
        check_log(configured(wandb=True).log)
    check_log(configured().log)
    file = tmp_path / "run.yaml"
    values = {"output": str(tmp_path / "run"), "student": {"path": "nowhere"}, "log": {"wandb": True}}
    file.write_text(yaml.safe_dump(values | {"data": {"train": [{"path": "rows.jsonl"}]}}))
    assert main(["--config", str(file)]) == 2
    assert capsys.readouterr().err.startswith("error: log.wandb: ") and not (tmp_path / "run").exists()
