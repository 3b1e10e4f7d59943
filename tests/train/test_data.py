"""Text is found, read, held back and packed as documented."""

import json

import numpy as np
import pytest

from adarankgrad.train.data import (
    PIECE_CHARACTERS,
    Files,
    count_characters,
    find_source,
    hold_back,
    split_document,
)
from adarankgrad.train.tokenizer import END_TOKEN, train_tokenizer
from adarankgrad.train.tokens import Blocks, Shuffled, encode


def documents(source):
    texts, open_text = [], ""
    for piece in source.pieces():
        open_text += piece.text
        if piece.ends_document:
            texts.append(open_text)
            open_text = ""
    assert not open_text
    return texts


def find(path, column="text"):
    return find_source(str(path), column, 10**6)


def test_a_folder_is_read_in_order_without_hidden_or_binary_files(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("first\r\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00\xff")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    assert documents(find(tmp_path)) == ["first\r\n", "second"]


def test_a_glob_finds_files_in_folders_below(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    (tmp_path / "y.txt").write_text("y")
    (tmp_path / "z.md").write_text("z")
    assert documents(find(tmp_path / "**" / "*.txt")) == ["x", "y"]


def test_rows_of_json_lines_json_and_parquet_are_documents(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"body": "one", "id": 1}, {"body": "zwei ü", "id": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json", "c.parquet"):
        assert documents(find(tmp_path / name, "body")) == ["one", "zwei ü"]


def test_a_long_document_comes_in_pieces_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} of a long text, é included\n" for i in range(90_000))
    assert len(text) > 3 * PIECE_CHARACTERS
    (tmp_path / "long.txt").write_text(text, newline="")
    pieces = list(find(tmp_path / "long.txt").pieces())
    assert len(pieces) >= 3
    assert all(piece.text.endswith("\n") for piece in pieces)
    assert max(len(piece.text) for piece in pieces) <= 2 * PIECE_CHARACTERS
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join(piece.text for piece in pieces) == text
    assert "".join(piece.text for piece in split_document(text)) == text
    assert "".join(piece.text for piece in split_document("x" * 3 * PIECE_CHARACTERS)) == "x" * len(
        "x" * 3 * PIECE_CHARACTERS
    )


def test_the_held_back_text_is_the_last_twentieth_and_nothing_is_lost(tmp_path):
    for name, size in (("a", 700), ("b", 250), ("c", 50)):
        (tmp_path / f"{name}.txt").write_text(name * size)
    source = find(tmp_path)
    assert count_characters(source) == 1000
    training, validation = hold_back(source, 1000)
    assert documents(training) == ["a" * 700, "b" * 250]
    assert documents(validation) == ["c" * 50]
    training, validation = hold_back(find(tmp_path / "a.txt"), 700)
    assert documents(training) + documents(validation) == ["a" * 665, "a" * 35]


def test_documents_are_joined_by_the_end_token_and_decode_to_the_same_text(tmp_path):
    texts = ["Grüße, world!\n", "  def f(x):\n\treturn x\n", "日本"]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text, newline="")
    tokenizer = train_tokenizer(texts, 300, 16)
    stream = encode(find(tmp_path), tokenizer)
    assert stream.dtype == np.uint16
    assert (stream == tokenizer.eos_token_id).sum() == 3
    assert tokenizer.decode(stream.tolist()) == "".join(text + END_TOKEN for text in texts)


def test_a_tokenizer_trained_twice_on_the_same_text_is_the_same():
    text = ["the cat sat on the mat and the rat ran to the cat " * 20]
    first, second = (train_tokenizer(text, 290, 16).get_vocab() for _ in range(2))
    assert first == second
    assert 257 <= len(first) <= 290


def test_every_pass_serves_every_block_once_in_an_order_given_by_the_seed():
    blocks = Blocks(np.arange(50, dtype=np.uint16), 5)
    firsts = [
        [int(item["input_ids"][0]) for item in Shuffled(blocks, 20, seed)] for seed in (0, 0, 1)
    ]
    assert firsts[0] == firsts[1] != firsts[2]
    for start in (0, 10):
        assert sorted(firsts[0][start : start + 10]) == list(range(0, 50, 5))
    assert firsts[0][:10] != firsts[0][10:]
    late = Shuffled(blocks, 20, 0)
    assert int(late[17]["input_ids"][0]) == firsts[0][17]


def test_batches_by_length_serve_every_example_once_with_little_padding():
    lengths = [1 + (7 * number) % 101 for number in range(403)]
    size = 4
    passes = [
        Shuffled(range(403), 806, 0, lengths=lengths, batch_size=size),
        Shuffled(range(403), 806, 0, batch_size=size),
    ]
    grouped, free = ([data[position] for position in range(403)] for data in passes)
    assert sorted(grouped) == list(range(403))
    assert grouped != [passes[0][403 + position] for position in range(403)]

    def num_padded(order):
        batches = [order[start : start + size] for start in range(0, 400, size)]
        return sum(size * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in batches)

    # Among 200 random lengths up to 101, neighbours differ by half a token.
    assert num_padded(grouped) < num_padded(free) / 10


def test_examples_of_one_length_are_drawn_in_batches_by_chance():
    data = Shuffled(range(64), 64, 0, lengths=[5] * 64, batch_size=2)
    order = [data[position] for position in range(64)]
    assert sorted(order) == list(range(64))
    assert order != sorted(order)


def test_a_block_out_of_range_raises():
    blocks = Blocks(np.zeros(12, dtype=np.uint16), 5)
    assert len(blocks) == 2
    with pytest.raises(IndexError):
        blocks[2]


def test_files_say_their_size_unless_compressed(tmp_path):
    (tmp_path / "a.txt").write_text("12345")
    source = find(tmp_path / "a.txt")
    assert isinstance(source, Files) and source.num_bytes() == 5
