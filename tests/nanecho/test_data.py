import json
import os
import pickle
import shutil

import numpy as np
import orjson
import pytest
from blake3 import blake3

from ckptcache.errors import DataNotFound, DataTooSmall, InvalidTokenFile, TokenOutOfRange
from ckptcache.nanecho import text as textfiles
from ckptcache.nanecho.data import load_corpus
from ckptcache.nanecho.text import split_by_file, split_by_position, text_files

LINE = "all that is gold does not glitter\n"


class KeptArrays:
    """Keeps arrays by key and configuration, in files, as a data cache does."""

    def __init__(self, folder):
        self.folder, self.built = folder, []
        folder.mkdir()

    def get(self, key, build, *, config):
        path = self.folder / f"{blake3(orjson.dumps([key, config], option=orjson.OPT_SORT_KEYS)).hexdigest()}.npz"
        if not path.exists():
            self.built.append(key)
            np.savez(path, **build())
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)


def write_texts(folder, count=40):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"part{i:03}.txt").write_text(f"file {i}\n{LINE * 5}", encoding="utf-8")
    return folder


def write_tokens(folder, train=None, val=None, meta=None):
    folder.mkdir(parents=True, exist_ok=True)
    np.asarray(range(500) if train is None else train, dtype="<u2").tofile(folder / "train.bin")
    np.asarray(range(200) if val is None else val, dtype="<u2").tofile(folder / "val.bin")
    if meta is not None:
        (folder / "meta.json").write_text(meta if isinstance(meta, str) else json.dumps(meta), encoding="utf-8")
    return folder


def digest(tokens):
    return f"blake3:{blake3(tokens.tobytes()).hexdigest()}"


def file_numbers(tokens):
    lines = tokens.tobytes().decode().splitlines()
    return {int(line.split()[1]) for line in lines if line.startswith("file ")}


# --- text ----------------------------------------------------------------------------------------


def test_text_becomes_bytes_split_by_file(tmp_path):
    corpus = load_corpus(write_texts(tmp_path / "texts"), block_size=32)
    assert corpus.vocab_size == 256
    assert corpus.train.dtype == corpus.val.dtype == np.uint8
    train, val = file_numbers(corpus.train), file_numbers(corpus.val)
    assert train | val == set(range(40))
    assert not train & val
    assert 1 <= len(val) <= 10
    assert corpus.notes == ()
    assert corpus.data_config == {
        "kind": "text",
        "tokenisation": "bytes",
        "train_digest": digest(corpus.train),
        "val_digest": digest(corpus.val),
        "train_tokens": len(corpus.train),
        "val_tokens": len(corpus.val),
    }


def test_added_files_change_no_other_file_s_side(tmp_path):
    folder = write_texts(tmp_path, 40)
    before = file_numbers(load_corpus(folder, block_size=32).val)
    after = file_numbers(load_corpus(write_texts(folder, 400), block_size=32).val)
    assert {n for n in after if n < 40} == before
    assert 20 <= len(after) <= 60


def test_a_copy_of_a_folder_is_the_same_data(tmp_path):
    folder = write_texts(tmp_path / "one" / "texts")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "a.md").write_text(LINE, encoding="utf-8")
    shutil.copytree(folder, tmp_path / "two")
    first, second = (load_corpus(path, block_size=32) for path in (folder, tmp_path / "two"))
    assert first.data_config == second.data_config


def test_a_single_file_is_split_at_a_line_end_and_said_so(tmp_path):
    (tmp_path / "a.txt").write_text(LINE * 100, encoding="utf-8")
    corpus = load_corpus(tmp_path, block_size=32)
    assert corpus.train.tobytes() == LINE.encode() * 90
    assert corpus.val.tobytes() == LINE.encode() * 10
    assert "for validation" in corpus.notes[0]


def test_only_regular_visible_text_files_are_taken(tmp_path):
    folder = write_texts(tmp_path / "texts", 30)
    secret = tmp_path / "secret.txt"
    secret.write_text("SECRET\n" * 100, encoding="utf-8")
    (folder / "link.txt").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.txt")
    (folder / ".hidden.txt").write_text("SECRET", encoding="utf-8")
    (folder / ".git").mkdir()
    (folder / ".git" / "a.txt").write_text("SECRET", encoding="utf-8")
    (folder / "picture.png").write_text("SECRET", encoding="utf-8")
    assert [f.name for f in text_files(folder)] == [f"part{i:03}.txt" for i in range(30)]
    corpus = load_corpus(folder, block_size=32)
    assert b"SECRET" not in corpus.train.tobytes() + corpus.val.tobytes()


def test_what_is_not_utf8_is_left_out_and_counted(tmp_path):
    folder = write_texts(tmp_path)
    (folder / "latin1.txt").write_bytes("déjà vu".encode("latin-1"))
    (folder / "utf16.md").write_bytes("déjà vu".encode("utf-16"))
    corpus = load_corpus(folder, block_size=32)
    assert corpus.notes == ("2 files were left out, because they are not UTF-8",)
    shutil.rmtree(tmp_path)
    assert corpus.data_config == load_corpus(write_texts(tmp_path), block_size=32).data_config


@pytest.mark.parametrize("seed", range(30))
def test_a_split_never_leaves_a_side_without_a_block_where_there_is_a_way(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 60, rng.integers(2, 12))
    files = [textfiles.TextFile(f"{seed}-{i}", int(size), 0) for i, size in enumerate(sizes)]
    split = split_by_file(files, needed=20)
    if split is None:
        text = b"x" * sum(sizes)
        assert len(text) < 40 or all(len(part) >= 20 for part in split_by_position(text, 20))
        return
    assert all(sum(f.size for f in part) >= 20 for part in split)
    assert sorted(f.name for part in split for f in part) == sorted(f.name for f in files)


def test_more_files_join_validation_until_it_holds_a_block():
    files = [textfiles.TextFile(f"{i}.txt", 10, 0) for i in range(40)]
    small, large = (split_by_file(files, needed) for needed in (10, 100))
    assert small is not None
    assert large is not None
    assert len(small[1]) < 10 == len(large[1])
    assert set(small[1]) < set(large[1])


def test_a_tiny_file_beside_a_big_one_does_not_starve_validation(tmp_path):
    (tmp_path / "big.txt").write_text(LINE * 300, encoding="utf-8")
    (tmp_path / "tiny.txt").write_text("tiny\n", encoding="utf-8")
    corpus = load_corpus(tmp_path, block_size=64)
    assert len(corpus.train) + len(corpus.val) == len(LINE) * 300 + 5
    assert min(len(corpus.train), len(corpus.val)) > 64


# --- the default ---------------------------------------------------------------------------------


def test_without_a_folder_the_standard_library_is_the_text():
    corpus, again = (load_corpus(None, block_size=128) for _ in range(2))
    assert corpus.data_config == again.data_config
    assert corpus.data_config["kind"] == "stdlib"
    assert 1_000_000 < len(corpus.train) <= 8_100_000
    assert 0.02 < len(corpus.val) / len(corpus.train) < 0.25
    assert b"def __init__(self" in corpus.train.tobytes()


def test_the_default_leaves_out_tests_and_what_differs_between_machines():
    names = [f.name for f in textfiles.stdlib_files()]
    assert names == sorted(names)
    assert not [n for n in names if {"test", "tests", "site-packages", "idlelib"} & set(n.split("/"))]
    assert not [n for n in names if "_sysconfigdata" in n]


def test_a_python_without_its_source_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataNotFound, match="--data_dir"):
        load_corpus(None, block_size=8)


# --- the data cache ------------------------------------------------------------------------------


def test_text_is_prepared_once_until_it_changes(tmp_path):
    folder, cache = write_texts(tmp_path / "texts"), KeptArrays(tmp_path / "kept")
    (folder / "latin1.txt").write_bytes("déjà vu".encode("latin-1"))
    plain = load_corpus(folder, block_size=32)
    for _ in range(2):
        cached = load_corpus(folder, cache, block_size=32)
        assert cached.data_config == plain.data_config
        assert cached.notes == plain.notes
        assert np.array_equal(cached.train, plain.train)
    assert cache.built == ["text"]
    (folder / "part000.txt").write_text("something else\n", encoding="utf-8")
    assert load_corpus(folder, cache, block_size=32).data_config != plain.data_config
    assert cache.built == ["text", "text"]


def test_the_default_is_prepared_once(tmp_path):
    cache = KeptArrays(tmp_path / "kept")
    first, second = (load_corpus(None, cache, block_size=128) for _ in range(2))
    assert first.data_config == second.data_config
    assert cache.built == ["stdlib"]


def test_token_files_are_scanned_once_until_they_change(tmp_path):
    folder, cache = write_tokens(tmp_path / "tokens", meta={"vocab_size": 500}), KeptArrays(tmp_path / "kept")
    first, second = (load_corpus(folder, cache, block_size=8) for _ in range(2))
    assert first.data_config == second.data_config == load_corpus(folder, block_size=8).data_config
    assert cache.built == ["tokens-scan"] * 2
    write_tokens(folder, val=[501] * 200)  # as long as before, so only the time of the change tells
    os.utime(folder / "val.bin", ns=(0, 0))
    with pytest.raises(TokenOutOfRange):
        load_corpus(folder, cache, block_size=8)


# --- tokens --------------------------------------------------------------------------------------


def test_token_files_are_mapped(tmp_path):
    corpus = load_corpus(write_tokens(tmp_path, meta={"vocab_size": 512, "tokenisation": "bpe"}), block_size=8)
    assert isinstance(corpus.train, np.memmap)
    assert corpus.vocab_size == 512
    assert corpus.train.tolist() == list(range(500))
    assert corpus.data_config["kind"] == "tokens"
    assert corpus.data_config["tokenisation"] == "bpe"
    assert corpus.data_config["val_digest"] == digest(corpus.val)
    assert corpus.data_config["train_tokens"] == 500


@pytest.mark.parametrize(("largest", "guess"), [(64, 256), (499, 500)])
def test_a_missing_meta_is_guessed_and_said(tmp_path, largest, guess):
    write_tokens(tmp_path, train=[0, largest] * 100)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3}))
    with pytest.warns(UserWarning, match=rf"meta.json is missing \(meta.pkl is not read.*taken to be {guess}"):
        assert load_corpus(tmp_path, block_size=8).vocab_size == guess


def test_a_settled_vocabulary_needs_no_meta(tmp_path):
    assert load_corpus(write_tokens(tmp_path), block_size=8, vocab_size=600).vocab_size == 600


# --- bad input -----------------------------------------------------------------------------------


def test_a_missing_folder_and_a_file_in_its_place(tmp_path):
    with pytest.raises(DataNotFound, match="no such folder"):
        load_corpus(tmp_path / "nowhere", block_size=8)
    (tmp_path / "a.txt").write_text(LINE, encoding="utf-8")
    with pytest.raises(DataNotFound, match="it is a file, and a folder is needed"):
        load_corpus(tmp_path / "a.txt", block_size=8)


def test_a_folder_with_nothing_to_use(tmp_path):
    with pytest.raises(DataNotFound, match="no text files"):
        load_corpus(tmp_path, block_size=8)
    (tmp_path / "a.txt").write_bytes(b"\xff\xff")
    with pytest.raises(DataNotFound, match="UTF-8"):
        load_corpus(tmp_path, block_size=8)


@pytest.mark.parametrize("content", ["", "short\n", "x" * 129 + "\n"])
def test_too_little_text_for_a_block(tmp_path, content):
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    with pytest.raises(DataTooSmall, match="one block needs 129: add text, or lower block_size"):
        load_corpus(tmp_path, block_size=128)


@pytest.mark.parametrize("part", ["train", "val"])
def test_too_few_tokens_for_a_block(tmp_path, part):
    write_tokens(tmp_path, **{part: range(8)}, meta={"vocab_size": 500})
    with pytest.raises(DataTooSmall, match="8 tokens, and one block needs 9"):
        load_corpus(tmp_path, block_size=8)


def test_an_empty_token_file(tmp_path):
    write_tokens(tmp_path, val=[], meta={"vocab_size": 500})
    with pytest.raises(DataTooSmall, match="holds 0 tokens"):
        load_corpus(tmp_path, block_size=8)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_one_token_file_alone(tmp_path, name):
    write_tokens(tmp_path, meta={"vocab_size": 500})
    (tmp_path / name).unlink()
    with pytest.raises(DataNotFound, match=f"{name} is not"):
        load_corpus(tmp_path, block_size=8)


def test_an_odd_number_of_bytes(tmp_path):
    write_tokens(tmp_path, meta={"vocab_size": 500})
    with (tmp_path / "train.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InvalidTokenFile, match=r"train\.bin .* 1001 bytes"):
        load_corpus(tmp_path, block_size=8)


@pytest.mark.parametrize("part", ["train", "val"])
def test_tokens_beyond_the_vocabulary(tmp_path, part):
    write_tokens(tmp_path, **{part: [0] * 300 + [777]}, meta={"vocab_size": 500})
    with pytest.raises(TokenOutOfRange, match=rf"{part}\.bin holds token 777, .* ends at 499: .* at least 778"):
        load_corpus(tmp_path, block_size=8)


def test_tokens_beyond_the_model_s_vocabulary(tmp_path):
    with pytest.raises(TokenOutOfRange, match="ends at 99"):
        load_corpus(write_tokens(tmp_path / "a", meta={"vocab_size": 500}), block_size=8, vocab_size=100)
    with pytest.raises(TokenOutOfRange, match="ends at 99"):
        load_corpus(write_texts(tmp_path / "b"), block_size=8, vocab_size=100)
    assert load_corpus(tmp_path / "b", block_size=8, vocab_size=300).vocab_size == 300


@pytest.mark.parametrize(
    "meta", ["{", "[]", "{}", {"vocab_size": 0}, {"vocab_size": "500"}, {"vocab_size": True}, {"vocab_size": 500.5}]
)
def test_a_broken_meta(tmp_path, meta):
    with pytest.raises(InvalidTokenFile, match=r"meta\.json"):
        load_corpus(write_tokens(tmp_path, meta=meta), block_size=8)


def test_a_meta_with_a_tokenisation_that_is_no_text(tmp_path):
    with pytest.raises(InvalidTokenFile, match="tokenisation"):
        load_corpus(write_tokens(tmp_path, meta={"vocab_size": 500, "tokenisation": 3}), block_size=8)
