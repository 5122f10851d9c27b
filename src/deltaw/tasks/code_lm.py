"""A language model of Python learns C++ and CUDA: next-token prediction, with a loss that resolves small differences.

The base is a decoder of Llama's architecture, trained from nothing on the Python of the installed packages
(`code_corpus`, `code_base`). Adapters then adapt it to the C++ and CUDA headers of those packages; what is forgotten of
Python is measured in the same pass.
"""

import copy
import os
from collections.abc import Iterator
from functools import lru_cache
from numbers import Integral
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from .code_base import Base, Pretrained, kept, pretrain
from .code_tokens import Corpus, Options, corpus
from .task import Batch, Measured, Task

# And the streams they come from. "report" is the target, called as the search for a learning rate calls it.
SETS = {"target": "cpp-validation", "report": "cpp-validation", "tune": "cpp-tune", "python": "python-validation"}
WINDOWS = 512  # examples of each set, at most, unless told


class CodeTask(Task):
    """What is the next token? A batch has ids (batch, length + 1) int64, and as labels the number of the set, (batch,).

    Files lie one after the other, cut into windows of `length` tokens to predict: one may begin in one file and end in the
    next. The examples of a set that is measured are evenly spaced over its stream.

    Attributes:
        train: windows of the training side, (n, length + 1) int16.
        held_out: windows of each set that is measured, (n, length + 1) int16, by its name.
        length: tokens that an example predicts.
        blocks: into how many parts, in the order of the files, each set is divided, if at all.
    """

    def __init__(self, source: Corpus, train: str, sets: tuple[str, ...], length: int, windows: int, blocks: int = 0):
        self.train = _windows(source, train, length, None)
        self.held_out = {name: _windows(source, SETS[name], length, windows) for name in sets}
        self.vocabulary, self.length, self.blocks = source.vocabulary, length, blocks
        if fewest := [name for name, rows in self.held_out.items() if len(rows) < blocks]:
            raise ValueError(f"blocks={blocks}, but {fewest[0]!r} has {len(self.held_out[fewest[0]])} examples only")

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """One shuffled epoch after another: every batch is full, and the stream of examples depends on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        while True:
            while len(order) < batch_size:
                order = torch.cat([order, torch.randperm(len(self.train), generator=generator)])
            rows, order = order[:batch_size], order[batch_size:]  # (batch,)
            yield {"ids": self.train[rows].long(), "labels": torch.zeros(batch_size, dtype=torch.long)}

    def validation(self, batch_size: int) -> Iterator[Batch]:
        for number, ids in enumerate(self.held_out.values()):
            for part in ids.split(batch_size):
                yield {"ids": part.long(), "labels": torch.full((len(part),), number)}  # (batch, length + 1), (batch,)

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Each example's mean cross-entropy, in nats a token, (batch,)."""
        ids = batch["ids"]
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # (batch, length, vocabulary)
        if logits.dtype != torch.float64:
            logits = logits.float()
        # Flat, because of these losses that on (batch, vocabulary, length) adds in no fixed order on a GPU.
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")  # (batch · length,)
        return loss.view(len(ids), -1).mean(1)  # (batch,)

    predict = losses

    def metrics(self, predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """The mean loss of each set, as "target/loss" and so on, and the first set's as "loss" too.

        With `blocks`, `Measured.examples` has those of each set's parts, "target/blocks" and so on, numbers with a space
        between them: neighbouring windows are of one file or folder and resemble each other, so that these, and not
        single examples, are to be drawn in a bootstrap.
        """
        sets = [(name, predictions[labels == number].double()) for number, name in enumerate(self.held_out)]  # (n,) each
        metrics = {"loss": sets[0][1].mean().item()} | {f"{name}/loss": each.mean().item() for name, each in sets}
        parts = {name: [part.mean().item() for part in each.tensor_split(self.blocks)] for name, each in sets if self.blocks}
        blocks = {f"{name}/blocks": " ".join(f"{loss:.6f}" for loss in each) for name, each in parts.items()}
        return Measured(metrics, blocks)

    def __repr__(self):
        sizes = ", ".join(f"{name}={len(ids)}" for name, ids in self.held_out.items())
        return f"{type(self).__name__}(train={len(self.train)}, {sizes}, length={self.length})"


class AdaptationTask(CodeTask):
    """`CodeTask` on C++ and CUDA headers, whose base model was trained on Python."""

    def __init__(
        self, source: Corpus, base: Base, sets: tuple[str, ...], windows: int, blocks: int, folder: Path | None,
        device: str | None,
    ):
        super().__init__(source, "cpp", sets, base.length, windows, blocks)
        self.source, self.base, self.folder, self.device = source, base, folder, device

    @property
    def pretraining(self) -> CodeTask:
        """What the base was trained on: Python."""
        return _python(self.source, self.base)

    @property
    def pretrained(self) -> Pretrained:
        """The base: trained the first time, and kept for the process."""
        return _pretrained(self.base, self.source, self.folder, self.device)

    def model(self) -> nn.Module:
        """A `LlamaForCausalLM` that was trained on Python: once in a process, then copied."""
        return copy.deepcopy(self.pretrained.model)


def code_lm(
    base: Base | None = None,
    options: Options | None = None,
    *,
    sets: tuple[str, ...] = ("target", "python"),
    windows: int = WINDOWS,
    blocks: int = 0,
    folder: str | None = None,
    device: str | None = None,
) -> AdaptationTask:
    """Adapt a language model of Python to C++ and CUDA headers.

    Args:
        base: how the base is trained, the first time a model is asked for; None for `Base()`.
        options: what the corpus is made of; None for `Options()`, all that is installed.
        sets: what is measured: "target" or "report" (headers, validation), "tune" (headers, to choose by) and "python"
            (what is left of Python). The first one's loss is "loss".
        windows: examples of each set, at most.
        blocks: as in `CodeTask`; 0 for none.
        folder: where the corpus is kept, see `deltaw.tasks.code_tokens.corpus`, and the base: one file for each way to
            train it, each corpus, kind of device and version of PyTorch. None looks at the environment variable DELTAW_CODE,
            and without it keeps no file.
        device: "cpu" to train the base on the CPU; None for a GPU where there is one.

    Raises:
        ValueError: if an argument is not allowed, or the corpus cannot be made here.
    """
    if not sets or len(set(sets)) < len(sets) or not set(sets) <= set(SETS):
        raise ValueError(f"sets must be some of {tuple(SETS)}, each once, not {sets!r}")
    for name, value, least in (("windows", windows, 1), ("blocks", blocks, 0)):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, not {value!r}")
    folder = folder or os.environ.get("DELTAW_CODE")
    where = Path(folder) if folder else None
    return AdaptationTask(corpus(options, where), base or Base(), tuple(sets), windows, blocks, where, device)


@lru_cache(maxsize=4)
def _pretrained(base: Base, source: Corpus, folder: Path | None, device: str | None) -> Pretrained:
    task = _python(source, base)
    return pretrain(base, task, device) if folder is None else kept(base, task, source.sha256, folder, device)


def _python(source: Corpus, base: Base) -> CodeTask:
    return CodeTask(source, "python", ("python",), base.length, WINDOWS)


def _windows(source: Corpus, stream: str, length: int, at_most: int | None) -> torch.Tensor:
    """The stream's windows, (n, length + 1) int16: each begins with the last token of the one before."""
    ids = source.streams[stream]
    if len(ids) <= length:
        raise ValueError(f"{stream!r} has {len(ids)} tokens, too few for an example of {length}")
    windows = ids.unfold(0, length + 1, length)  # (n, length + 1), a view
    if at_most is None or len(windows) <= at_most:
        return windows
    return windows[torch.linspace(0, len(windows) - 1, at_most).round().long()]  # (at_most, length + 1)
