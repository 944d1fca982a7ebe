"""Attention over granules: keys in semantic order, cut every 16, computed or averaged one granule at a time.

A granule is the unit of selection, of compensation and of copying: whatever is selected, no tile is padded. `values.py`
holds what the operations hand to each other, `reference.py` their specification in plain torch.
"""

from .cut import cut_granules
from .density import listed_density
from .op import granule_attention
from .quantize import QuantizedGranules, quantize_granules
from .quantized import granule_attention_quantized
from .scores import granule_scores
from .select import select_granules
from .values import GranuleLists, Granules

__all__ = [
    "GranuleLists",
    "Granules",
    "QuantizedGranules",
    "cut_granules",
    "granule_attention",
    "granule_attention_quantized",
    "granule_scores",
    "listed_density",
    "quantize_granules",
    "select_granules",
]
