"""Attention over granules: keys in semantic order, cut every 16, computed or averaged one granule at a time.

A granule is the unit of selection, of compensation and of copying: whatever is selected, no tile is padded. `values.py`
holds what the operations hand to each other, `reference.py` their specification in plain torch.
"""
