"""Wrong calls of the Python API, generated from a table: each is refused in words that name the argument."""

import itertools
import math

import numpy as np
import pytest
import torch

import svg
from svg.pipelines import load_pipeline

SHAPE = (1, 2, 8, 16)


def tensor(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*(shape or SHAPE), dtype=dtype, device=device)


def nested():
    return torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)])


TENSORS = {  # what is no tensor for attention, by what is wrong with it
    "none": lambda: None,
    "text": lambda: "q",
    "number": lambda: 3,
    "list": lambda: [[1.0]],
    "dict": dict,
    "numpy": lambda: np.zeros(SHAPE),
    "fp64": lambda: tensor(dtype=torch.float64),
    "complex": lambda: tensor(dtype=torch.complex64),
    "int64": lambda: tensor(dtype=torch.int64),
    "int8": lambda: tensor(dtype=torch.int8),
    "bool": lambda: tensor(dtype=torch.bool),
    "fp8": lambda: tensor().to(torch.float8_e4m3fn),
    "other dtype": lambda: tensor(dtype=torch.bfloat16),
    "meta": lambda: tensor(device="meta"),
    "sparse": lambda: tensor().to_sparse(),
    "csr": lambda: torch.zeros(8, 16).to_sparse_csr(),
    "nested": nested,
    "jagged": lambda: torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)], layout=torch.jagged),
    "quantised": lambda: torch.quantize_per_tensor(tensor(), 0.1, 0, torch.qint8),
    "scalar": lambda: torch.tensor(1.0),
    "rank 1": lambda: tensor(8),
    "rank 2": lambda: tensor(8, 16),
    "rank 5": lambda: tensor(1, 1, 2, 8, 16),
    "head dim": lambda: tensor(1, 2, 8, 32),
    "no head dim": lambda: tensor(1, 2, 8, 0),
    "heads": lambda: tensor(1, 3, 8, 16),
    "no heads": lambda: tensor(1, 0, 8, 16),
    "no tokens": lambda: tensor(1, 2, 0, 16),
    "no batch": lambda: tensor(0, 2, 8, 16),
    "batch": lambda: tensor(5, 2, 8, 16),
}
NO_NUMBER = ["x", [1], (), {}, True, torch.zeros(2), 1j]
NO_FLAG = ["x", 1, 0, 1.5, [True], torch.tensor(True)]
NO_CHOICE = ["no-such", "", 3, True, [], {}, ("int8-fp8",), b"HND"]
SCALES = [*NO_NUMBER, math.nan, math.inf, -math.inf]
COMMON = {
    "dropout_p": ["x", [0], True, 0.5, 1],
    "is_causal": NO_FLAG,
    "scale": SCALES,
    "enable_gqa": NO_FLAG,
    "tensor_layout": [*NO_CHOICE, None],
}
MASKS = ["x", 3, [[True]], torch.zeros(8, 8), torch.zeros(3, 3, dtype=torch.bool), torch.zeros(2, 1, 1, 1, 8, dtype=torch.bool),
         torch.zeros(1, 1, 8, 8, dtype=torch.int8), torch.zeros(8, 8, dtype=torch.bool, device="meta")]  # fmt: skip
ENDS = [None, "x", 3, [0, 8], np.array([0, 8]), torch.tensor([0.0, 8.0]), torch.tensor([0, 8], dtype=torch.int8), torch.tensor(8),
        torch.tensor([8]), torch.tensor([], dtype=torch.int32), torch.tensor([[0, 8]]), torch.tensor([0, 8], device="meta"),
        torch.tensor([0, 4, 8]), torch.tensor([0, 9]), torch.tensor([1, 8]), torch.tensor([0, -8])]  # fmt: skip
OPTIONS = {
    "attention": {
        **COMMON,
        "attn_mask": MASKS,
        "precision": [*NO_CHOICE, None],
        **dict.fromkeys(("smooth_k", "smooth_v", "return_lse"), NO_FLAG),
        "smooth_q": ["x", 1, [True]],
        "q_groups": [*NO_CHOICE, None],
        "k_groups": [*NO_CHOICE, None],
    },
    "attention_varlen": {
        **{name: COMMON[name] for name in ("is_causal", "scale", "enable_gqa")},
        "cu_seqlens_q": ENDS,
        "cu_seqlens_k": ENDS,
        "precision": [*NO_CHOICE, None, "nvfp4"],
        **dict.fromkeys(("smooth_k", "smooth_v", "return_lse"), NO_FLAG),
    },
    "sparge_attention": {
        **COMMON,
        "is_causal": [*NO_FLAG, True],
        "attn_mask": [*MASKS, torch.ones(8, 8, dtype=torch.bool)],
        "topk": [*NO_NUMBER, 0, -1, 1.5, math.nan],
        "cdf": [*NO_NUMBER, 0, -1, 1.5, math.nan],
        "simthresh": [*NO_NUMBER, None, 1, -2, math.nan],
        "pv_threshold": [*NO_NUMBER, -1, 1, math.nan],
        "attention_sink": [*NO_FLAG, None],
        "precision": [*NO_CHOICE, None],
        "grid": [
            "x",
            8,
            (2, 2),
            (2, 2, 3),
            (2, 2, 2, 2),
            (0, 2, 4),
            (-2, -2, 2),
            (2.0, 2, 2),
            ("2", 2, 2),
            (True, 2, 4),
            {},
        ],
    },
    "training_attention": {
        **COMMON,
        "attn_mask": [*MASKS, torch.ones(8, 8, dtype=torch.bool)],
        "gradients": [*NO_CHOICE, None],
        "cu_seqlens_q": ENDS[1:],
        "cu_seqlens_k": ENDS[1:],
    },
    "dense_attention": {"key_mask": MASKS, "backend": [*NO_CHOICE, None]},
}


def arguments(function):
    if function == "attention_varlen":
        ends = torch.tensor([0, 8], dtype=torch.int32)
        return {name: tensor(8, 2, 16) for name in "qkv"} | {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    return {name: tensor() for name in "qkv"}


def wrong_calls():
    """(function, argument, value): every argument wrong in every way, one and two at a time for tensors."""
    for function, options in OPTIONS.items():
        for names in ("q", "k", "v", "kv", "qkv"):
            for kind in TENSORS:
                if not may_be_right(function, names, kind):
                    yield function, names, kind, None
        for name, values in options.items():
            for index, _ in enumerate(values):
                yield function, name, None, index


def may_be_right(function, names, kind):
    """Tensors that are fine where all of them are so."""
    empty = (
        ("fp64", "meta", "no head dim", "no heads", "no tokens", "no batch") if function == "dense_attention" else ()
    )
    packed = (
        ("rank 2", "batch", "heads", "no heads", "head dim", "no head dim") if function == "attention_varlen" else ()
    )
    if (function, kind) == ("dense_attention", "no tokens"):
        return True
    return kind in packed or (names == "qkv" and kind in ("other dtype", "head dim", "batch", "heads", *empty))


CALLS = list(wrong_calls())


@pytest.mark.parametrize("function", OPTIONS)
@pytest.mark.filterwarnings("ignore")
def test_wrong_calls_are_refused_in_words(function):
    """Types are TypeError, values ValueError, what is not supported NotImplementedError; all name the argument."""
    faults = []
    for _, name, kind, index in (call for call in CALLS if call[0] == function):
        given = arguments(function)
        if kind is not None:
            given |= {one: TENSORS[kind]() for one in name}
        else:
            given[name] = OPTIONS[function][name][index]
        what = f"{function} {name} {kind if kind is not None else repr(given[name])[:60]}"
        try:
            getattr(svg, function)(**given)
        except (ValueError, TypeError, NotImplementedError) as error:
            words = str(error)
            names = ("q", "k", "v", "frames", "cu_seqlens", "attn_mask", *OPTIONS[function])
            if (
                "must" not in words
                and "not supported" not in words
                and "needs" not in words
                or not any(x in words for x in names)
            ):
                faults.append(f"{what}: {type(error).__name__}: {words[:150]}")
        except Exception as error:
            faults.append(f"{what}: {type(error).__name__}: {str(error)[:150]}")
        else:
            faults.append(f"{what}: taken")
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults)


@pytest.mark.parametrize(
    "arguments",
    [
        *itertools.product(("x", None, 1.5, True, [], 0, -1), (2,), (2,)),
        (2, 2),
        *((2, 2, 2, text, place) for text, place in itertools.product(("x", -1, None, 1.5, 3, 0), ("x", 3, None, [], "none"))
          if (text, place) != (0, "none")),
    ],
    ids=str,
)  # fmt: skip
def test_layouts(arguments):
    with pytest.raises((ValueError, TypeError)):
        svg.TokenLayout(*arguments)


@pytest.mark.parametrize(
    "settings",
    [None, 3, "svg2", [], [("method", "svg2")], {}, {"method": None}, {"method": []}, {"method": {}}, {"method": "x"},
     {"method": "svg2", 3: 1}, {"method": "svg2", "x": 1}, {"method": "svg2", "top_p": []}, {"method": "svg2", "seed": 1j}],
    ids=str,
)  # fmt: skip
def test_settings(settings):
    with pytest.raises((ValueError, TypeError), match="must|unknown key"):
        svg.config_from_dict(settings)


@pytest.mark.parametrize(
    "pipe", [None, 3, "x", [], object(), torch.nn.Linear(2, 2), {}], ids=lambda x: type(x).__name__
)
def test_pipes(pipe):
    with pytest.raises(ValueError, match="must be|must have"):
        svg.accelerate(pipe, "svg2")


@pytest.mark.parametrize(
    "options",
    [
        *({"model": value} for value in (3, [], {}, True, "", "no-such", "/no/such", b"x")),
        *({"device": value} for value in (None, 3, "", "tpu", "cuda:x", "CPU", [], torch.device("cpu"))),
        *({"dtype": value} for value in ("x", 3, [], torch.float64, torch.int8)),
        *({"offload": value} for value in (None, 3, "x", [], "model")),
        *({"flow_shift": value} for value in ("x", 0, -1, math.nan, math.inf, True, [])),
        *({"vae_tiling": value} for value in ("x", 1, None, [])),
    ],
    ids=str,
)
def test_loading(options):
    with pytest.raises((ValueError, TypeError), match="must"):
        load_pipeline(**{"device": "cpu", **options})
