from common.columns import align_columns, format_markdown_table

ROWS = [["", "clips", "note"], ["valid", "12", ""], ["train", "1200", "all"]]


def test_columns_are_as_wide_as_their_longest_cell_and_lines_end_without_spaces():
    assert align_columns(ROWS).splitlines() == ["       clips  note", "valid  12", "train  1200   all"]


def test_each_column_has_its_alignment_and_further_ones_that_of_the_last():
    assert align_columns(ROWS, "<>").splitlines() == ["       clips  note", "valid     12", "train   1200   all"]
    assert align_columns([["k", "n"], ["10", "5"]], ">") == " k  n\n10  5"


def test_a_markdown_table_has_a_rule_with_the_alignment_below_its_header():
    assert format_markdown_table(ROWS).splitlines() == [
        "|       | clips | note |",
        "| ---   |  ---: | ---: |",
        "| valid |    12 |      |",
        "| train |  1200 |  all |",
    ]
    assert format_markdown_table([["r", "note"], ["5", "a"]], "><").splitlines() == [
        "|    r | note |",
        "| ---: | ---  |",
        "|    5 | a    |",
    ]
