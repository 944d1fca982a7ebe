"""tiny-wan's autoencoder, and its pass over a whole clip at once.

AutoencoderKLWan runs clips in chunks of four frames with cached features, which is launch-bound. Zero-padded causal
convolutions over the whole clip compute the same; only resampling in time has to know that the first frame is left alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as wan_vae

LATENT_CHANNELS = 16


def build_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=32, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
        is_residual=True, scale_factor_spatial=4, scale_factor_temporal=4, latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )  # fmt: skip


def _conv_forward(self, x, cache_x=None):
    if self._padding[4]:
        x = F.pad(x, (0, 0, 0, 0, self._padding[4], 0))
    return F.conv3d(x, self.weight, self.bias, self.stride, (0, self._padding[2], self._padding[0]))


def _norm_silu(x, gamma, scale):
    # channels lie innermost (channels_last_3d), so this is one pass when compiled
    norm = x.float().square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
    return F.silu((x.float() / norm).to(x.dtype) * scale * gamma)


_fused_norm_silu = _norm_silu


def compile_norms() -> None:
    """Let norm and activation be one pass over the features: worth its compilation for training alone."""
    global _fused_norm_silu
    _fused_norm_silu = torch.compile(_norm_silu, dynamic=True)


def _residual_forward(self, x, feat_cache=None, feat_idx=None):
    h = self.conv_shortcut(x)
    x = self.conv1(_fused_norm_silu(x, self.norm1.gamma, self.norm1.scale))
    x = self.conv2(_fused_norm_silu(x, self.norm2.gamma, self.norm2.scale))
    return x + h


def _resample_forward(self, x, feat_cache=None, feat_idx=None):
    if self.mode == "upsample3d" and x.shape[2] > 1:
        b, c, t, h, w = x.shape
        rest = self.time_conv(x[:, :, 1:]).unflatten(1, (2, c))  # [B, 2, C, T-1, H, W]
        rest = rest.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat([x[:, :, :1], rest], 2)
    b, c, t, h, w = x.shape
    y = self.resample(x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w))
    y = y.unflatten(0, (b, t)).permute(0, 2, 1, 3, 4)
    if self.mode == "downsample3d" and t > 1:
        y = torch.cat([y[:, :, :1], self.time_conv(y)], 2)
    return y


def _upsample_forward(self, x):
    return F.interpolate(x, scale_factor=self.scale_factor, mode=self.mode)


def _shortcut_up_forward(self, x, first_chunk=False):
    assert self.in_channels == self.out_channels  # then repeating channels and folding them is nearest upsampling
    x = F.interpolate(x, scale_factor=(float(self.factor_t), float(self.factor_s), float(self.factor_s)))
    return x[:, :, self.factor_t - 1 :]


def _fused_head(self, x):
    return _fused_norm_silu(x, self.gamma, self.scale)


def run_whole_clips(vae: AutoencoderKLWan) -> None:
    """Make `vae.encoder` and `vae.decoder` of this instance compute whole clips in one pass, without feature caches."""
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    forwards = {
        wan_vae.WanCausalConv3d: _conv_forward,
        wan_vae.WanResidualBlock: _residual_forward,
        wan_vae.WanResample: _resample_forward,
        wan_vae.WanUpsample: _upsample_forward,
        wan_vae.DupUp3D: _shortcut_up_forward,
    }
    for module in vae.modules():
        if type(module) in forwards:
            module.forward = forwards[type(module)].__get__(module)
    for half in (vae.encoder, vae.decoder):
        half.norm_out.forward = _fused_head.__get__(half.norm_out)
        half.nonlinearity = torch.nn.Identity()


def encode_moments(vae, video):
    return vae.quant_conv(vae.encoder(video)).chunk(2, dim=1)


def decode_clip(vae, z):
    return vae.decoder(vae.post_quant_conv(z), first_chunk=True)
