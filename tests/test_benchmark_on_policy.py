"""The on-policy benchmark's own arithmetic, with made-up runs: each method at its best rate, means over seeds."""

import pytest

from benchmarks import on_policy
from benchmarks.lines import LINES


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Runs that take no time; exact match depends on method, rate, seed and rows in a known way."""
    trained = []
    rates = {"off_policy": 1e-3, "on_policy": 3e-3}

    def train(out, *overrides):
        trained.append((out.name, overrides))
        out.mkdir(parents=True)
        return {"tokens": 5000.0, "seconds": 2.0}

    def exact_match(model, rows, out, ways=("sampled", "greedy")):
        if "teacher" in str(model):
            return {"sampled": 0.9, "greedy": 1.0}
        method, _, rest = out.name.partition("-")
        if method == "warm":
            return {"sampled": 0.25, "greedy": 0.5}
        rate, _, seed = rest.rpartition("-")
        tuning = int(seed) == on_policy.TUNING_SEED
        assert (rows, *ways) == (
            (on_policy.TUNING_ROWS, "sampled") if tuning else (on_policy.TEST_ROWS, "sampled", "greedy")
        )
        share = 0.5 + 0.1 * (method == "on_policy") - abs(float(rate) - rates[method]) + 0.01 * (int(seed) % 100)
        return {"sampled": share, "greedy": share + 0.2}

    monkeypatch.setattr(on_policy, "RUNS", tmp_path)
    monkeypatch.setattr(on_policy, "train", train)
    monkeypatch.setattr(on_policy, "exact_match", exact_match)
    return trained


def test_each_method_runs_at_its_own_best_rate(made_up):
    found = on_policy.measure([0, 1, 2], 8, 4, [1e-3, 3e-3], ["off_policy", "on_policy"])
    assert [(name, len(runs)) for name, runs in found["runs"].items()] == [("off_policy", 3), ("on_policy", 3)]
    assert {run["rate"] for run in found["runs"]["off_policy"]} == {1e-3}
    assert {run["rate"] for run in found["runs"]["on_policy"]} == {3e-3}
    assert [run["seed"] for run in found["runs"]["on_policy"]] == [0, 1, 2]
    assert len(made_up) == 1 + 2 * (2 + 3) and "train.steps=8" in made_up[0][1]
    sampled = [name for name, overrides in made_up if "distill.on_policy_fraction=1.0" in overrides]
    assert sampled and all(name.startswith("on_policy") for name in sampled)
    lines = on_policy.table({"machine": {"cpu": "a CPU", "cores": 2}, **found}).splitlines()
    assert lines[2] == "| teacher | | | 90.0 % | 100.0 % |" and "25.0 % | 50.0 %" in lines[3]
    assert lines[4] == "| off-policy, forward KL | 0.001 | 5 k | 51.0 ± 1.0 % | 71.0 ± 1.0 % |"
    assert lines[5] == "| **on-policy, reverse KL** | 0.003 | 5 k | 61.0 ± 1.0 % | 81.0 ± 1.0 % |"
    line, greedily, of_one_loss, _ = LINES["on_policy"]
    found["runs"]["off_policy_rkl"] = found["runs"]["on_policy"]
    assert of_one_loss.find(found).text.startswith("+0.0 points, 61.0% against 61.0%")
    assert greedily.find(found).text.startswith("+10.0 points, 81.0% against 71.0%")
    assert line.find(found).text == "+10.0 points, 61.0% against 51.0%, on 1.00 times the tokens"
    assert line.find(found).value == pytest.approx(10) and line.least == 0
    assert lines[-1] == "Mean ± standard deviation over seeds 0, 1, 2; a CPU, 2 cores."
