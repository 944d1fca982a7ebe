"""A diffusion transformer of your own: say where its attention is and what grid its tokens form, then accelerate it."""

import torch
import torch.nn.functional as F
from torch import nn

import svg


class Processor:
    def __call__(self, attn, hidden_states):
        q, k, v = attn.to_qkv(hidden_states).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, S, D]
        return attn.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.processor = heads, Processor()
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden_states):
        return self.processor(self, hidden_states)


class SmallDiT(nn.Module):
    def __init__(self, channels=4, width=48):
        super().__init__()
        self.to_tokens, self.to_latents = nn.Linear(channels, width), nn.Linear(width, channels)
        self.blocks = nn.ModuleList(Attention(width, heads=3) for _ in range(2))

    def forward(self, hidden_states, timestep):  # [B, F, H, W, C], [B]
        x = self.to_tokens(hidden_states.flatten(1, 3)) + timestep[:, None, None]
        for block in self.blocks:
            x = x + block(x)
        return self.to_latents(x).view_as(hidden_states)


svg.register_model(
    svg.ModelSpec(
        transformer="SmallDiT",
        attention_modules=lambda dit: list(dit.blocks),
        layout=lambda config, inputs: svg.TokenLayout(*inputs["hidden_states"].shape[1:4]),
        arguments=("hidden_states", "timestep"),
    )
)

torch.manual_seed(0)
dit, latents, steps = SmallDiT().eval(), torch.randn(1, 4, 6, 8, 4), 4
svg.accelerate(dit, svg.NearConfig(budget=0.4, warmup_steps=0.25, warmup_layers=0.0))
with torch.no_grad():
    for step in range(steps):
        time = torch.full((1,), 1 - step / steps)
        with svg.at_step(dit, step, steps):  # no pipeline tells which step it is, so you do
            latents = latents - dit(latents, time) / steps
print(svg.summary(dit))
