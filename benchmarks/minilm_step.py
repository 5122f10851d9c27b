"""One training step of MiniLM with PEFT's adapters and with ours, in interleaved pairs.

    python benchmarks/minilm_step.py --pairs 40 --threads 2 [--device cuda --autocast --compile]

Batch 32 × 64 tokens, all six linear layers of each of the six transformer layers, rank 8: forward, backward and
an AdamW step. Prints the median of the ratios ours / PEFT's with its 95 % interval (from the order statistics of
the pairs' ratios), for LoRA and DoRA, and the time of `import deltaw` over that of `import torch`.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
import warnings

import peft
import torch
from transformers import BertConfig, BertModel

import deltaw as dw

LAYERS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", r".*layer\.\d\.output\.dense"]
PEFT_LAYERS = r".*layer\.\d\.(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)"


def minilm() -> BertModel:
    """MiniLM's shape with random weights: a step takes the time it takes whatever they are."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def arms(family: str, dropout: float) -> dict[str, torch.nn.Module]:
    config = peft.LoraConfig(r=8, lora_alpha=8, use_dora=family == "DoRA", target_modules=PEFT_LAYERS, lora_dropout=dropout)
    spec = dw.LoRA(rank=8, dropout=dropout)
    ours = dw.attach(minilm(), dw.DoRA(spec) if family == "DoRA" else spec, targets=LAYERS)
    theirs = peft.get_peft_model(minilm(), config)
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert sizes[0] == sizes[1] and len(dw.adapted_layers(ours)) == 36, sizes
    return {"ours": ours, "PEFT": theirs}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    precision = (lambda: torch.autocast(options.device, torch.bfloat16)) if options.autocast else contextlib.nullcontext
    ids = torch.randint(1000, 20000, (32, 64), device=options.device)  # (batch, length)
    mask = torch.ones_like(ids)

    for family in ("LoRA", "DoRA"):
        steps = {}
        for name, model in arms(family, options.dropout).items():
            model.to(options.device).train()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
            run = torch.compile(model) if options.compile else model

            def step(run=run, optimizer=optimizer):
                synchronize()
                start = time.perf_counter()
                with precision():
                    loss = run(input_ids=ids, attention_mask=mask).last_hidden_state.float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                synchronize()
                return time.perf_counter() - start

            steps[name] = step
        for _ in range(4):
            steps["ours"](), steps["PEFT"]()
        ratios = []
        for pair in range(options.pairs):  # whoever is first changes from pair to pair
            order = ("ours", "PEFT") if pair % 2 else ("PEFT", "ours")
            seconds = {name: steps[name]() for name in order}
            ratios.append(seconds["ours"] / seconds["PEFT"])
        report(f"{family}, ours / PEFT's", ratios)

    imports = []
    for _ in range(12):
        seconds = {}
        for module in ("torch", "deltaw"):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
            seconds[module] = time.perf_counter() - start
        imports.append(seconds["deltaw"] / seconds["torch"])
    report("import deltaw / import torch", imports)


def report(what: str, ratios: list[float]) -> None:
    ratios, n = sorted(ratios), len(ratios)
    half = 0.98 * n**0.5  # the 95 % interval of a median lies between these order statistics
    low, high = ratios[max(0, int(n / 2 - half))], ratios[min(n - 1, int(n / 2 + half))]
    print(f"{what}: median {statistics.median(ratios):.3f}, 95 % interval {low:.3f} … {high:.3f}, {n} pairs", flush=True)


if __name__ == "__main__":
    main()
