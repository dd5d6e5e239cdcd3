import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import UserError
from training.journal import Journal


def step(number, loss=None):
    loss = 1 / number if loss is None else loss
    return {"kind": "step", "step": number, "epoch": (number + 3) // 4, "loss": loss, "lr": 0.001 * number}


def epoch(number, **more):
    return {"kind": "epoch", "step": 4 * number, "epoch": number, "loss": 0.5, "clips_per_second": 812.5} | more


def steps_on_disk(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder, tag):
    """What TensorBoard shows of a figure: (step, value)."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


def test_entries_are_lines_of_json_that_are_there_at_once(tmp_path):
    journal = Journal(tmp_path)
    entries = [step(1), step(2), epoch(1, valid_mAP=0.25, best=True)]
    for entry in entries:
        journal.record(entry)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # neither closed nor asked to flush
    assert [json.loads(line) for line in lines] == entries == journal.entries()
    assert journal.position() == (tmp_path / "metrics.jsonl").stat().st_size
    journal.close()


def test_a_resumed_journal_has_neither_gaps_nor_repeats(tmp_path):
    before = Journal(tmp_path)
    for number in range(1, 5):
        before.record(step(number))
    position = before.position()  # the checkpoint
    for number in range(5, 8):
        before.record(step(number, loss=99.0))  # lost with the crash
    before.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')  # cut short by the crash

    after = Journal(tmp_path, position)
    assert steps_on_disk(tmp_path) == [1, 2, 3, 4]
    for number in range(5, 10):
        after.record(step(number))
    after.position()
    assert after.entries() == [step(number) for number in range(1, 10)]
    after.close()
    assert scalars(tmp_path, "train/loss") == [(number, 1 / number) for number in range(1, 10)]
    assert scalars(tmp_path, "train/lr") == [(number, 0.001 * number) for number in range(1, 10)]


def test_tensorboard_has_every_figure_under_a_name_of_its_kind(tmp_path):
    journal = Journal(tmp_path)
    journal.record(step(4) | {"distillation": 0.75})
    journal.record(epoch(1, valid_mAP=0.25, best=True, wait_share=0.125))
    journal.record(epoch(2, valid_mAP=0.5, best=True, wait_share=0.25))
    journal.close()
    expected = {
        "train/loss": [(4, 0.25)],
        "train/distillation": [(4, 0.75)],
        "train/lr": [(4, 0.004)],
        "epoch/loss": [(4, 0.5), (8, 0.5)],
        "epoch/clips_per_second": [(4, 812.5), (8, 812.5)],
        "epoch/wait_share": [(4, 0.125), (8, 0.25)],
        "valid/mAP": [(4, 0.25), (8, 0.5)],
    }
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == expected.keys()
    assert {tag: scalars(tmp_path, tag) for tag in expected} == expected


@pytest.mark.parametrize("tail", ["", '{"kind": "st'])
def test_position_0_starts_anew(tmp_path, tail):
    first = Journal(tmp_path)
    first.record(step(1, loss=7.0))
    first.record(step(2, loss=7.0))
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    second = Journal(tmp_path)
    assert second.entries() == []
    assert second.position() == 0
    second.record(step(1))
    second.close()
    assert steps_on_disk(tmp_path) == [1]
    assert scalars(tmp_path, "train/loss") == [(1, 1.0)]


def test_a_shorter_file_is_refused_and_left_as_it_is(tmp_path):
    journal = Journal(tmp_path)
    journal.record(step(1))
    position = journal.position()
    journal.close()
    with pytest.raises(UserError, match=rf"metrics\.jsonl has {position} bytes; it had {position + 5} when .* Restore"):
        Journal(tmp_path, position + 5)
    assert steps_on_disk(tmp_path) == [1]
    with pytest.raises(UserError, match="has 0 bytes; it had 10"):
        Journal(tmp_path / "elsewhere", 10)


def test_a_file_that_is_another_one_is_refused_before_anything_is_cut(tmp_path):
    content = json.dumps(step(1)) + "\n" + json.dumps(step(2)) + "\n"
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: .* is not a whole entry"):
        Journal(tmp_path, len(content) - 10)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "loss": 0.5}\n')  # of a run without step lines
    with pytest.raises(UserError, match="line 1"):
        Journal(tmp_path, 26)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1, "loss": 0.5}\n'
