"""Attention over granules: keys in semantic order, cut every 16, computed or averaged one granule at a time.

A granule is the unit of selection, of compensation and of copying: whatever is selected, no tile is padded. `values.py`
holds what the operations hand to each other, `reference.py` their specification in plain torch.
"""

from .op import granule_attention
from .reference import cut_granules_reference as cut_granules
from .reference import granule_scores_reference as granule_scores
from .reference import select_granules_reference as select_granules
from .values import GranuleLists, Granules


def granule_attention_quantized(*args, **kwargs):
    raise NotImplementedError("granule attention in 8 bits is not built yet")


__all__ = ["GranuleLists", "Granules", "cut_granules", "granule_attention", "granule_attention_quantized", "granule_scores", "select_granules"]
