"""Rows that are kept: made once, in order, and a line that a killed run left unfinished is made again."""

import pytest

from mmaccel.bench_rows import kept_rows


def squares(asked):
    def make(numbers):
        asked.extend(numbers)
        return ({"square": number**2} for number in numbers)

    return make


def test_only_what_is_missing_is_made(tmp_path):
    asked = []
    first = kept_rows("squares", 3, tmp_path, squares(asked))
    assert first == [{"pair": number, "square": number**2} for number in range(3)]
    assert kept_rows("squares", 5, tmp_path, squares(asked))[:3] == first
    assert kept_rows("squares", 2, tmp_path, squares(asked)) == first[:2]
    assert asked == [0, 1, 2, 3, 4]


def test_a_run_that_is_killed_goes_on_where_it_stopped(tmp_path):
    def killed(numbers):
        yield {"square": 0}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_rows("squares", 3, tmp_path, killed, key="number")
    file = tmp_path / "squares.jsonl"
    file.write_text(file.read_text() + '\n{"number": 1, "squ')
    asked = []
    rows = kept_rows("squares", 3, tmp_path, squares(asked), key="number")
    assert asked == [1, 2] and [row["square"] for row in rows] == [0, 1, 4]


def test_too_few_rows_are_noticed():
    with pytest.raises(ValueError, match="shorter"):
        kept_rows("squares", 2, None, lambda numbers: [{"square": 0}])
