"""The families, one file each."""

from .adapter import Adapter, Layer, LowRankAdapter, LowRankSpec, Spec
from .dora import DoRA
from .lora import LoRA
from .lora_xs import LoRAXS
from .moslora import MoSLoRA
from .vera import VeRA

__all__ = ["Adapter", "DoRA", "Layer", "LoRA", "LoRAXS", "LowRankAdapter", "LowRankSpec", "MoSLoRA", "Spec", "VeRA"]
