"""What does training K adapters at once cost, beside the frozen base alone and beside one adapter at a time?

MiniLM's shape (6 layers, 384 wide; random weights, since a step takes the time it takes whatever they are), 32 × 64
tokens a slot and step, LoRA of rank 8 on all 36 linear layers, AdamW. On a GPU the base is in bf16 and the adapters are
in fp32 under bf16 autocast; on a CPU all is in fp32. No dropout, in no arm.

    floor     the frozen base on K · 32 · 64 tokens: forward, and backward to its input. No adapter can be had for less.
    bank      `Bank.fit` on K slots; on a GPU with a CUDA graph ("bank, eager launches": without)
    fit       `fit`, one adapter
    PEFT      PEFT's LoRA, one adapter, its default: fp32 adapters under autocast
    PEFT bf16 PEFT's LoRA with adapters in bf16

Each is measured eager and under `torch.compile`. A time is the median over rounds of a round's mean; the device is waited
for at a round's ends only. Fixed before the run: the ratios are bank / floor at K = 32, the floor being the faster of
eager and compiled, and PEFT's step over the bank's step per slot.
"""

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from deltaw import Bank, LoRA, Recipe, attach, fit
from deltaw.tasks import Task

TIMED = True  # two runs differ
LAYERS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", r".*layer\.\d\.output\.dense"]
PEFT_LAYERS = r".*layer\.\d\.(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)"


@dataclasses.dataclass(frozen=True)
class Settings:
    """`compiled_slots` are measured under `torch.compile` too: each takes it some ten seconds."""

    slots: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    compiled_slots: tuple[int, ...] = (1, 32, 128)
    rounds: int = 5
    steps: int = 8  # a round
    batch: int = 32
    length: int = 64
    rank: int = 8
    layers: int = 6
    width: int = 384
    heads: int = 12


QUICK = Settings(slots=(1, 2), compiled_slots=(), rounds=2, steps=1, batch=2, length=16, layers=2, width=48, heads=4)


def cells(settings: Settings) -> list[dict]:
    single = [{"arm": arm, "slots": 1, "compiled": compiled}
              for compiled in (False, True) for arm in ("fit", "PEFT", "PEFT bf16")]
    eager = [{"arm": arm, "slots": slots, "compiled": False}
             for slots in settings.slots for arm in ("floor", "bank", "bank, eager launches")]
    compiled = [{"arm": arm, "slots": slots, "compiled": True}
                for slots in settings.compiled_slots for arm in ("floor", "bank")]
    return [cell for cell in single if settings.compiled_slots or not cell["compiled"]] + eager + compiled


def data(settings: Settings) -> dict[str, str]:
    return {}  # tokens are drawn from a seed


def measure(cell: dict, settings: Settings, device: str) -> list[dict]:
    """Milliseconds a step, and a slot of it; the peak of the GPU's memory."""
    on_gpu = device.startswith("cuda")
    torch._dynamo.reset()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = ARMS[cell["arm"]](cell["slots"], cell["compiled"], settings, device)
    ms = 1e3 * statistics.median(times)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
    return [{"ms": ms, "ms_per_slot": ms / cell["slots"], "fastest_ms": 1e3 * min(times), "peak_gib": peak}]


class Clock(Task):
    """Random tokens, and a loss of each example. Asked for a batch, it notes the time when a round begins or ends."""

    def __init__(self, settings: Settings, device: str):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 20000, (settings.batch, settings.length), generator=generator)  # (batch, length)
        self.ids, self.settings, self.device, self.times = ids.to(device), settings, device, []

    def batches(self, seed: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
        batch = {"ids": self.ids[:batch_size], "labels": self.ids[:batch_size, 0]}
        for step in range(WARM_UP + self.settings.rounds * self.settings.steps + 1):
            if step >= WARM_UP and (step - WARM_UP) % self.settings.steps == 0:
                self.times.append(now(self.device))
            yield batch

    def validation(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        yield {"ids": self.ids[:1], "labels": self.ids[:1, 0]}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["ids"]
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state  # (batch, length, width)
        return hidden.float().square().mean((1, 2))  # (batch,)

    predict = losses

    def metrics(self, predictions: Tensor, labels: Tensor) -> dict[str, float]:
        return {"loss": predictions.float().mean().item()}


WARM_UP = 8  # steps: what is compiled, recorded or chosen by a first look is so before the clock runs


def now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def rounds(settings: Settings, step: Callable[[], None], device: str) -> list[float]:
    """Seconds a step, of each round."""
    for _ in range(WARM_UP):
        step()
    times = [now(device)]
    for _ in range(settings.rounds):
        for _ in range(settings.steps):
            step()
        times.append(now(device))
    return [(end - start) / settings.steps for start, end in pairwise(times)]


def base(settings: Settings, device: str) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=settings.width, num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
                        intermediate_size=4 * settings.width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertModel(config, add_pooling_layer=False).requires_grad_(False).train()
    return model.to(device, torch.bfloat16 if device.startswith("cuda") else torch.float32)


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=device.startswith("cuda"))


def floor(slots: int, compiled: bool, settings: Settings, device: str) -> list[float]:
    model = base(settings, device)
    ids = Clock(settings, device).ids.repeat(slots, 1)  # (K · batch, length)
    mask, run = torch.ones_like(ids), torch.compile(model, dynamic=False) if compiled else model
    embedded = model.embeddings(ids).detach().requires_grad_(True)  # (K · batch, length, width)

    def step() -> None:
        with autocast(device):
            hidden = run(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        hidden.float().square().mean((1, 2)).sum().backward()
        embedded.grad = None

    return rounds(settings, step, device)


def _recipe(settings: Settings) -> Recipe:
    return Recipe(steps=WARM_UP + settings.rounds * settings.steps + 1, batch_size=settings.batch, learning_rate=1e-4)


def trainers(device: str) -> str | None:
    """The device as `fit` takes it."""
    return "cpu" if device == "cpu" else None


def _rounds_of(task: Clock, settings: Settings) -> list[float]:
    return [(end - start) / settings.steps for start, end in pairwise(task.times)]


def bank(slots: int, compiled: bool, settings: Settings, device: str, cuda_graph: bool = True) -> list[float]:
    task = Clock(settings, device)
    several = Bank(base(settings, device), [(LoRA(settings.rank), _recipe(settings))] * slots, targets=LAYERS)
    task.times.clear()
    graph = cuda_graph and device.startswith("cuda")
    several.fit(task, compile=compiled, cuda_graph=graph, progress=False, device=trainers(device))
    return _rounds_of(task, settings)


def bank_launched(slots: int, compiled: bool, settings: Settings, device: str) -> list[float]:
    return bank(slots, compiled, settings, device, cuda_graph=False)


def one_fit(slots: int, compiled: bool, settings: Settings, device: str) -> list[float]:
    task, model = Clock(settings, device), attach(base(settings, device), LoRA(settings.rank), targets=LAYERS)
    if compiled:
        task.losses = torch.compile(task.losses, dynamic=False)
    fit(model, task, _recipe(settings), progress=False, device=trainers(device))
    return _rounds_of(task, settings)


def one_peft(slots: int, compiled: bool, settings: Settings, device: str, in_bf16: bool = False) -> list[float]:
    import peft

    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=PEFT_LAYERS, lora_dropout=0.0)
    model = peft.get_peft_model(base(settings, device), config, autocast_adapter_dtype=not in_bf16).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.startswith("cuda"))
    ids = Clock(settings, device).ids
    mask, run = torch.ones_like(ids), torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        with autocast(device):
            hidden = run(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden.float().square().mean((1, 2)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return rounds(settings, step, device)


def one_peft_bf16(slots: int, compiled: bool, settings: Settings, device: str) -> list[float]:
    return one_peft(slots, compiled, settings, device, in_bf16=True)


ARMS = {"floor": floor, "bank": bank, "bank, eager launches": bank_launched,
        "fit": one_fit, "PEFT": one_peft, "PEFT bf16": one_peft_bf16}
