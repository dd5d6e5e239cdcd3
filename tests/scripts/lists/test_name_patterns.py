import pytest

from common.errors import UserError
from scripts.lists.name_patterns import NamePattern, choose_label, propose_labels, suggest_groups


@pytest.mark.parametrize(
    ("pattern", "name", "columns"),
    [
        ("{label}_{speaker}_{}.wav", "x/dog_anna_1_2.wav", ["dog", "anna"]),
        ("{label}_{speaker}_{}", "dog_anna_1.FLAC", ["dog", "anna"]),
        ("{label}_{speaker}_{}.wav", "dog_anna_1.flac", None),  # another extension
        ("{label}_{speaker}_{}.{}", "dog_anna_1.ogg", ["dog", "anna"]),
        ("{label}_{speaker}_{}.WAV", "dog_anna_1.wav", ["dog", "anna"]),
        ("{}_{label}", "a_b_dog.wav", ["dog"]),  # {} takes as much as fits, a name as little
        ("{label}_{}", "dog_a_b.wav", ["dog"]),
        ("{label}_{:d}", "dog_bark_01.wav", ["dog_bark"]),
        ("{label}{take:d}", "dog12.wav", ["dog", "12"]),  # all digits
        ("{label}_{}", "dog.wav", None),
        ("{split}/{label}/{}.wav", "train/dog/a.wav", ["train", "dog"]),
        ("{split}/{label}/{}.wav", "train/dog/deep/a.wav", None),
        ("{label}/{label}_{}", "dog/dog_1.wav", ["dog"]),
        ("{label}/{label}_{}", "dog/cat_1.wav", None),
        ("{label} (50 %) [x].{}", "a/b+c (50 %) [x].wav", ["b+c"]),  # nothing of it is a regular expression
        ("{größe}-{label}", "12-日本.wav", ["12", "日本"]),
    ],
)
def test_a_pattern_reads_names(pattern, name, columns):
    assert NamePattern(pattern).match(name) == columns


def test_columns_are_the_names_of_the_placeholders():
    assert NamePattern("{split}/{label}/{label}_{}_{take:d}.wav").columns == ["split", "label", "take"]


def test_the_other_reading_takes_as_much_as_fits():
    pattern = NamePattern("{label}_{}")
    assert pattern.match("dog_bark_1.wav") == ["dog"]
    assert pattern.match_other("dog_bark_1.wav") == ["dog_bark"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("dog", "no placeholder"),
        ("{label", "unbalanced braces"),
        ("label}", "unbalanced braces"),
        ("{label}{}", "no text separates {label} from {}"),
        ("{la bel}_{}", "{la bel} is no placeholder"),
        ("{label:s}_{}", "{label:s} is no placeholder"),
        ("{labels}_{}", "expected {label}"),
        ("{label}_{filename}", "another name"),
    ],
)
def test_a_wrong_pattern_is_an_error(pattern, message):
    with pytest.raises(UserError) as error:
        NamePattern(pattern)
    assert message in str(error.value)


def test_parts_that_take_few_values_are_proposed():
    names = [f"{label}_{take}-{label}{take}.wav" for label in ("dog", "cat", "cow") for take in range(12)]
    (proposal,) = propose_labels(names)
    assert (proposal.pattern, proposal.values) == ("{label}_{}", ["cat", "cow", "dog"])
    assert choose_label([proposal]) is proposal
    assert all(NamePattern(proposal.pattern).match(name)[0] in proposal.values for name in names)


def test_a_part_at_the_end_is_proposed_as_the_pattern_reads_it():
    names = [f"take_{take}-a-{label}.wav" for label in ("dog", "cat") for take in range(9)]
    (proposal,) = [proposal for proposal in propose_labels(names) if proposal.pattern == "{}-{label}"]
    assert {NamePattern(proposal.pattern).match(name)[0] for name in names} == {"dog", "cat"} == {*proposal.values}


@pytest.mark.parametrize(
    "names",
    [
        [
            f"{digit}_{speaker}_{take}.wav" for digit in range(3) for speaker in ("jo", "al") for take in range(5)
        ],  # numbers
        [
            f"{label}_{take}_{place}.wav" for label in ("dog", "cat") for place in ("in", "out") for take in range(9)
        ],  # two
        [f"dog_{take}.wav" for take in range(20)],  # one value
        [f"clip{take}_x{take}.wav" for take in range(20)],  # a value a name
        [*(f"{label}_{take}.wav" for label in ("dog", "cat") for take in range(9)), "other.wav"],  # not in every name
    ],
)
def test_names_that_leave_a_doubt_choose_nothing(names):
    assert choose_label(propose_labels(names)) is None


def test_cuts_of_recordings_are_suggested_as_groups():
    cuts = [
        f"{label}/{label}_rec{number}_{cut:02d}.wav"
        for label in ("dog", "cat")
        for number in range(9)
        for cut in (1, 2)
    ]
    message = suggest_groups(cuts, 2)
    assert "cat/cat_rec0_01.wav and cat/cat_rec0_02.wav" in message
    assert "{recording}_{:d}" in message
    assert suggest_groups([f"{label}_{number}.wav" for label in ("dog", "cat") for number in range(30)], 2) == ""
    assert suggest_groups([f"dog/{number:05d}.wav" for number in range(30)], 1) == ""
    deep = [f"{label}/rec{number}/{cut}.wav" for label in ("dog", "cat") for number in range(9) for cut in (1, 2)]
    assert "--group folder" in suggest_groups(deep, 2)
