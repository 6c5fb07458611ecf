"""Do the benchmarks measure what they say? Each in its smallest form; and is the README's table what the files say?"""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import loss_reference
import numpy as np
import pytest
import yaml

from benchmarks import (
    divergences,
    epochs,
    few_rows,
    fused_loss,
    growth,
    on_policy,
    overlap,
    quickstart,
    runs,
    table,
    timing,
    transport,
    transport_engine,
    trl_gkd,
)
from benchmarks.gpu import __main__ as gpu
from benchmarks.lines import GPU, LINES
from benchmarks.naive import DIVERGENCES, JAX, torch_library
from kdjax.config import load_config
from kdjax.models import load_model
from kdjax.training.folder import RunFolder


def test_benchmarks_ask_for_configurations_that_hold(tmp_path):
    for more in ((), quickstart.SFT, overlap.OVERRIDES, few_rows.overrides()):
        assert load_config(quickstart.CONFIG, quickstart.overrides(1, 7, *more)).train.steps == 7
    for case in trl_gkd.CASES.values():
        assert load_config(quickstart.CONFIG, trl_gkd.overrides(case, tmp_path, 7)).distill.kd_ratio == 1.0


def test_a_second_round_of_overlap_starts_anew(tmp_path):
    config = load_config(quickstart.CONFIG, [f"output={tmp_path}", *quickstart.overrides(0, 7, *overlap.OVERRIDES)])
    for _ in range(2):  # a finished run in the folder would be refused
        with RunFolder(config) as folder:
            folder.keep()
            for name in ("checkpoints/7", "export"):
                (tmp_path / name).mkdir(parents=True)
            folder.finish({"steps": 7})


def test_a_run_is_used_again_only_for_the_configuration_that_made_it(tmp_path, monkeypatch):
    asked = []

    def train(command, **_):
        asked.append("overwrite=true" in command)
        config = load_config(quickstart.CONFIG, command[command.index(str(quickstart.CONFIG)) + 1 :])
        with RunFolder(config) as folder:
            folder.keep()
            (folder.path / "metrics.jsonl").write_text(json.dumps({"steps": config.train.steps}) + "\n")
            folder.finish({})

    monkeypatch.setattr(quickstart, "RUNS", tmp_path)
    monkeypatch.setattr(runs.subprocess, "run", train)
    monkeypatch.setattr(runs, "commit", lambda: "abc")
    assert quickstart.run("kd", 0, 7) == quickstart.run("kd", 0, 7) == [{"steps": 7}]
    assert runs.made_at(tmp_path.iterdir()) == "abc" and asked == [True]
    assert quickstart.run("kd", 0, 8) == [{"steps": 8}]
    quickstart.run("kd", 0, 8, *quickstart.SFT)
    assert asked == [True] * 3
    (tmp_path / "kd-0" / "result.json").unlink()  # stopped on the way: it goes on
    quickstart.run("kd", 0, 8, *quickstart.SFT)
    assert asked == [True] * 3 + [False]
    saved = tmp_path / "kd-0" / "config.yaml"
    values = yaml.safe_load(saved.read_text())
    values["rollout"]["show_every"] = 7  # another version's default, which this run does not read
    del values["train"]["compilation_cache"]  # younger than the run
    saved.write_text(yaml.safe_dump(values))
    quickstart.run("kd", 0, 8, *quickstart.SFT)
    assert len(asked) == 4
    (tmp_path / "kd-0" / "commit").unlink()
    assert runs.made_at(tmp_path.iterdir()) == "unknown"


def test_a_run_is_made_anew_when_another_teacher_has_the_same_name(tmp_path, monkeypatch):
    (teacher := tmp_path / "teacher").mkdir()
    settings = [f"teacher.path={teacher}", f"output={tmp_path / 'run'}"]
    made = []

    def train(command, **_):
        made.append((teacher / "model.safetensors").read_bytes())
        with RunFolder(load_config(quickstart.CONFIG, [*settings, "overwrite=true"])) as folder:
            folder.keep()
            (folder.path / "metrics.jsonl").write_text("")
            folder.finish({})

    monkeypatch.setattr(runs.subprocess, "run", train)
    monkeypatch.setattr(runs, "commit", lambda: "abc")
    for weights in (b"one", b"one", b"two", b"two"):
        (teacher / "model.safetensors").write_bytes(weights)
        runs.trained(tmp_path / "run", quickstart.CONFIG, settings[0])
    assert made == [b"one", b"two"]


def test_programs_take_turns_and_a_round_lasts_as_long_as_asked():
    order = []
    found = timing.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, seconds=1e-4)
    shown = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert shown == ["a", "b", "a", "b"]
    assert found["a"]["calls"] == order.count("a") > 2 and len(found["a"]["repetitions"]) == 2
    once = timing.in_turns({"a": lambda: None}, rounds=1, seconds=0.0)
    assert once["a"]["calls"] == 1


def test_a_ratio_is_taken_round_by_round():
    found = timing.quotient([1.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert found == {"ratio": 2.0, "repetitions": [1.0, 2.0, 3.0], "spread": 1.0}


def test_peak_memory_is_what_a_call_takes_at_once():
    def run():
        for _ in range(2):  # one after the other
            np.ones(32 * 2**20, np.uint8)

    assert 30 * 2**20 < timing.peak_bytes(run) < 48 * 2**20


@pytest.mark.parametrize("name", DIVERGENCES)
def test_naive_formulas_are_the_definitions(name):
    import torch

    rng = np.random.default_rng(3)
    student, teacher = (rng.normal(0, 2, (6, 40)).astype(np.float32) for _ in range(2))
    expected = loss_reference.divergence(name, student, teacher)[0]
    of = torch_library()
    ours = DIVERGENCES[name](JAX, *(JAX.log_softmax(jnp.asarray(x)) for x in (student, teacher)))
    theirs = DIVERGENCES[name](of, *(of.log_softmax(torch.from_numpy(x)) for x in (student, teacher)))
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(theirs.numpy(), expected, rtol=2e-5, atol=1e-6)


def test_the_fused_loss_is_held_against_both_and_agrees():
    shape = dict(rows=48, vocabulary=300, width=8, teacher_width=12)
    found = fused_loss.measure("jsd", shape, seconds=0.0)
    values = [found[name]["value"] for name in ("fused", "naive", "torch")]
    np.testing.assert_allclose(values, values[0], rtol=1e-5)
    assert all(len(found[name]["repetitions"]) == 3 for name in ("fused", "naive", "torch"))
    line = next(line for line in LINES["fused_loss"] if "plain JAX's" in line.what)  # the README shows the same number
    assert line.find({"large": found}).value == found["time_ratio"]["ratio"] > 0
    planned = fused_loss.measure("jsd", shape, with_torch=False, limit=found["fused"]["temporary_bytes"], seconds=0.0)
    assert ("seconds" in planned["naive"]) == (planned["naive"]["temporary_bytes"] <= found["fused"]["temporary_bytes"])


def test_every_divergence_stands_at_every_vocabulary():
    found = divergences.cases(list(DIVERGENCES))
    assert len(found) == len(set(found)) == 9 * 3 + 2 * 3


def test_every_way_of_transport_brings_the_rows():
    found = transport.measure("bfloat16", dict(prompts=3, length=32, width=96), seconds=0.0)
    assert found["bytes"] == 3 * 32 * 96 * 2
    assert found["pool"]["copies"] == 1 and found["pool"]["times_the_pool"]["ratio"] == 1
    assert set(transport.COPIES) < set(found)


@pytest.mark.full
def test_a_step_is_measured_at_each_point_of_an_axis():
    common = dict(sequence=16, batch=1, vocabulary=64, layers=1)
    found = growth.along("batch", (1, 2), common, seconds=0.0)
    assert list(found["points"]) == ["1", "2"] and found["doubled"]["ratio"] > 0
    assert found["points"]["1"]["state_bytes"] == found["points"]["2"]["state_bytes"] > 0


def test_packing_leaves_less_padding():
    found = growth.padding(rows=120)
    assert 0 < found["packed"] < found["to_the_longest_of_a_batch"] < found["one_a_row"] < 1


def test_an_engine_is_held_to_its_core():
    script = "import subprocess, sys; subprocess.run(['sleep', '60'], start_new_session=True)"
    core = min(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", script]) as trainer:
        try:
            while not (sessions := overlap.sessions_of(trainer.pid)):
                assert trainer.poll() is None
            (engine,) = sessions
            assert overlap.hold(engine, core) == (len(os.sched_getaffinity(trainer.pid)) > 1)
            assert os.sched_getaffinity(engine) == {core} and overlap.hold(engine, core) == 0
        finally:
            os.killpg(engine, 9)


def test_a_table_says_what_was_met_missed_and_not_measured():
    machine = {
        "machine": {"cpu": "a CPU", "cores": 2},
        "versions": {"jax": "0"},
        "commit": "c",
        "recorded": "2026-01-01T",
    }
    ratio = {"ratio": 1.2, "spread": 0.05, "repetitions": [1.2]}
    result = machine | {"against_the_slower_alone": ratio, "against_turns": ratio}
    text = table.table({"overlap": result})
    assert "| ≤ 1.1 | 1.20, **missed** | 5% | [overlap](benchmarks/results/overlap.json) |" in text
    assert "- overlap: a CPU, 2 cores; jax 0; commit c, 2026-01-01" in text
    assert len([row for row in text.splitlines() if row.startswith("| ")]) == 3  # its head and two lines
    others = [name for name in LINES if name != "overlap"]
    assert f"Not measured yet: {', '.join(others)}, gpu." in text
    del result["against_turns"]
    assert "parts of overlap" in table.table({"overlap": result})
    result["against_the_slower_alone"] = ratio | {"ratio": 1.08}
    assert "| **1.08** |" in table.table({"overlap": result})
    with pytest.raises(KeyError, match="something_new"):
        table.table({"something_new": machine})


def test_the_readme_shows_the_committed_results():
    results = {path.stem: json.loads(path.read_text()) for path in table.RESULTS.glob("*.json")}
    shown = table.README.read_text().split(table.MARK)[1].strip()
    assert shown == table.table(results), "run python -m benchmarks.table"
    assert set(results) - set(LINES) == {name for name in results if "gpu" in results[name]}


PAGES = (quickstart, few_rows, epochs, on_policy)


@pytest.mark.parametrize("of", PAGES, ids=[of.__name__.rpartition(".")[2] for of in PAGES])
def test_a_page_shows_the_committed_table(of):
    shown = of.PAGE.read_text().split(of.MARK)[1].strip()
    made = of.table(json.loads(of.RESULT.read_text())) if of.RESULT.exists() else "Not measured yet."
    assert shown == made, f"run python -m {of.__name__} --only-table"


def test_the_floor_counts_the_products_of_both_models(root):
    """of the quickstart's student, by hand: four layers of q, o 128 × 128, k, v 128 × 64, three of 128 × 384, norms"""
    layers = 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384 + 2 * 32 + 2 * 128) + 128
    config = dict(load_config(quickstart.CONFIG).student.config)
    model = load_model(root / "examples" / "teacher", abstract=True, init="random", config=config)
    assert trl_gkd.size_of(model) == trl_gkd.Size(layers, 128, model.config.vocab_size)
    sizes = trl_gkd.Size(1000, 2, 30), trl_gkd.Size(4000, 5, 30)
    assert trl_gkd.flops(*sizes, loss_share=0.5) == 6000 + 8000 + 0.5 * (360 + 300)


@pytest.mark.full
def test_a_real_engine_gives_the_same_rows_by_its_own_call():
    found = transport_engine.measure(dict(prompts=2, length=16, width=128), rounds=1)
    assert all(found["seconds"][way]["seconds"] > 0 for way in transport_engine.WAYS)


@pytest.mark.full
def test_teacher_and_student_overlap(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # on one device, as the benchmark is
    found = overlap.measure(1, 30)
    assert found["against_turns"]["ratio"] < 1


@pytest.fixture
def toy_sections(tmp_path, monkeypatch, capsys):
    def run(*more):
        out = tmp_path / "toy.json"
        monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--toy", "--out", str(out), *more])
        assert gpu.main() == 0, capsys.readouterr().out
        found = json.loads(out.read_text())
        assert "failed" not in str(found) and "left_out" not in str(found)
        assert found["pool"]["fire"]["wrong"] == 0 and found["pool"]["fire"]["batches"] == 50
        return found

    return run


def test_the_gpu_benchmark_runs_a_section_at_toy_size(toy_sections):
    found = toy_sections("--sections", "pool")
    assert set(found) & set(gpu.SECTIONS) == {"pool"}
    lines = table.table({"toy": found}).splitlines()
    assert [line.split("|")[1].strip() for line in lines if "[toy]" in line] == [
        "pool by CUDA IPC, of a plain device copy",
        "wrong runs in 1,000 batches through the pool",
    ]


@pytest.mark.full
def test_every_section_of_the_gpu_benchmark_runs_at_toy_size(toy_sections):
    found = toy_sections("--seconds", "580")
    assert found["runs"]["on-policy"]["k3"] and max(found["runs"]["on-policy"]["k3"]) < 1e-5
    assert found["runs"]["colocated"]["tokens_per_second"]["median"] > 0
    assert found["sharing"]["engine"]["gap"] == 0
    assert all(found["loss"][name]["relative_gaps"]["value"] < 1e-3 for name in ("kl", "jsd"))
    assert found["step"]["attention"]["relative_gap"] == 0  # a CPU has one kernel
    assert set(found) > set(gpu.SECTIONS)
    assert found["sync"]["through the host"]["gap_after"] < 1e-4 < 0.1 < found["sync"]["through the host"]["gap_before"]
    of_a_gpu = ("MFU", "Liger", "to an engine, GB/s", "deleted array")
    assert all(line.find(found).text for line in GPU if not any(word in line.what for word in of_a_gpu))
