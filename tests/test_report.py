"""Does a report show the run, whole or not, and need nothing but itself?"""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from kdjax.config import from_dict, to_yaml
from kdjax.errors import UserError
from kdjax.report import main
from kdjax.reporting import RunRecord, write_report
from kdjax.reporting.figures import draw
from kdjax.reporting.page import render
from kdjax.training.about import note
from kdjax.training.metrics import Metrics

VALUES = {
    "student": {"path": "small/student"},
    "teacher": {"path": "large/teacher"},
    "data": {"train": [{"path": "rows.jsonl"}], "eval": [{"path": "held.jsonl"}]},
    "train": {"steps": 40, "learning_rate": 0.003},
    "log": {"tensorboard": False},
}


def made(folder, steps=40, teacher=True, start=0):
    """A run folder as ``steps`` steps would leave it."""
    folder.mkdir(exist_ok=True)
    config = from_dict(VALUES if teacher else VALUES | {"teacher": {}, "data": VALUES["data"] | {"tokenizer": "t"}})
    (folder / "config.yaml").write_text(to_yaml(config))
    note(folder, steps=40, devices="8 × cpu", parameters=1_234_567, started="2026-01-02 03:04:05")
    with Metrics(folder, config, start) as metrics:
        for step in range(start, steps + 1, 10):
            down = math.exp(-step / 20)
            parts = {"kd": 2 * down, "ce": 3 * down} if teacher else {"ce": 3 * down}
            seconds = {"student": 0.5, "waiting": 0.1, "transfer": 0.01, "step": 0.61, "teacher": 0.3}
            if step > start:
                values = {"loss": 3 * down, "grad_norm": 2 + down, "learning_rate": 1e-3, "tokens_per_second": 9000}
                metrics.write(step, values | parts | {f"seconds/{name}": value for name, value in seconds.items()})
            held = {"ce": 2 + down, "accuracy": 0.5, "entropy": 1.5}
            if teacher:
                held |= {"kl": down, "rkl": 2 * down, "agreement": 0.7, "teacher_ce": 1.75, "teacher_entropy": 1.5}
                held |= {"kl_at/0-15": 2 * down, "kl_at/16-63": down, "own/length": 7.5}
            metrics.write(step, {f"eval/{name}": value for name, value in held.items()} | {"stage/evaluation": 2.0})
    return folder


class Page(HTMLParser):
    """What a page asks for and says."""

    def __init__(self, text):
        super().__init__()
        self.asks, self.words, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.asks += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.words.append(data)


def test_a_finished_run(tmp_path, capsys):
    run = made(tmp_path / "my <run>")
    samples = [{"question": "2 + <b>2</b>?", "answer": "four", "reference": "4"}]
    note(run, finished="2026-01-02 04:04:05", kept_step=40, samples=samples, export_gap=1e-6)
    assert main([str(run)]) == 0
    page = run / "report.html"
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    said = " ".join(" ".join(Page(text).words).split())
    for words in ("my <run>", "finished at step 40", "large/teacher → small/student", "2 + <b>2</b>?", "four",
                  "train.learning_rate", "0.003", "1,234,567 parameters", "own/length", "7.500", "before",
                  "perplexity", "teacher 1.750", "from 3.000"):  # fmt: skip
        assert words in said, words
    assert f"{2 + math.exp(-2):.3f}" in said
    names = {path.stem for path in (run / "figures").iterdir()}
    assert {"loss", "held_out_loss", "held_out_kl", "kl_by_position", "run_time", "gradient_norm"} <= names
    for path in (run / "figures").iterdir():
        with Image.open(path) as picture:
            picture.verify()
            assert picture.format == "PNG" and picture.width > 600
    assert text.count("<figure") == len(names)
    assert not [name for name in names if name.startswith("rollout")]
    # It asks for nothing but itself, and what it refers to is there.
    seen = Page(text)
    assert all(link.startswith("#") for link in seen.asks)
    assert not re.findall(r"@import|url\((?!#)|<(?:script|link|iframe|img)\b", text)
    assert {link[1:] for link in seen.asks} | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(seen.ids)


def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    page = made(tmp_path / "run") / "report.html"
    page.write_text("the page before")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kdjax.reporting.page.draw", lambda run: [])
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_report(page.parent)
    assert page.read_text() == "the page before"


def test_an_interrupted_run_and_the_same_resumed(tmp_path):
    run = made(tmp_path / "run", steps=20)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    (run / "run.json").unlink()  # as of a run that was killed before it said anything
    cut = RunRecord.load(run)
    assert "not finished: step 20" in render(cut, draw(cut)[:1])
    made(run, start=20)
    whole = RunRecord.load(run)
    assert "not finished: step 40 of 40" in render(whole, [])
    assert whole.series("loss")[0] == [10, 20, 30, 40] and {figure.name for figure in draw(whole)} >= {
        "loss",
        "step_time",
    }


def test_seconds_are_those_of_the_steps_and_the_stages(tmp_path):
    seconds = RunRecord.load(made(tmp_path / "run")).seconds
    assert seconds == pytest.approx(
        {"steps: student": 20, "evaluation": 10, "steps: waiting": 4, "steps: transfer": 0.4}
    )
    assert list(seconds) == ["steps: student", "evaluation", "steps: waiting", "steps: transfer"]


def test_supervised_fine_tuning_says_nothing_of_a_teacher(tmp_path):
    run = RunRecord.load(made(tmp_path / "run", teacher=False))
    text = render(run, [])
    assert "supervised fine-tuning" in text and "KL" not in text
    assert run.parts == ["loss"]  # its only part says the same
    assert not {figure.name for figure in draw(run)} & {"held_out_kl", "kl_by_position"}


def with_rollouts(folder, **more):
    """A run with rollouts, of which something is recorded at every step."""
    run = made(folder)
    with Metrics(run, from_dict(VALUES), 40) as metrics:
        for step in range(41, 61):
            said = {"length": step, "eos_rate": 0.75, "truncated": 0.25, "k3": step * 1e-8, "kl": 1 / step}
            said |= {"entropy": 2.0, "overlap": 0.5} | more
            metrics.write(step, {f"rollout/{name}": value for name, value in said.items()})
    return run


def drawn_lines(figure):
    """label → values of every line, whichever scale it is on"""
    return {line.get_label(): list(line.get_ydata()) for axes in figure.axes for line in axes.lines}


def test_rollouts_have_figures_of_their_own(tmp_path):
    figures = {drawn.name: drawn.figure for drawn in draw(RunRecord.load(with_rollouts(tmp_path / "run", reward=0.5)))}
    steps = range(41, 61)
    assert drawn_lines(figures["rollout_responses"]) == {
        "mean length": list(steps),
        "ended by itself": [0.75] * 20,
        "cut at the limit": [0.25] * 20,
    }
    assert drawn_lines(figures["rollout_kl"]) == {
        "KL(student ‖ teacher)": [1 / step for step in steps],
        "student's entropy": [2.0] * 20,
        "teacher's top 5 shared": [0.5] * 20,
    }
    k3 = drawn_lines(figures["rollout_k3"])
    assert k3["k3"] == [step * 1e-8 for step in steps] and k3["stops above 0.05"] == [0.05, 0.05]
    assert figures["rollout_k3"].axes[0].get_yscale() == "log"
    assert drawn_lines(figures["rollout_reward"]) == {"mean reward": [0.5] * 20}
    for name in ("rollout_responses", "rollout_kl"):
        left, right = figures[name].axes
        shown = [text.get_text() for text in right.get_legend().get_texts()]
        assert shown == list(drawn_lines(figures[name]))
        colours = [line.get_color() for axes in (left, right) for line in axes.lines]
        assert len(set(colours)) == 3


def test_rollouts_without_a_reward_show_none_and_an_engine_without_a_gap_no_logarithm(tmp_path):
    run = with_rollouts(tmp_path / "run", k3=0.0, kl=-0.25)
    figures = {drawn.name: drawn.figure for drawn in draw(RunRecord.load(run))}
    assert "rollout_reward" not in figures
    assert figures["rollout_k3"].axes[0].get_yscale() == "linear"
    assert figures["rollout_kl"].axes[0].get_ylim()[0] <= -0.25
    page = write_report(run).read_text()
    assert "disagreement of trainer and rollout engine" in page
    with Image.open(run / "figures" / "rollout_kl.png") as picture:
        picture.verify()


def test_the_first_evaluation_alone_is_enough(tmp_path):
    run = RunRecord.load(made(tmp_path / "run", steps=0))
    assert ">before</th>" in render(run, draw(run)[:1])


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no run is there" in capsys.readouterr().err
    run = made(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="recorded nothing yet"):
        write_report(run)
