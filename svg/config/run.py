"""What a run may be asked for besides a method's settings."""

DTYPES = ("bf16", "fp16", "fp32")
OFFLOADS = ("none", "model", "group", "sequential")  # what waits in CPU memory: nothing, components, blocks, layers
