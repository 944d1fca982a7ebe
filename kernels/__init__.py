"""How attention is computed: tensor-only operations, each a plain-torch reference beside its Triton kernel."""

if __name__ == "kernels":
    raise ImportError(
        "this folder was imported as top-level `kernels`, which is the name of Hugging Face's package: "
        "import `svg.kernels`, and run `pytest` rather than `python -m pytest` from the repository root"
    )
