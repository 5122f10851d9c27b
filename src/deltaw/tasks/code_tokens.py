"""The code corpus as tokens: one stream for each side of each language, known by its hash, kept in a file if wanted."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path

import torch

from .code_corpus import HEADERS, HELD_OUT, PYTHON, SHARE, File, gather

STREAMS = ("python", "python-validation", "cpp", "cpp-tune", "cpp-validation")
END = "<|end|>"  # after each file; token 0
SAMPLE = 32_000_000  # characters that the tokenizer is trained on, at most


@dataclass(frozen=True)
class Options:
    """What a corpus is made of. Checked when made.

    Args:
        packages: of Python, by distribution, "python" for the standard library; none for all that are installed.
        headers: distributions whose C++ and CUDA headers are the target; none for all that are installed.
        vocabulary: tokens, from 257 (the bytes and an end) to 32768 (16 bits, with a sign).
        share: of the headers' bytes that are drawn for "tune" and for validation, each; of Python's, where no package of
            `deltaw.tasks.code_corpus.HELD_OUT` is among them. In (0, 0.5).
    """

    packages: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    vocabulary: int = 8192
    share: float = SHARE

    def __post_init__(self):
        for name in ("packages", "headers"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
                raise TypeError(f"{name} must be a tuple of distributions' names, not {value!r}")
        if not isinstance(self.vocabulary, Integral) or not 257 <= self.vocabulary <= 2**15:
            raise ValueError(f"vocabulary must be an int from 257 to 32768, not {self.vocabulary!r}")
        if not isinstance(self.share, Real) or not 0 < self.share < 0.5:
            raise ValueError(f"share must be in (0, 0.5), not {self.share!r}")


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: it is large, and made once
class Corpus:
    """Python and C++ as token ids.

    Attributes:
        streams: by the names in `STREAMS`: int16 `(n,)`, file after file, token 0 after each.
        tokenizer: the tokenizer's JSON, as `tokenizers.Tokenizer.from_str` reads it.
        report: what was kept, {stream: {"files", "bytes", "tokens", "units"}}, and what was removed, {"python removed":
            {reason: files}} and "cpp removed".
        sha256: of the tokenizer and of each stream's ids (16 bits, little-endian), by name.
    """

    streams: dict[str, torch.Tensor]
    tokenizer: str
    report: dict[str, dict[str, int]]
    sha256: dict[str, str] = field(init=False)

    def __post_init__(self):
        hashes = {"tokenizer": hashlib.sha256(self.tokenizer.encode()).hexdigest()}
        for name, ids in self.streams.items():
            hashes[name] = hashlib.sha256(ids.numpy().astype("<i2").tobytes()).hexdigest()
        object.__setattr__(self, "sha256", hashes)

    @property
    def vocabulary(self) -> int:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer).get_vocab_size()

    def bytes_per_token(self, stream: str) -> float:
        """To turn nats a token into nats a byte."""
        return self.report[stream]["bytes"] / self.report[stream]["tokens"]

    def save(self, file: str | Path) -> None:
        """Write it, whole or not at all."""
        from safetensors.torch import save_file

        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        about = {"tokenizer": self.tokenizer, "report": json.dumps(self.report), "sha256": json.dumps(self.sha256)}
        try:
            save_file(self.streams, part, metadata=about)
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: str | Path) -> "Corpus":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is none. ValueError: if the file holds something else than was written.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(file).is_file():
            raise FileNotFoundError(f"no corpus in {file}")
        try:
            with safe_open(file, framework="pt") as tensors:
                about = tensors.metadata() or {}
                streams = {name: tensors.get_tensor(name) for name in STREAMS}  # (n,) each
            corpus = cls(streams, about["tokenizer"], json.loads(about["report"]))
            whole = corpus.sha256 == json.loads(about["sha256"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{file} is no corpus: {error}") from error
        if not whole:
            raise ValueError(f"{file} is damaged: its hashes are not those of its content")
        return corpus


def corpus(options: Options | None = None, folder: str | Path | None = None) -> Corpus:
    """The corpus of this machine: made once in a process.

    Args:
        options: what it is made of; None for `Options()`.
        folder: where it is kept as `code-….safetensors`, one file for each of the `options`: read if it is there,
            whatever is installed by now, and written otherwise. None looks at the environment variable DELTAW_CODE,
            and without it keeps no file.

    Raises:
        ValueError: as `deltaw.tasks.code_corpus.gather` and `Corpus.load`; if the texts are too few for
            the vocabulary.
    """
    folder = folder or os.environ.get("DELTAW_CODE")
    return _corpus(options or Options(), Path(folder) if folder else None)


@lru_cache(maxsize=4)
def _corpus(options: Options, folder: Path | None) -> Corpus:
    if folder is None:
        return build(options)
    key = hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode()).hexdigest()[:16]
    file = folder / f"code-{key}.safetensors"
    if not file.is_file():
        build(options).save(file)
    return Corpus.load(file)


def build(options: Options) -> Corpus:
    """Make a corpus of what is installed here. Of everything, that takes a core some minutes, and gigabytes of memory."""
    python, out = gather(PYTHON, options.packages, ("python", "python-validation"), HELD_OUT, options.share)
    cpp, cpp_out = gather(HEADERS, options.headers, ("cpp", "cpp-tune", "cpp-validation"), share=options.share)
    tokenizer = trained_tokenizer((file.text for file in _some(python["python"])), options.vocabulary)
    streams, report = {}, {}
    for name, files in {**python, **cpp}.items():
        streams[name] = encoded(tokenizer, files)
        report[name] = {"files": len(files), "bytes": sum(len(file.text.encode()) for file in files),
                        "tokens": len(streams[name]), "units": len({file.unit for file in files})}
    report |= {"python removed": dict(sorted(out.items())), "cpp removed": dict(sorted(cpp_out.items()))}
    return Corpus(streams, tokenizer.to_str(), report)


def _some(files: list[File]) -> list[File]:
    """Every second file, every third …: so that there are about `SAMPLE` characters, or all if there are fewer."""
    return files[::-(-sum(len(file.text) for file in files) // SAMPLE)]


def trained_tokenizer(texts: Iterable[str], vocabulary: int):
    """A byte-level BPE: a `tokenizers.Tokenizer` with `vocabulary` tokens.

    Raises:
        ValueError: if the texts are too few for so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"the texts give {tokenizer.get_vocab_size()} tokens, fewer than vocabulary={vocabulary}")
    return tokenizer


def encoded(tokenizer, files: list[File]) -> torch.Tensor:
    """The files' ids, token 0 after each: int16 `(n,)`."""
    pieces = []
    for start in range(0, len(files), 512):  # in parts, because a text's encoding takes many times its memory
        batch = tokenizer.encode_batch_fast([file.text for file in files[start:start + 512]], add_special_tokens=False)
        pieces += [torch.tensor([*encoding.ids, 0], dtype=torch.int16) for encoding in batch]  # (tokens + 1,)
    return torch.cat(pieces)  # (n,)
