"""Video transformers that are refused by name: why, and what to do instead."""

REFUSED: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": "its attention is causal, chunk by chunk, with compressed frames; run it without svg, or "
    "use AnyFlowPipeline, which is not causal",
    "WanAnimate2Transformer3DModel": "it packs the generated and the reference video under a block mask of its own and keeps "
    "keys between calls; run it without svg, or use WanAnimatePipeline",
    "Kandinsky6SRTransformer3DModel": "its attention is a window of 11 x 7 x 7 tokens already; run it without svg",
    "SanaWMLTX2RefinerTransformer3DModel": "it refines in few tokens with a cache of its own; run it without svg",
    "SanaVideoTransformer3DModel": "its attention is linear in the tokens: there is no map to make sparse; run it without svg",
    "SanaWMTransformer3DModel": "its attention is linear in the tokens: there is no map to make sparse; run it without svg",
    "LatteTransformer3DModel": "it attends within frames and across them in turn, over few tokens: nothing to gain; run it "
    "without svg",
}
