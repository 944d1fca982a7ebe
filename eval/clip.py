"""How good a video is by itself, as far as CLIP sees it: whether it shows its prompt, and whether it stays the same place.

Fidelity to dense attention says nothing of that; two videos far apart may be equally good, and two close ones equally bad.
"""

import numpy as np
import torch

from .video import Video, check_frames

_FRAMES_A_PASS = 16


class Clip:
    """A CLIP model that measures videos.

    Args:
        name: what the model is called in results.
        model: a `CLIPModel` of Transformers in eval mode.
        processor: its `CLIPProcessor`.

    Source: text alignment is CLIPScore without its factor (Hessel et al., 2021); consistency is that of backgrounds in
    VBench (Huang et al., 2023): each frame against the first and the one before.
    """

    def __init__(self, name, model, processor):
        self.name, self._model, self._processor = name, model, processor
        self._device = next(model.parameters()).device

    def __call__(self, video, prompt=None):
        """Measure one video.

        Args:
            video: uint8 [F, H, W, 3], or a Video, which is decoded as it is measured.
            prompt: what it should show, or None.

        Returns:
            dict: `model`; `text`, cosine of prompt and frames, {"mean", "per_frame"}, or None without a prompt;
            `consistency` {"mean", "per_frame"}, in [-1, 1], None for a single frame.
        """
        frames = self._frames(video)
        text = None if prompt is None else _mean((frames @ self._text(prompt)).tolist())
        pairs = (frames[1:] * frames[:-1]).sum(1), frames[1:] @ frames[0]
        return {"model": self.name, "text": text, "consistency": _mean(((pairs[0] + pairs[1]) / 2).tolist())}

    def _frames(self, video):
        source, parts, chunk = video if isinstance(video, Video) else check_frames(video), [], []
        for frame in source:
            chunk.append(frame)
            if len(chunk) == _FRAMES_A_PASS:
                parts.append(self._embed(chunk))
                chunk = []
        return torch.cat([*parts, *([self._embed(chunk)] if chunk else [])])

    @torch.no_grad()
    def _embed(self, frames):
        inputs = self._processor(images=list(np.stack(frames)), return_tensors="pt")
        return _unit(self._model.get_image_features(pixel_values=inputs["pixel_values"].to(self._device)))

    @torch.no_grad()
    def _text(self, prompt):
        inputs = self._processor(text=[prompt], return_tensors="pt", truncation=True, padding=True)
        inputs = {name: inputs[name].to(self._device) for name in ("input_ids", "attention_mask")}
        return _unit(self._model.get_text_features(**inputs))[0]


def _unit(found):
    """Vectors of length 1, on the CPU; releases of Transformers give a tensor or an output that holds it."""
    features = found if isinstance(found, torch.Tensor) else found.pooler_output
    return (features / features.norm(dim=-1, keepdim=True)).double().cpu()


def _mean(values):
    return {"mean": sum(values) / len(values), "per_frame": values} if values else None
