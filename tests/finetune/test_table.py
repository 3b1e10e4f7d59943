"""Rows are read as they are written, and columns are found by name."""

from __future__ import annotations

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from adarankgrad.finetune.columns import find_answer, find_label, find_pair, find_text
from adarankgrad.finetune.table import Table, read_table
from adarankgrad.train import UserError


def table_of(*columns):
    return Table("films.csv", columns, [])


def test_quotes_of_a_tsv_are_characters(tmp_path):
    path = tmp_path / "mrpc.tsv"
    path.write_text('\ufeffQuality\t#1 String\n1\t" He said\n0\tShe "quoted" him .\n', "utf-8")
    table = read_table(str(path))
    assert table.columns == ("Quality", "#1 String")
    assert [row["#1 String"] for row in table.rows] == ['" He said', 'She "quoted" him .']


def test_quotes_of_a_csv_hold_commas_and_lines(tmp_path):
    path = tmp_path / "films.csv"
    path.write_text('text,label\n"a, b\nc ""d""",null\nNA,1.0\n', "utf-8")
    assert read_table(str(path)).rows == [
        {"text": 'a, b\nc "d"', "label": "null"},
        {"text": "NA", "label": "1.0"},
    ]


def test_an_empty_name_of_a_column_gets_its_number(tmp_path):
    (tmp_path / "a.csv").write_text(",AASeq\n0,YTI\n")
    assert read_table(str(tmp_path / "a.csv")).columns == ("column 1", "AASeq")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_typed_rows_keep_their_types(name, tmp_path):
    rows = [{"text": "a\u2028b", "label": 1}, {"text": "c", "label": None}]
    path = tmp_path / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    else:
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    assert read_table(str(path)).rows == rows


def test_several_files_are_one_table(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    texts = [row["text"] for row in read_table(f"{tmp_path}/[ab].jsonl,{tmp_path}/c.jsonl").rows]
    assert texts == ["a", "b", "c"]
    assert [row["text"] for row in read_table(str(tmp_path)).rows] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.tsv", "text\tlabel\nx\t1\ty\n", "line 2 has 3 fields, and the header has 2"),
        ("a.csv", 'text,label\n"x,1\n', "line 2 cannot be read"),
        ("a.csv", "text,text\nx,1\n", "two columns named 'text'"),
        ("a.jsonl", '{"text": "x"}\n{"text"\n', "line 2 is not valid JSON"),
        ("a.json", "[1]", "row 1 is not an object"),
        ("a.parquet", "no", "not a valid parquet file"),
        ("a.csv", "text\n", "has no rows"),
        ("a.xlsx", "x", "is none of .csv, .tsv"),
    ],
)
def test_a_broken_file_is_named_with_the_place(name, content, match, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=match):
        read_table(str(tmp_path / name))


def test_data_that_are_not_there_are_no_name_on_the_hub():
    with pytest.raises(UserError, match="'missing/films.csv' does not exist"):
        read_table("missing/films.csv")


def test_a_dataset_of_the_hub_gives_the_names_of_its_classes(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        )
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("adarankgrad.finetune.table.ask_for_dataset", lambda name: True)
    table = read_table("owner/films:small", split="validation")
    assert asked == [("owner/films", "small", "validation")]
    assert table.rows == [{"text": "a", "label": "yes"}, {"text": "b", "label": None}]
    for name in ("owner/films@test", "owner/films:small@test"):
        read_table(name, split="validation")
    assert asked[1:] == [("owner/films", None, "test"), ("owner/films", "small", "test")]


@pytest.mark.parametrize("name", ["owner/films:", "owner/films@", "owner/films:small@"])
def test_a_name_on_the_hub_has_no_empty_part(name):
    with pytest.raises(UserError, match=f"'{name}' does not exist"):
        read_table(name)


def test_columns_are_found_whatever_their_case():
    assert find_text(table_of("ID", "Sentence", "label"), None) == {"text": "Sentence"}
    assert find_label(table_of("Quality", "#1 String"), None) == {"label": "Quality"}
    assert find_pair(table_of("score", "sentence1", "sentence2"), None, None) == {
        "text": "sentence1",
        "pair": "sentence2",
    }
    assert find_answer(table_of("question", "answer"), None, None) == {
        "prompt": "question",
        "completion": "answer",
    }


def test_a_named_column_goes_before_a_known_one():
    assert find_text(table_of("text", "AASeq"), "AASeq") == {"text": "AASeq"}


@pytest.mark.parametrize(
    ("find", "match"),
    [
        (lambda: find_text(table_of("a", "b"), None), "name one of a, b with --text-column"),
        (lambda: find_text(table_of("text", "review"), None), r"more than one.*\(text, review\)"),
        (lambda: find_text(table_of("a"), "b"), "no column 'b': name one of a"),
        (lambda: find_pair(table_of("a", "b"), "a", None), "the other with --pair-column"),
        (lambda: find_answer(table_of("a"), None, "a"), "the other with --prompt-column"),
    ],
)
def test_columns_that_cannot_be_told_are_asked_for(find, match):
    with pytest.raises(UserError, match=match):
        find()
