"""Rollouts as batches: which token carries loss, what is known of it, whose turn a prompt is."""

import json

import numpy as np
import pytest
from data_tools import TEMPLATES, config as data_config, plain, write_pairs

from bridge.engine import Completion
from kdjax.config import SourceConfig, from_dict
from kdjax.data import EndlessPrompts, Fault, Prompt, collate
from kdjax.errors import UserError
from kdjax.rollouts import stream as rollouts
from kdjax.rollouts.log import Rollout, describe, distinct
from kdjax.rollouts.responses import advantages_of, rollout_document
from kdjax.rollouts.stream import RolloutStream

END = 2


def prompt(ids, teacher_ids=None):
    teacher_ids = None if teacher_ids is None else np.array(teacher_ids, np.int32)
    return Prompt(np.array(ids, np.int32), teacher_ids, (), None, {}, "made:1")


def completion(ids, reason="stop"):
    logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32)
    return Completion(np.array(ids, np.int32), logprobs, reason, 3)


def settings(**rollout):
    return from_dict(
        {
            "student": {"path": "s"},
            "teacher": {"path": "t"},
            "data": {"train": [{"path": "x"}], "max_len": 64},
            "rollout": {"max_new_tokens": 16} | rollout,
        }
    ).rollout


def test_the_first_response_token_counts_and_what_follows_the_end_does_not():
    """Prompt a b, response c d END: the rows of b, c and d carry loss, with labels c, d and END."""
    document = rollout_document(prompt([10, 11]), completion([12, 13, END]), settings())
    batch = collate([[document]], batch=1, seq_len=8, extras=("on_policy", "behaviour_logprobs")).batch
    assert document.ids.tolist() == [10, 11, 12, 13, END]
    assert batch.rows[0, 0][batch.mask[0]].tolist() == [1, 2, 3]
    assert batch.labels[0][batch.mask[0]].tolist() == [12, 13, END]
    assert batch.extras["behaviour_logprobs"][0][batch.mask[0]].tolist() == [-1, -2, -3]
    assert batch.extras["on_policy"][0].tolist() == batch.mask[0].astype(float).tolist()


def test_a_teacher_with_another_prompt_reads_the_same_response():
    document = rollout_document(prompt([10, 11], [20, 21, 22, 23]), completion([12, END]), settings())
    ids, spans = document.teacher_request
    assert ids.tolist() == [20, 21, 22, 23, 12, END] and spans == ((3, 5),)
    assert document.teacher_labels.tolist() == document.labels.tolist() == [12, END]


@pytest.mark.parametrize(
    ("truncated", "tail", "carries"),
    [("keep", 1, [12, 13, 14]), ("mask_tail", 2, [12]), ("mask_tail", 3, None), ("drop", 1, None)],
)
def test_a_truncated_response(truncated, tail, carries):
    rollout = settings(truncated=truncated, tail=tail)
    cut = rollout_document(prompt([10, 11]), completion([12, 13, 14], "length"), rollout)
    assert (None if cut is None else cut.labels.tolist()) == carries
    if cut is not None:
        assert cut.ids.tolist() == [10, 11, 12, 13, 14]  # what carries no loss is still read
    whole = rollout_document(prompt([10, 11]), completion([12, 13, END]), rollout)
    assert whole.labels.tolist() == [12, 13, END]


def test_rows_of_the_data_have_no_number_of_a_rollout():
    document = rollout_document(prompt([10]), completion([11, END]), settings())
    other = document.__class__(document.ids, document.loss, "data:1")
    batch = collate([[other], [document]], batch=2, seq_len=4, extras=("on_policy",)).batch
    assert sorted(batch.extras["on_policy"][0][batch.mask[0]]) == [0, 0, 1, 1]


def rollout(number, sample, reward, ids=(5, END), reason="stop"):
    return Rollout(number, sample, "made:1", reason, len(ids), "", 0, 0, [4], list(ids), [0.0] * len(ids), reward)


def test_advantages_leave_their_own_reward_out():
    rollouts = [rollout(0, 0, 1.0), rollout(0, 1, 0.0), rollout(0, 2, 0.0), rollout(1, 0, 1.0), rollout(1, 1, 1.0)]
    reward = {"reward": "gsm8k", "n_samples": 3}
    assert advantages_of(rollouts, settings(**reward)) == [1.0, -0.5, -0.5, 0.0, 0.0]
    assert advantages_of(rollouts, settings(**reward, baseline="none", reward_weight=2)) == [2, 0, 0, 2, 2]
    assert advantages_of(rollouts, settings(**reward, baseline="batch")) == pytest.approx([0.5, -0.75, -0.75, 0.5, 0.5])


def test_what_is_said_about_a_step():
    rollouts = [rollout(0, 0, 1.0, (5, 6, 5, 6), "length"), rollout(0, 1, 0.0, (END,)), rollout(1, 0, 0.5, (7, END))]
    said = describe(rollouts, done=2)
    assert said["rollout/length"] == pytest.approx(7 / 3) and said["rollout/staleness"] == 2
    assert (said["rollout/eos_rate"], said["rollout/truncated"], said["rollout/empty"]) == pytest.approx(
        (2 / 3, 1 / 3, 1 / 3)
    )
    assert said["rollout/reward"] == 0.5 and said["rollout/distinct_1"] == 4 / 7
    assert distinct([[1, 2, 1, 2]], 2) == 2 / 3 and distinct([[1]], 2) == 1.0


def test_a_prompt_is_the_conversation_up_to_the_answer(tmp_path):
    path = write_pairs(tmp_path / "rows.jsonl", 6)
    prompts = EndlessPrompts(data_config(path, shuffle=False), plain(), seed=0)
    for index in (0, 5, 6):  # the data come again and again
        found = prompts[index]
        (document,) = found.documents
        assert document.ids[: len(found.ids)].tolist() == found.ids.tolist()
        assert np.flatnonzero(document.loss)[0] == len(found.ids)
        assert found.source == f"{path}:{index % 6 + 1}"
        assert plain().decode(found.ids).endswith("<|im_start|>assistant\n")
        assert found.answer.startswith(f"{index % 6} so")


def test_prompts_alone_and_a_teachers_own_prompt(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "say 1", "hint": "it is {one}"}))
    source = SourceConfig(path=str(path), teacher_prompt="{prompt}\n{hint}")
    found = EndlessPrompts(data_config(source), plain(), seed=0)[0]
    assert found.documents == () and found.answer is None
    assert "say 1\nit is {one}" in plain().decode(found.teacher_ids)
    assert "it is" not in plain().decode(found.ids)
    wrong = EndlessPrompts(data_config(SourceConfig(path=str(path), teacher_prompt="{answer}")), plain(), seed=0)[0]
    assert isinstance(wrong, Fault) and "names the column 'answer'; the columns are prompt, hint" in wrong.text


@pytest.mark.parametrize("hint", [None, "{prompt}, that is {response}"])
def test_a_teacher_with_a_template_of_its_own_reads_the_same_response(tmp_path, hint):
    """rows of the data and rollouts alike, with and without a prompt of its own"""
    own = {"teacher_chat_template": str(TEMPLATES / "qwen3.jinja"), "teacher_template_args": {"enable_thinking": False}}
    path = write_pairs(tmp_path / "rows.jsonl", 20)
    data = {"train": [{"path": str(path), "teacher_prompt": hint}], "max_len": 96} | own
    made = source(tmp_path, data=data, distill={"on_policy_fraction": 0.5, "kd_ratio": 0.5})
    documents = [placed.document for _ in range(6) for placed in next(made).documents]
    assert {bool(document.extras) for document in documents} == {True, False}
    for document in documents:
        row = json.loads(path.read_text().splitlines()[int(document.source.rpartition(":")[2]) - 1])
        asked = row["prompt"] if hint is None else hint.format_map(row)
        ids, spans = document.teacher_request
        read = plain().decode(ids[: spans[0][0] + 1])
        assert read == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        assert document.teacher_labels.tolist() == document.labels.tolist()
        assert "<think>" not in plain().decode(document.ids)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"messages": [{"role": "assistant", "content": "hello"}]}, "no message comes before the assistant's"),
        ({"prompt": 3}, "holds a number"),
    ],
)
def test_what_is_no_prompt(tmp_path, row, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    found = EndlessPrompts(data_config(path), plain(), seed=0)[0]
    assert isinstance(found, Fault) and found.text.startswith(f"{path}:1: ") and reason in found.text


class Parrot:
    """Engines that answer with the seed's digits; what they were asked is remembered."""

    def __init__(self):
        self.asked, self.version, self.stop_ids = [], 0, {END}

    def wait_for(self, version):
        assert version <= self.version

    def generate(self, prompts, seeds):
        self.asked += [(ids.tolist(), seed) for ids, seed in zip(prompts, seeds, strict=True)]
        return [completion([*(10 + int(digit) for digit in str(seed)[-4:]), END]) for seed in seeds]

    def close(self):
        pass


def source(tmp_path, rows=12, batch=2, accumulate=1, **groups):
    path = tmp_path / "rows.jsonl"
    tmp_path.mkdir(exist_ok=True)
    if not path.exists():
        write_pairs(path, rows)
    values = {"output": str(tmp_path / "run"), "student": {"path": "s"}, "teacher": {"path": "t"}}
    values["data"] = {"train": [{"path": str(path)}], "max_len": 64, "on_bad_row": "skip"}
    values["distill"] = {"on_policy_fraction": 1.0, "kd_ratio": 1.0}
    values["rollout"] = {"max_new_tokens": 16, "max_staleness": 99}
    for name, entries in groups.items():
        values[name] = values.get(name, {}) | entries
    made = RolloutStream(from_dict(values), plain(), batch=batch, accumulate=accumulate, shards=1, vocab_size=4096)
    made.engines = Parrot()
    return made


def responses(host):
    return {(p.document.source, tuple(p.document.labels.tolist())) for p in host.documents}


REWARD = """
def seen(prompt, response, row):
    with open(__file__ + ".seen", "a") as file:
        print(prompt, response, row["answer"], row["tag"], sep="|", file=file)
    return 1.0
"""


def test_a_reward_sees_the_last_message_the_response_and_the_row(tmp_path):
    """the same here as where answers are written and scored: tests/test_generate.py has the other half"""
    (tmp_path / "mine.py").write_text(REWARD)
    turns = [("system", "Count."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "and 3?"), ("assistant", "7")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns], "tag": "x"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    made = source(tmp_path, rollout={"reward": f"{tmp_path}/mine.py:seen", "baseline": "none", "prompts": 1})
    ids = plain().encode("it is 7 .", add_special_tokens=False)
    made.engines.generate = lambda prompts, seeds: [completion([*ids, END])]
    batch = next(made).batch
    assert batch.extras["advantage"].tolist() == batch.mask.astype(float).tolist()  # what the loss weighs tokens by
    assert (tmp_path / "mine.py.seen").read_text() == "and 3?|it is 7 .|7|x\n"


def test_resuming_within_an_epoch_asks_the_same_prompts_with_the_same_seeds(tmp_path):
    whole = source(tmp_path / "a", rows=12)
    hosts = [next(whole) for _ in range(6)]
    assert len({name for host in hosts[:3] for name, _ in responses(host)}) == sum(len(h.documents) for h in hosts[:3])
    first = source(tmp_path / "b", rows=12)
    state = [next(first).state for _ in range(2)][-1]
    second = source(tmp_path / "b")
    second.restore(json.loads(json.dumps(state)))
    for expected in hosts[2:]:
        found = next(second)
        assert [p.document.ids.tolist() for p in found.documents] == [
            p.document.ids.tolist() for p in expected.documents
        ]
        assert found.state["next_prompt"] == expected.state["next_prompt"]
    assert first.engines.asked + second.engines.asked == whole.engines.asked


def test_without_packing_a_response_has_a_row_of_its_own_and_no_segments(tmp_path):
    made = source(tmp_path, batch=4, data={"packing": False}, rollout={"prompts": 3})
    host = next(made)
    assert host.batch.segment_ids is None and host.batch.tokens.shape == (1, 4, 64)
    assert len(host.documents) == 3
    for placed, tokens in zip(host.documents, host.batch.tokens[0], strict=False):
        assert tokens[: len(placed.document)].tolist() == placed.document.ids.tolist()


def test_every_prompt_comes_once_an_epoch(tmp_path):
    made = source(tmp_path, rows=12)
    seen = []
    while len(seen) < 12:
        seen += [name for name, _ in responses(next(made))]
    assert len(set(seen[:12])) == 12


def test_rollouts_finished_before_a_kill_are_read_back(tmp_path):
    first = source(tmp_path)
    hosts = [next(first) for _ in range(3)]
    second = source(tmp_path)  # killed before it saved anything
    for expected in hosts:
        found = next(second)
        assert responses(found) == responses(expected)
        for name in expected.batch.extras:
            assert np.array_equal(found.batch.extras[name], expected.batch.extras[name])
    assert second.engines.asked == []
    next(second)
    assert second.engines.asked
    other = source(tmp_path, train={"seed": 7})  # another run's are not
    next(other)
    assert other.engines.asked


def test_what_is_read_back_waits_for_its_weights_too(tmp_path):
    """else an engine that is teacher and student in turn would get the student's while it reads for the teacher"""
    for _ in range(2):
        made, waited = source(tmp_path, rollout={"max_staleness": 1}), []
        made.engines.wait_for = waited.append
        for _ in range(3):
            next(made)
        assert waited == [-1, 0, 1]
    assert made.engines.asked == []


def test_a_response_may_hold_any_separator_of_lines(tmp_path, monkeypatch):
    said = "a\u2028b\u2029c\x85d\x0ce\r\nf"
    monkeypatch.setattr(rollouts, "response_text", lambda *_: said)
    first = next(source(tmp_path))
    second = source(tmp_path)
    assert responses(next(second)) == responses(first) and second.engines.asked == []
    assert {rollout.text for rollout in second._log.read(1)} == {said}


def test_a_file_that_is_damaged_or_of_other_prompts_is_named(tmp_path):
    next(source(tmp_path))
    file = tmp_path / "run" / "rollouts" / "step_000001.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match="step_000001.jsonl answers other prompts .* delete it"):
        next(source(tmp_path))
    file.write_text("\n".join(lines))
    write_pairs(tmp_path / "rows.jsonl", 12, tag="do not ")  # as many rows, with other words
    with pytest.raises(UserError, match="step_000001.jsonl answers other prompts .* delete it"):
        next(source(tmp_path))
    file.write_text("\n".join(lines)[:-20])
    with pytest.raises(UserError, match="step_000001.jsonl: not a file of rollouts"):
        next(source(tmp_path))


def test_the_mixture_keeps_its_share_and_its_kinds(tmp_path):
    made = source(tmp_path, rows=200, distill={"on_policy_fraction": 0.3, "kd_ratio": 0.5})
    hosts = [next(made) for _ in range(40)]
    documents = [p.document for host in hosts for p in host.documents]
    sampled = [bool(d.extras) for d in documents]
    assert 0.2 < np.mean(sampled) < 0.4
    for host in hosts:
        on = host.batch.extras["on_policy"]
        for p in host.documents:
            rows = on[p.micro, p.offset : p.offset + len(p.document.labels)]
            assert (rows == bool(p.document.extras)).all()


def test_long_prompts_are_skipped_and_counted_or_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "say " * count}) for count in (60, 2, 70, 3)))
    made = source(tmp_path, data={"shuffle": False, "max_len": 40}, rollout={"max_new_tokens": 16})
    host = next(made)
    assert {name.rpartition(":")[2] for name, _ in responses(host)} <= {"2", "4"}
    assert host.report["rollout/prompts_too_long"] == made.statistics.dropped >= 1
    assert [note for note in host.notes if "the first prompts too long, left out" in note]
    assert not [note for note in next(made).notes if "left out" in note]
    with pytest.raises(UserError, match=r"rows.jsonl:1: a prompt of \d+ tokens leaves no room"):
        next(source(tmp_path, data={"shuffle": False, "max_len": 40}, rollout={"on_long_prompt": "stop"}))
    with pytest.raises(UserError, match="none of the 4 rows is a prompt to train on: .* 4 too long"):
        next(source(tmp_path, data={"max_len": 20}))


def test_a_prompt_whose_responses_do_not_all_fit_a_step_is_too_long(tmp_path):
    """two rows of 64 tokens hold four responses of 16 to a prompt of at most 16 tokens"""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in ("2", "say " * 14, "3")))
    fits = {"data": {"shuffle": False}, "rollout": {"max_new_tokens": 16, "n_samples": 4}}
    made = source(tmp_path, **fits)
    hosts = [next(made) for _ in range(4)]
    assert {name.rpartition(":")[2] for host in hosts for name, _ in responses(host)} == {"1", "3"}
    assert hosts[-1].report["rollout/prompts_too_long"] >= 1
    fits["rollout"]["on_long_prompt"] = "stop"
    with pytest.raises(UserError, match=r"rows.jsonl:2: a prompt of \d+ tokens .* a step's 2 rows of .*=64, 4 times"):
        refusing = source(tmp_path, **fits)
        for _ in range(4):
            next(refusing)


def test_an_epoch_is_as_many_steps_as_its_prompts_fill(tmp_path):
    made = source(tmp_path, rows=24, data={"shuffle": False})
    estimated, taken = made.estimate_batches(2.0), 0
    while made.state()["next_prompt"] < 48:
        next(made)
        taken += 1
    assert taken == estimated
    long_ones = [{"prompt": "say " * (20 if i % 2 else 2)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, long_ones)))
    # The first step holds three of them, any later one that begins with a long one two.
    few = source(tmp_path, data={"shuffle": False}, rollout={"prompts": 3, "max_new_tokens": 8})
    assert few.estimate_batches() == 4 and few.state()["next_prompt"] == 0


def test_few_good_rows_among_bad_ones_fill_a_step(tmp_path):
    """more bad rows in a step than there are in an epoch, since the few good ones come again and again"""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in (" ", "say 2", " ", " ")))
    made = source(tmp_path, data={"shuffle": False}, rollout={"prompts": 4})
    host = next(made)
    assert {p.document.source for p in host.documents} == {f"{path}:2"} and len(host.documents) == 4
    assert host.report["rollout/prompts_malformed"] == made.statistics.skipped >= 9


def test_a_row_whose_answer_is_too_long_is_not_the_students_to_answer(tmp_path):
    """so that it answers no larger share than it should"""
    rows = [{"prompt": f"say {i}", "response": "word " * (60 if i % 2 else 2)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = source(tmp_path, data={"max_len": 40}, distill={"on_policy_fraction": 0.5}, rollout={"max_new_tokens": 8})
    asked = {a.number: a for a in sum((made._ask() for _ in range(20)), [])}
    own = {i: np.random.default_rng([made._seed, i]).random() < 0.5 for i in range(made._next)}
    long = {i for i in own if len(made._prompts[i].row["response"]) > 100}
    assert {i for i in own if i not in asked} == {i for i in long if not own[i]} != set()
    assert {i: a.sampled for i, a in asked.items()} == {i: own[i] for i in asked} and any(own[i] for i in long)
    assert made.statistics.dropped == len(own) - len(asked)


def test_a_disk_that_is_full_is_named(tmp_path):
    made = source(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rollouts").write_text("in the way")
    with pytest.raises(UserError, match=r"step_000001.jsonl: cannot be written \("):
        next(made)


@pytest.mark.parametrize(("prompts", "micro"), [(4, 1), (5, 2), (9, 4)])
def test_micro_batches_that_no_response_needs_are_left_out(tmp_path, prompts, micro):
    """room is kept for 40 tokens a response, and five are written: several to a row, and few rows"""
    made = source(
        tmp_path,
        rows=40,
        batch=2,
        accumulate=12,
        rollout={"prompts": prompts, "max_new_tokens": 40},
        data={"max_len": 60},
    )
    host = next(made)
    assert host.batch.tokens.shape == (micro, 2, 60)
    assert len(host.documents) == prompts and host.loss_tokens == 5 * prompts
    for p in host.documents:
        ids = host.batch.tokens[p.micro, p.row, p.start : p.start + len(p.document)]
        assert ids.tolist() == p.document.ids.tolist()


def test_what_does_not_fit_a_step_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"8 prompt\(s\) with 1 response.* do not fit a step of 2 rows of 64 tokens"):
        next(source(tmp_path, rollout={"prompts": 8, "max_new_tokens": 40}))
    assert len(next(source(tmp_path, rollout={"prompts": 2, "n_samples": 2, "max_new_tokens": 8})).documents) == 4


def test_a_later_step_of_long_prompts_takes_the_fewer_that_fit(tmp_path):
    """its first step shows that the configuration makes sense; after hours nobody wants to change it"""
    words = (1, 1, 1, 18, 18, 18)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": "say " * count}) for count in words))
    made = source(tmp_path, data={"shuffle": False}, rollout={"prompts": 3, "max_new_tokens": 16})
    assert len(next(made).documents) == 3
    host = next(made)
    assert len(host.documents) == 2
    assert any("step 2: 2 of rollout.prompts=3: more" in note for note in host.notes)
    comes = {name.rpartition(":")[2] for name, _ in responses(host) | responses(next(made))}
    assert {"4", "5", "6"} <= comes  # the one that did not fit comes next


CUT, EMPTY, WHOLE = completion([10, 11], "length"), completion([END]), completion([10, END])


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([CUT] * 4, "step 1: all 4 responses were cut at rollout.max_new_tokens=16"),
        ([EMPTY] * 4, "step 1: all 4 responses are empty"),
        ([CUT, EMPTY, CUT, CUT], "step 1: 3 of 4 responses were cut at rollout.max_new_tokens=16 and 1 are empty"),
        ([CUT, EMPTY, CUT, WHOLE], None),
    ],
)
def test_a_step_of_nothing_but_cut_or_empty_responses_is_warned_about(tmp_path, answers, message):
    made = source(tmp_path, rollout={"show_every": None, "prompts": 4})
    made.engines.generate = lambda prompts, seeds: answers
    notes = next(made).notes
    assert not notes if message is None else len(notes) == 1 and notes[0].startswith(f"warning: {message}")


@pytest.mark.parametrize(("every", "shown"), [({}, [1]), ({"show_every": 3}, [1, 3, 6]), ({"show_every": None}, [])])
def test_a_response_is_shown_below_its_question_now_and_then(tmp_path, every, shown):
    made = source(tmp_path, rollout=every)
    told = {number: host.notes for number in range(1, 7) if (host := next(made)).notes}
    assert list(told) == shown
    for number, (note,) in told.items():
        (_, first, *_) = (tmp_path / "run" / "rollouts" / f"step_{number:06d}.jsonl").read_text().splitlines()
        first = json.loads(first)
        where, question, answer = note.splitlines()
        assert where == f"step {number}: {first['source']}, answered in 5 tokens, ended by itself"
        assert question == f"    > say {int(first['source'].rpartition(':')[2]) - 1}"
        assert answer == f"    {first['text'].strip()}"


def test_nothing_is_kept_for_an_algorithm_that_says_nothing_of_its_rows(tmp_path):
    made = source(tmp_path)
    made.learned(next(made), None)
    assert not made._written


def test_the_log_gets_what_the_step_found(tmp_path):
    made = source(tmp_path)
    host = next(made)
    made.learned(host, np.where(host.batch.mask, host.batch.labels, 0).astype(np.float32))
    head, *lines = [
        json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    ]
    assert head["step"] == 1 and len(lines) == len(host.documents)
    for line in lines:
        assert line["kl"] == pytest.approx(np.mean(line["ids"]))
        assert line["length"] == len(line["ids"]) == len(line["logprobs"])
        assert plain().decode(line["ids"], skip_special_tokens=True) == line["text"]
