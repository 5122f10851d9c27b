"""deltaw: low-rank adaptation, derived, measured, and ready to use.

>>> import deltaw as dw
>>> dw.attach(model, dw.LoRA(rank=8), train_also=["classifier"])
>>> history = dw.fit(model, task, dw.Recipe(steps=500))
>>> dw.save(model, "out/")
"""

from .adapters import Adapter, DoRA, Layer, LoRA, LoRAXS, MoSLoRA, Spec, VeRA
from .attach import adapted_layers, attach, count, detach, disabled, merge, unmerge, use
from .bank import Bank, Halving
from .checkpoint import convert, load, save
from .linear import AdaptedLinear, adapted_linear
from .train import History, Recipe, evaluate, fit

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "Bank",
    "DoRA",
    "Halving",
    "History",
    "Layer",
    "LoRA",
    "LoRAXS",
    "MoSLoRA",
    "Recipe",
    "Spec",
    "VeRA",
    "adapted_layers",
    "adapted_linear",
    "attach",
    "convert",
    "count",
    "detach",
    "disabled",
    "evaluate",
    "fit",
    "load",
    "merge",
    "save",
    "unmerge",
    "use",
]
__version__ = "0.1.0"
