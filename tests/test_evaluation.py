"""Held-out numbers by command, of folders and of checkpoints, and evaluation functions of one's own."""

import json
import shutil

import jax
import numpy as np
import pytest
import step_tools
import yaml
from loss_reference import log_softmax
from safetensors import safe_open
from safetensors.numpy import load_file

import kdjax
from kdjax.config import from_dict
from kdjax.errors import UserError
from kdjax.evaluate import evaluate, main
from kdjax.export import main as export
from kdjax.progress import Display
from kdjax.training import evaluation
from kdjax.training.device_batch import DeviceBatch
from kdjax.training.evaluation import Evaluation, call_evaluations
from kdjax.training.loop import train
from kdjax.training.metrics import read_metrics
from kdjax.training.sources import to_device

pytestmark = pytest.mark.usefixtures("devices_as_asked")


@pytest.fixture
def trained(run_values, tmp_path):
    """The configuration of a run without a teacher that kept each of its checkpoints, its result and its folder."""
    run_values["teacher"] = {}
    run_values["data"]["tokenizer"] = run_values["student"]["path"]
    run_values["checkpoint"] |= {"save_every": 3, "keep": 5}
    run_values["train"] |= {"keep_best": True, "eval_functions": [own_file(tmp_path), "held_out_width"]}
    config = from_dict(run_values)
    return config, train(config, Display(quiet=True)), tmp_path / "run"


def own_file(folder):
    file = folder / "own.py"
    file.write_text(
        "import numpy as np\n\n"
        "def tokens(evaluation):\n"
        "    documents = [p.document for batch in evaluation.batches for p in batch.host.documents]\n"
        "    return {'loss': sum(int(d.loss.sum()) for d in documents), 'ce': evaluation.values['ce']}\n"
    )
    return f"{file}:tokens"


@kdjax.register_evaluation("held_out_width")
def held_out_width(evaluation: Evaluation) -> float:
    batch = evaluation.batches[0].arrays
    hidden = evaluation.model(batch.tokens[0], batch.positions[0], batch.segment_ids[0])
    return hidden.shape[-1] + 100 * (evaluation.step or 0)


def test_checkpoints_and_folders(trained, tmp_path, capfd):
    """Three ways to the same weights give the same numbers, and functions see the weights of their step."""
    config, result, run = trained
    held = [record for record in read_metrics(run / "metrics.jsonl") if "eval/ce" in record]
    assert [record["eval/held_out_width"] for record in held] == [32, 332, 632]
    assert all(record["eval/tokens/ce"] == record["eval/ce"] for record in held)
    assert held[0]["eval/tokens/loss"] == held[2]["eval/tokens/loss"] > 100
    by_checkpoint = evaluate(config, run=run, step=3)
    assert by_checkpoint["ce"] == pytest.approx(result.evaluations[3]["ce"], rel=1e-6)
    assert by_checkpoint["perplexity"] == pytest.approx(np.exp(by_checkpoint["ce"]))
    assert by_checkpoint["held_out_width"] == 332
    capfd.readouterr()
    assert main(["--run", str(run)]) == 0  # its export
    told = capfd.readouterr()
    assert json.loads(told.out)["ce"] == pytest.approx(result.evaluations[6]["ce"], rel=1e-6) and told.err == ""
    # Exports of a step, of the newest and of the best: tensors of that step and of no other.
    for name, options in (("three", ["--step", "3"]), ("last", []), ("best", ["--best"])):
        assert export([str(run), str(tmp_path / name), *options]) == 0
    three, last, best, whole = (
        load_file(folder / "model.safetensors")
        for folder in (*(tmp_path / name for name in ("three", "last", "best")), run / "export")
    )
    assert all(np.array_equal(last[name], whole[name]) and np.array_equal(best[name], whole[name]) for name in whole)
    assert any(not np.array_equal(three[name], whole[name]) for name in whole)
    capfd.readouterr()
    assert main(["--config", str(run / "config.yaml"), "--model", str(tmp_path / "three")]) == 0
    assert json.loads(capfd.readouterr().out)["ce"] == pytest.approx(by_checkpoint["ce"], rel=1e-6)
    # The best weights by command, told from the newest by putting step 3's in their place; and another dtype.
    shutil.copy(tmp_path / "three" / "model.safetensors", run / "best")
    assert main(["--run", str(run), "--best"]) == 0
    assert json.loads(capfd.readouterr().out)["ce"] == pytest.approx(by_checkpoint["ce"], rel=1e-6)
    assert export([str(run), str(tmp_path / "narrow"), "--dtype", "bfloat16"]) == 0
    with safe_open(tmp_path / "narrow" / "model.safetensors", "numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    # What is not there is said in one line.
    for command, words in (
        (lambda: main(["--run", str(run), "--step", "4"]), "no checkpoint of step 4; there are 3, 6"),
        (lambda: export([str(run), str(tmp_path / "x"), "--step", "4"]), "no checkpoint of step 4; there are 3, 6"),
        (lambda: export([str(tmp_path), str(tmp_path / "x")]), "no run is there"),
    ):
        assert command() == 2
        error = capfd.readouterr().err
        assert words in error and error.count("\n") == 1
    shutil.rmtree(run / "best")
    assert export([str(run), str(tmp_path / "x"), "--best"]) == 2
    assert "train.keep_best" in capfd.readouterr().err


SEEN = []


@kdjax.register_evaluation("documents_seen")
def documents_seen(evaluation: Evaluation) -> float:
    SEEN[:] = [placed.document for batch in evaluation.batches for placed in batch.host.documents]
    return len(SEEN)


@pytest.mark.usefixtures("local_engines")
def test_the_command_compares_with_the_teacher(run_values, tiny_teacher, tmp_path, capsys):
    """Against plain transformers with both models, in float64, a document at a time."""
    student = tmp_path / "student"
    model = kdjax.load_model(tiny_teacher, init="random", seed=3, config=run_values["student"]["config"])
    kdjax.export_hf(model, student, source=tiny_teacher)
    run_values["train"] |= {"eval_functions": ["documents_seen"]}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_values))
    assert main(["--config", str(file), "--model", str(student)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["documents_seen"] == len(SEEN) > 4

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known = np.zeros(4096, bool)
    known[list(AutoTokenizer.from_pretrained(student).get_vocab().values())] = True
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype="float32") for folder in (student, tiny_teacher)]
    rows = {name: [] for name in ("ce", "kl", "agreement", "teacher_entropy")}
    for document in SEEN:
        ids = torch.tensor(document.ids[None].astype(np.int64))
        logits = [m(ids).logits[0].detach().double().numpy()[document.loss_rows] for m in models]
        rows["ce"] += list(-log_softmax(logits[0])[np.arange(len(document.labels)), document.labels])
        log_q, log_p = (log_softmax(x[:, known]) for x in logits)
        rows["kl"] += list((np.exp(log_p) * (log_p - log_q)).sum(-1))
        rows["agreement"] += list(log_q.argmax(-1) == log_p.argmax(-1))
        rows["teacher_entropy"] += list(-(np.exp(log_p) * log_p).sum(-1))
    for name, values in rows.items():
        assert told[name] == pytest.approx(np.mean(values), rel=1e-4), name
    assert told["kl"] > 0.1 and told["perplexity"] == pytest.approx(np.exp(told["ce"]))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=["one device", "eight devices"])
def test_numbers_are_those_of_float64_by_position_too(monkeypatch, sizes):
    """Against NumPy, a document at a time, on packed rows in micro-batches over shards."""
    monkeypatch.setattr(evaluation, "POSITIONS", (0, 2, 5))
    step = step_tools.make(sizes, devices=int(np.prod(sizes)))
    teacher = step_tools.teacher()
    shards = sizes[0] * sizes[1]
    batches = [DeviceBatch(to_device(step_tools.host_batch(seed, 2, shards), step.mesh), None) for seed in (0, 1)]
    found = evaluation.Evaluator(step.model, (teacher,), step.mesh)(step.state["params"]["student"], batches)

    rows = {name: [] for name in ("ce", "kl", "rkl", "entropy", "teacher_entropy", "agreement", "position")}
    head = np.asarray(step.model.head().weight, np.float64)
    head = head if step.model.head().layout == "dv" else head.T
    forward = jax.jit(lambda model, tokens: model(tokens))
    for seed in (0, 1):
        for i, document in enumerate(step_tools.documents(seed)):
            tokens = np.zeros((1, step_tools.S), np.int32)
            tokens[0, : len(document)] = document.ids
            with jax.set_mesh(step.mesh):
                hidden = np.asarray(forward(step.model, tokens), np.float64)[0]
            states = np.random.default_rng([seed, i]).normal(size=(len(document), step_tools.E))
            student = hidden[document.loss_rows] @ head
            of_teacher = states[document.loss_rows] @ np.asarray(teacher.head.weight, np.float64).T
            log_q, log_p = log_softmax(student), log_softmax(of_teacher)
            rows["ce"] += list(-log_q[np.arange(len(log_q)), document.labels])
            rows["kl"] += list((np.exp(log_p) * (log_p - log_q)).sum(-1))
            rows["rkl"] += list((np.exp(log_q) * (log_q - log_p)).sum(-1))
            rows["entropy"] += list(-(np.exp(log_q) * log_q).sum(-1))
            rows["teacher_entropy"] += list(-(np.exp(log_p) * log_p).sum(-1))
            rows["agreement"] += list(student.argmax(-1) == of_teacher.argmax(-1))
            rows["position"] += range(len(log_q))
    place = np.array(rows.pop("position"))
    for name, values in rows.items():
        assert found[name] == pytest.approx(np.mean(values), rel=2e-5), name
    for name, (start, stop) in {"0-1": (0, 2), "2-4": (2, 5), "5+": (5, 99)}.items():
        inside = np.array(rows["kl"])[(place >= start) & (place < stop)]
        assert len(inside) > 5 and found[f"kl_at/{name}"] == pytest.approx(inside.mean(), rel=2e-5), name


def test_functions_are_refused_before_anything_loads(run_values, tmp_path, capsys):
    run_values["train"]["eval_functions"] = ["held_out_wdith"]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_values))
    from kdjax.train import main as command

    assert command(["--config", str(file)]) == 2
    words = "train.eval_functions: no evaluation function 'held_out_wdith'; did you mean 'held_out_width'"
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="train.eval_functions needs held-out data"):
        from_dict(run_values | {"data": run_values["data"] | {"eval": []}, "train": {"eval_functions": ["a"]}})


def test_a_function_that_returns_no_number(unchecked, tmp_path):
    mesh = kdjax.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    about = Evaluation(None, [], (), None, mesh, None, 0, {})
    file = tmp_path / "own.py"
    file.write_text("def words(evaluation):\n    return {'a': 'many'}\n")
    with pytest.raises(UserError, match="must return a number or a mapping of numbers"):
        call_evaluations([f"{file}:words"], about)
