"""One training step of a bank of K LoRAs on MiniLM's shape, beside the frozen base alone and PEFT one at a time.

    python benchmarks/bank_step.py --device cuda --slots 1 2 4 8 16 32 64 128 [--out FILE.csv]

Per slot 32 × 64 tokens, rank 8 on all 36 linear layers, base in bf16, adapters in fp32 under bf16 autocast, AdamW,
no dropout. The floor is the frozen base's forward and backward on the same tokens, gradients to its input only.
Prints milliseconds a step (median), and peak memory, eager and compiled.
"""

import argparse
import statistics
import time
import warnings

import torch
from minilm_step import LAYERS, PEFT_LAYERS, minilm

import deltaw as dw

BATCH, LENGTH = 32, 64


class Task:
    """Random tokens, and a loss of each example. It notes when each batch is asked for: the time of a step."""

    def __init__(self, device: str):
        self.ids = torch.randint(1000, 20000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
        self.device, self.times = device, []

    def batches(self, seed, batch_size):
        ids = self.ids.to(self.device)
        while True:
            synchronize(self.device)
            self.times.append(time.perf_counter())
            yield {"ids": ids[:batch_size], "labels": ids[:batch_size, 0]}

    def validation(self, batch_size):
        yield {"ids": self.ids[:1], "labels": self.ids[:1, 0]}

    def losses(self, model, batch):
        hidden = model(input_ids=batch["ids"], attention_mask=torch.ones_like(batch["ids"])).last_hidden_state
        return hidden.float().square().mean((1, 2))  # (batch,)

    def predict(self, model, batch):
        return self.losses(model, batch)

    def metrics(self, predictions, labels):
        return {"loss": predictions.float().mean().item()}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def base(device: str) -> torch.nn.Module:
    return minilm().to(device, torch.bfloat16 if device == "cuda" else torch.float32).requires_grad_(False)


def timed(step, device: str, repeats: int, warm: int = 5) -> float:
    """Median milliseconds."""
    times = []
    for i in range(warm + repeats):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        if i >= warm:
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def floor(slots: int, device: str, compile: bool, repeats: int) -> float:
    model = base(device).train()
    ids = Task(device).ids.to(device).repeat(slots, 1)  # (K · batch, length)
    mask, run = torch.ones_like(ids), torch.compile(model, dynamic=False) if compile else model
    embedded = model.embeddings(ids).detach().requires_grad_(True)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            hidden = run(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        hidden.float().square().mean((1, 2)).sum().backward()
        embedded.grad = None

    return timed(step, device, repeats)


def bank(slots: int, device: str, compile: bool, repeats: int, cuda_graph: bool) -> float:
    task = Task(device)
    recipe = dw.Recipe(steps=repeats + 8, batch_size=BATCH, learning_rate=1e-4)
    one = dw.Bank(base(device), [(dw.LoRA(rank=8), recipe)] * slots, targets=LAYERS)
    one.fit(task, compile=compile, cuda_graph=cuda_graph, progress=False)
    times = [1e3 * (after - before) for before, after in zip(task.times[-repeats - 1:-1], task.times[-repeats:])]
    return statistics.median(times)


def peft(device: str, compile: bool, repeats: int, adapters_in_bf16: bool) -> float:
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=PEFT_LAYERS, lora_dropout=0.0)
    model = peft.get_peft_model(base(device), config, autocast_adapter_dtype=not adapters_in_bf16).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = Task(device).ids.to(device)
    mask, run = torch.ones_like(ids), torch.compile(model) if compile else model

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            hidden = run(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden.float().square().mean((1, 2)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, device, repeats)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--compiled-slots", type=int, nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []

    def note(arm, slots, compile, measure):
        torch._dynamo.reset()
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            ms = measure()
        except Exception as error:
            print(f"{arm} K={slots} compile={compile}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            return
        gib = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else float("nan")
        rows.append((arm, slots, compile, ms, ms / slots, gib))
        print(f"{arm:12} K={slots:4} {'compiled' if compile else 'eager':8} {ms:9.2f} ms  {ms / slots:7.3f} ms a slot  {gib:6.2f} GiB", flush=True)

    for compile in (False, True):
        for in_bf16 in (False, True):
            if not compile or options.compiled_slots:
                note("PEFT bf16" if in_bf16 else "PEFT", 1, compile, lambda: peft(options.device, compile, options.repeats, in_bf16))
        for slots in options.compiled_slots if compile else options.slots:
            note("floor", slots, compile, lambda: floor(slots, options.device, compile, options.repeats))
            for graph in (False, True) if options.device == "cuda" else (False,):
                arm = "bank, graph" if graph else "bank"
                note(arm, slots, compile, lambda: bank(slots, options.device, compile, options.repeats, graph))
    if options.out:
        with open(options.out, "w") as file:
            file.write("arm,slots,compiled,ms,ms_per_slot,peak_gib\n")
            file.writelines(",".join(map(str, row)) + "\n" for row in rows)


if __name__ == "__main__":
    main()
