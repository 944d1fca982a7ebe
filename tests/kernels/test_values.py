"""What decides an operation as one value gives what its fields give one by one, and no operation has a long list of arguments."""

import inspect

import pytest
import torch

from svg import kernels
from svg.kernels.block_sparse.blocks import BlockMap
from svg.kernels.quantize.precision import Quantisation

MOST = 10


@pytest.mark.parametrize("name", [name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))])
def test_an_operation_has_few_arguments(name):
    assert len(inspect.signature(getattr(kernels, name)).parameters) <= MOST


@pytest.fixture
def problem():
    q, k, v = torch.randn(3, 1, 2, 96, 64).unbind()
    order = torch.rand(1, 2, 96).argsort(-1).int()
    sizes = torch.tensor([[40, 56], [96, 0]], dtype=torch.int32)
    return (q, k, v), {
        "block_map": torch.tensor([[[1, 0], [1, 1]], [[0, 1], [1, 0]]]).bool(), "q_sizes": sizes, "k_sizes": sizes.flip(0),
        "map_index": torch.tensor([[1, 0]]), "q_permutation": order,
    }  # fmt: skip


@pytest.mark.parametrize("op", [kernels.block_sparse_attention, kernels.block_sparse_attention_reference])
def test_a_block_map_is_its_fields(op, problem):
    qkv, fields = problem
    expected = op(*qkv, BlockMap(**fields))
    assert torch.equal(op(*qkv, **fields), expected)
    maps = [fields.pop(name) for name in ("block_map", "q_sizes", "k_sizes")]
    assert torch.equal(op(*qkv, *maps, **fields), expected)


def test_both_values_are_their_fields(problem):
    qkv, fields = problem
    op, order = kernels.block_sparse_attention_quantised, fields["q_permutation"]
    how = {"precision": "int8-fp16", "smooth_k": False, "pv_threshold": torch.full((2,), 3.0)}
    expected = op(*qkv, BlockMap(**fields, k_permutation=order, key_multiple=1), how=Quantisation(**how))
    assert torch.equal(op(*qkv, **fields, k_permutation=order, key_multiple=1, **how), expected)
    assert not torch.equal(op(*qkv, **fields, k_permutation=order, precision="int8-fp16"), expected)


def test_dense_and_packed(problem):
    q, k, v = problem[0]
    how = {"precision": "int8-fp16", "smooth_k": False}
    expected = kernels.quantised_attention(q, k, v, Quantisation(**how))
    assert torch.equal(kernels.quantised_attention(q, k, v, **how), expected)
    ends = torch.tensor([0, 40, 96])
    packed = kernels.varlen_attention(q[0], k[0], v[0], ends, ends, Quantisation(**how))
    assert torch.equal(kernels.varlen_attention(q[0], k[0], v[0], ends, ends, **how), packed)


def test_what_is_said_twice_or_has_no_meaning_is_refused(problem):
    (q, k, v), fields = problem
    blocks, how = BlockMap(**fields), Quantisation("int8-fp16")
    with pytest.raises(TypeError, match="BlockMap already, got q_permutation"):
        kernels.block_sparse_attention(q, k, v, blocks, q_permutation=None)
    with pytest.raises(TypeError, match="Quantisation already, got precision"):
        kernels.quantised_attention(q, k, v, how, precision="int8-fp16")
    with pytest.raises(TypeError, match="unexpected keyword argument 'smooth'"):
        kernels.block_sparse_attention_quantised(q, k, v, **fields, smooth=True)
    with pytest.raises(ValueError, match="k_permutation must be None"):
        kernels.block_sparse_attention(q, k, v, **fields, k_permutation=fields["q_permutation"])
    with pytest.raises(ValueError, match="has no smooth_q"):
        kernels.block_sparse_attention_quantised(q, k, v, blocks, how=Quantisation("int8-fp16", smooth_q=True))
    with pytest.raises(ValueError, match="has no pv_threshold"):
        kernels.quantised_attention(q, k, v, Quantisation("int8-fp16", pv_threshold=torch.zeros(2)))
