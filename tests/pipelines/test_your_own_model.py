"""docs/your-own-model.md does what it says."""

import re
from pathlib import Path

import pytest
import torch

import svg
from svg.config import DenseConfig, SVG2Config
from svg.pipelines.attach import attached
from svg.pipelines.registry import MODELS

PAGE = (Path(__file__).parents[2] / "docs" / "your-own-model.md").read_text()
BLOCKS = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE, flags=re.S))


@pytest.fixture
def page():
    """The page's names after its model and its registration."""
    names = {}
    for name in ("dit", "spec"):
        exec(BLOCKS[name], names)
    yield names
    del MODELS["TinyDiT"]


def test_the_page_runs(page, capsys):
    torch.manual_seed(0)
    exec(BLOCKS["run"], page)
    assert "'sparse_calls': 0." in capsys.readouterr().out
    assert page["latents"].isfinite().all()
    with pytest.raises(ValueError, match="must be accelerated"):
        svg.report(page["dit"])


def test_the_model_is_short():
    code = [line for line in BLOCKS["dit"].splitlines() if line.strip()]
    assert len(code) <= 45


def test_density_one_equals_the_model_alone(page):
    torch.manual_seed(0)
    dit, latents, time = page["TinyDiT"]().eval(), torch.randn(2, 3, 4, 5, 4), torch.ones(2)
    with torch.no_grad():
        alone = dit(latents, time)
        for config in (DenseConfig(), SVG2Config(top_p=1.0, num_q_clusters=4, num_k_clusters=6, warmup_steps=0.0)):
            svg.accelerate(dit, config)
            with svg.at_step(dit, 0, 2):
                torch.testing.assert_close(dit(latents, time), alone, rtol=0, atol=1e-5)
            assert [record.layer for record in attached(dit)["transformer"].state.records] == [0, 1]
        svg.restore(dit)
        assert torch.equal(dit(latents, time), alone)
    assert "_diffusers_hook" not in vars(dit)


def test_without_a_step_it_refuses(page):
    dit = svg.accelerate(page["TinyDiT"](), DenseConfig())
    with pytest.raises(RuntimeError, match="the step must be known .*svg.at_step"):
        dit(torch.randn(1, 3, 4, 5, 4), torch.ones(1))


def test_register_model_refuses(page):
    with pytest.raises(TypeError, match="spec must be a svg.ModelSpec, got dict"):
        svg.register_model({})
    spec = svg.ModelSpec(transformer="WanTransformer3DModel", attention_modules=list, layout=dict)
    with pytest.raises(ValueError, match="not registered yet, got WanTransformer3DModel"):
        svg.register_model(spec)


def test_a_processor_that_computes_attention_another_way_is_refused(page):
    class Other:
        def __call__(self, attn, hidden_states):
            return hidden_states

    dit = page["TinyDiT"]()
    dit.blocks[0].attn.processor = Other()
    svg.accelerate(dit, DenseConfig())
    with svg.at_step(dit, 0, 1), pytest.raises(NotImplementedError, match="must call dispatch_attention_fn or"):
        dit(torch.randn(1, 3, 4, 5, 4), torch.ones(1))
