"""deltaw: low-rank adaptation, derived, measured, and ready to use.

>>> import deltaw as dw
>>> dw.attach(model, dw.LoRA(rank=8), train_also=["classifier"])
>>> history = dw.fit(model, task, dw.Recipe(steps=500))
>>> dw.save(model, "out/")
"""

from .adapters import Adapter, DoRA, Layer, LoRA, LoRAXS, MoSLoRA, Spec, VeRA
from .attach import adapted_layers, attach, count, detach, disabled, merge, unmerge, use
from .checkpoint import convert, load, save
from .linear import AdaptedLinear, adapted_linear

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "DoRA",
    "Layer",
    "LoRA",
    "LoRAXS",
    "MoSLoRA",
    "Spec",
    "VeRA",
    "adapted_layers",
    "adapted_linear",
    "attach",
    "convert",
    "count",
    "detach",
    "disabled",
    "load",
    "merge",
    "save",
    "unmerge",
    "use",
]
__version__ = "0.1.0"
