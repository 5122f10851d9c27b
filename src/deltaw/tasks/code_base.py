"""Decoders of Llama's architecture, trained from nothing in minutes: the bases that `code_lm` adapts."""

import contextlib
import hashlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..train import CHECK_EVERY, History, Recipe, fit
from .task import Batch, Task

ATTENTION = "deltaw_causal"  # what transformers knows our attention by
EVALUATIONS = 10  # of a base on its way


class Shape(NamedTuple):
    """Of a decoder; the head is not tied to the embedding, so that "the head only" means the head."""

    width: int
    layers: int
    heads: int
    hidden: int  # of the MLP, 8/3 of the width in multiples of 64


# With 8192 tokens 10.6, 46.9 and 97.5 million parameters.
SHAPES = {"tiny": Shape(64, 2, 2, 192), "10m": Shape(256, 8, 4, 704), "45m": Shape(512, 12, 8, 1408),
          "100m": Shape(768, 12, 12, 2048)}
RATES = {"tiny": 3e-3, "10m": 2e-3, "45m": 1.5e-3, "100m": 1e-3}


@dataclass(frozen=True)
class Base:
    """How a base is trained: AdamW, cosine to zero, weight decay 0.1, clipped at 1. Checked when made.

    Args:
        size: one of `SHAPES`.
        steps, batch_size, seed: as in `Recipe`; each example is `length` tokens.
        length: tokens that are predicted in an example, with those before them in it as the context.
        deterministic: only kernels that add in one order, so that a GPU of one kind, with the same libraries, should give
            the same base again; `Pretrained.fingerprint` tells whether it did.
        compile: the layers, by `torch.compile`, where there is a GPU.
    """

    size: str = "45m"
    steps: int = 3000
    batch_size: int = 256
    length: int = 256
    seed: int = 0
    deterministic: bool = True
    compile: bool = True

    def __post_init__(self):
        if self.size not in SHAPES:
            raise ValueError(f"size must be one of {tuple(SHAPES)}, not {self.size!r}")
        if not isinstance(self.length, Integral) or self.length < 2:
            raise ValueError(f"length must be an int of at least 2, not {self.length!r}")
        _ = self.recipe  # raises what Recipe raises

    @property
    def recipe(self) -> Recipe:
        return Recipe(steps=self.steps, batch_size=self.batch_size, seed=self.seed, learning_rate=RATES[self.size],
                      betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0, schedule="cosine", warmup_steps=self.steps // 20)


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A base, and how it came about.

    Attributes:
        history: the evaluations have "python/loss", the mean over held-out packages.
        seconds: that `fit` took, with compiling and evaluating.
        tokens_per_second: the median over stretches of some steps, without these.
        fingerprint: SHA-256 of all parameters.
    """

    model: nn.Module
    history: History
    seconds: float
    tokens_per_second: float
    fingerprint: str = field(init=False)

    def __post_init__(self):
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        object.__setattr__(self, "fingerprint", digest.hexdigest())

    def save(self, file: str | Path) -> None:
        """Write it, whole or not at all."""
        from safetensors.torch import save_file

        history = {name: getattr(self.history, name) for name in ("loss", "learning_rate", "grad_norm", "evaluations")}
        about = {"history": history, "seconds": self.seconds, "tokens_per_second": self.tokens_per_second,
                 "fingerprint": self.fingerprint}
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        try:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
            save_file(tensors, part, metadata={"about": json.dumps(about)})
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: str | Path, base: "Base", vocabulary: int) -> "Pretrained":
        """Read what `save` wrote of a base trained as `base` says.

        Raises:
            ValueError: if the file holds something else than was written.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as tensors:
                about = json.loads((tensors.metadata() or {})["about"])
                names = tensors.keys()
                state = {name: tensors.get_tensor(name) for name in names}
            history = about["history"]
            history["evaluations"] = {int(step): metrics for step, metrics in history["evaluations"].items()}
            model = decoder(SHAPES[base.size], vocabulary, base.length)
            model.load_state_dict(state)
            found = cls(model, History(base.recipe, **history), about["seconds"], about["tokens_per_second"])
            whole = found.fingerprint == about["fingerprint"]
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(f"{file} is no base of this kind: {error}") from error
        if not whole:
            raise ValueError(f"{file} is damaged: its parameters are not those whose SHA-256 it holds")
        return found


def decoder(shape: Shape, vocabulary: int, length: int, seed: int = 0) -> nn.Module:
    """A transformers `LlamaForCausalLM` in fp32, drawn from the seed."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    # transformers' own way to the same kernel first looks for several texts in a row, at values on the GPU: it waits,
    # and no CUDA graph could be recorded. An attention that it does not know gets no mask, so it does not look.
    AttentionInterface.register(ATTENTION, _causal)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=shape.width, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        intermediate_size=shape.hidden, max_position_embeddings=length, bos_token_id=None, eos_token_id=0,
        tie_word_embeddings=False, use_cache=False, attn_implementation=ATTENTION)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _causal(module: nn.Module, query, key, value, attention_mask, scaling: float | None = None, **_):
    """Causal attention of (batch, heads, length, head) without padding, as transformers calls it."""
    if attention_mask is not None:
        raise ValueError("this decoder takes whole windows of tokens, with no attention_mask")
    mixed = F.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True)  # (batch, heads, length, head)
    return mixed.transpose(1, 2).contiguous(), None  # (batch, length, heads, head)


def compiled(model: nn.Module) -> nn.Module:
    """The same model, whose layers go through `torch.compile`: they are alike, so that one compilation serves all."""
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Training from nothing, on the examples of a task


def kept(base: Base, task: Task, hashes: dict[str, str], folder: Path, device: str | None = None) -> Pretrained:
    """`pretrain`, or what it made before of the same, with this kind of device and this PyTorch: from a file in the folder.

    Args:
        base, task, device: as in `pretrain`.
        hashes: of the data.
        folder: where `base-….safetensors` is, or will be.
    """
    from filelock import FileLock

    on = torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else "cpu"
    made_of = [asdict(base), hashes, torch.__version__, on]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / f"base-{base.size}-{key}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):  # who comes while another process trains it waits for that one's
        if not file.is_file():
            pretrain(base, task, device).save(file)
    return Pretrained.load(file, base, task.vocabulary)


def pretrain(base: Base, task: Task, device: str | None = None) -> Pretrained:
    """Train a base on the task's examples.

    Args:
        base: how.
        task: a `CodeTask`, whose `length` is the base's.
        device: as in `deltaw.fit`.
    """
    model = decoder(SHAPES[base.size], task.vocabulary, base.length, base.seed)
    if base.compile and device != "cpu" and torch.cuda.is_available():
        compiled(model)
    clock, every = Clock(task), max(1, base.steps // EVALUATIONS)
    began = time.perf_counter()
    with deterministic(base.deterministic):
        history = fit(model, clock, base.recipe, evaluate_every=every, progress=False, device=device)
    seconds = time.perf_counter() - began
    return Pretrained(model, history, seconds, base.batch_size * base.length / clock.seconds_a_step(every))


class Clock(Task):
    """The task, and the times at which a batch was asked for."""

    def __init__(self, task: Task):
        self.losses, self.predict, self.metrics, self.validation = task.losses, task.predict, task.metrics, task.validation
        self.task, self.times = task, []

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        for batch in self.task.batches(seed, batch_size):
            self.times.append(time.perf_counter())
            yield batch

    def seconds_a_step(self, evaluated_every: int) -> float:
        """The median over stretches, at whose ends `fit` waits for the device, without those that evaluate or compile."""
        stretch = CHECK_EVERY if len(self.times) > 3 * CHECK_EVERY else 1
        ends = range(0, len(self.times), stretch)
        evaluations = range(0, len(self.times), evaluated_every)
        plain = [(self.times[b] - self.times[a]) / stretch for a, b in pairwise(ends)
                 if a > 0 and not any(a < step <= b for step in evaluations)]
        every = [b - a for a, b in pairwise(self.times)]
        return statistics.median(plain or every or [float("nan")])


@contextlib.contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Within it PyTorch takes kernels that add in one order, and raises where there is none."""
    enabled, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch refuses products on a GPU
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time, and nothing reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def plain_tokens_per_second(base: Base, task: Task, steps: int, device: str | None = None) -> float:
    """What a loop of PyTorch's own calls reaches on a base's first steps, without evaluations: a measure for `fit`.

    The same model, layers compiled alike, under autocast, AdamW fused, gradients clipped; half of the steps warm up.
    """
    on = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    model = decoder(SHAPES[base.size], task.vocabulary, base.length, base.seed).to(on)
    if base.compile and on.type == "cuda":
        compiled(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches, times = task.batches(base.seed, base.batch_size), []
    for step in range(steps + 1):
        if step in (steps // 2, steps):
            if on.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        ids = next(batches)["ids"].to(on)  # (batch, length + 1)
        with torch.autocast(on.type, torch.bfloat16, enabled=on.type == "cuda"):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # (batch, length, vocabulary)
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return (steps - steps // 2) * base.batch_size * base.length / (times[-1] - times[0])
