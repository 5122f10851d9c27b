"""The code corpus as token ids: the same twice, counted, hashed, kept in a file."""

import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deltaw.tasks import code_tokens
from deltaw.tasks.code_corpus import File
from deltaw.tasks.code_tokens import (
    STREAMS,
    Corpus,
    Options,
    build,
    corpus,
    encoded,
    trained_tokenizer,
)

OPTIONS = Options(("filelock", "fsspec", "jinja2", "packaging"), ("numpy", "pyarrow"), 400, 0.15)


@pytest.fixture(scope="module")
def made():
    return corpus(OPTIONS)


def test_streams_are_ids_and_the_report_counts_them(made):
    from tokenizers import Tokenizer

    assert tuple(made.streams) == STREAMS and made.vocabulary == 400
    tokenizer = Tokenizer.from_str(made.tokenizer)
    for name, ids in made.streams.items():
        assert ids.dtype == torch.int16 and 0 <= ids.min() and ids.max() < 400
        report = made.report[name]
        assert report["tokens"] == len(ids) and report["files"] == (ids == 0).sum() and report["units"] >= 1
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        assert len(text.encode()) == report["bytes"]
        assert made.bytes_per_token(name) == report["bytes"] / len(ids)
    assert "import" in text or "#include" in text
    assert made.bytes_per_token("python") > made.bytes_per_token("cpp")  # the tokenizer has seen no C++


def test_the_corpus_is_the_same_each_time(made):
    again = build(OPTIONS)
    assert again.sha256 == made.sha256 and again.report == made.report
    assert set(made.sha256) == {"tokenizer", *STREAMS} and len(set(made.sha256.values())) == 6
    assert corpus(OPTIONS) is made


def test_a_corpus_is_written_and_read_again(made, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CODE", str(tmp_path / "code"))
    written = corpus(OPTIONS)
    [file] = (tmp_path / "code").iterdir()
    assert written.sha256 == made.sha256 and written is corpus(OPTIONS, tmp_path / "code")
    monkeypatch.setattr(code_tokens, "build", None)
    again = code_tokens._corpus.__wrapped__(OPTIONS, tmp_path / "code")  # as another process would
    assert again.report == made.report and Corpus.load(file).tokenizer == made.tokenizer


def test_a_file_that_is_no_corpus_is_refused(made, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
        Corpus.load(tmp_path / "x.safetensors")
    other = tmp_path / "other.safetensors"
    other.write_text("nothing")
    with pytest.raises(ValueError, match="no corpus"):
        Corpus.load(other)
    made.save(other)
    with safe_open(other, framework="pt") as tensors:
        about = tensors.metadata()
    save_file({**made.streams, "cpp": made.streams["cpp"][1:].clone()}, other, metadata=about)
    with pytest.raises(ValueError, match="damaged"):
        Corpus.load(other)


def test_the_tokenizer_needs_text_enough():
    with pytest.raises(ValueError, match="fewer than vocabulary=8192"):
        trained_tokenizer(["import os\n"], 8192)
    tokenizer = trained_tokenizer(["import os\nvalue = os.environ.get(name)\n"], 265)
    files = [File("a", "a", text) for text in ("x = 1\n", "y — ö\n")]
    ids = encoded(tokenizer, files)  # (n,)
    ends = (ids == 0).nonzero().flatten().tolist()
    assert ends[-1] == len(ids) - 1 and len(ends) == 2
    assert tokenizer.decode(ids[ends[0] + 1:-1].tolist()) == "y — ö\n"  # any byte is known


@pytest.mark.parametrize(("name", "value", "error"), [
    ("packages", ["tqdm"], TypeError), ("headers", "numpy", TypeError), ("vocabulary", 256, ValueError),
    ("vocabulary", 40_000, ValueError), ("share", 0.5, ValueError)])
def test_bad_options_are_named(name, value, error):
    with pytest.raises(error, match=name):
        dataclasses.replace(OPTIONS, **{name: value})
