from common.columns import align_columns

ROWS = [["", "clips", "note"], ["valid", "12", ""], ["train", "1200", "all"]]


def test_columns_on_the_left_are_padded_and_lines_end_without_spaces():
    assert align_columns(ROWS) == ["       clips  note", "valid  12", "train  1200   all"]


def test_columns_on_the_right_keep_their_width():
    assert align_columns(ROWS, "<", ">", " | ") == [
        "      | clips | note",
        "valid |    12 |     ",
        "train |  1200 |  all",
    ]
    assert align_columns([["k", "n"], ["10", "5"]], ">", ">") == [" k  n", "10  5"]
