"""A cell of a sweep: one generation, fully resolved, named by the hash of what it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from svg.pipelines import GenerationRequest
from svg.pipelines.caches import cache_file
from svg.pipelines.fingerprint import file_sha256

from ..config import config_from_dict
from ..generate.job import Job, read_image

VERSION = 1  # of cells, journal and sweep.json
ROLES = ("dense", "control", "accelerated")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One generation of a sweep; plain values only, as sweep.json holds them.

    Args:
        role: "dense" (the reference), "control" (dense once more on another backend) or "accelerated".
        label: short name, such as "svg2 top_p=0.7".
        model: {"name", "preset", "fingerprint"}.
        method: the method's settings, "method" among them; of a control: those of its reference.
        generation: fields of GenerationRequest, with "image" and "last_image" as paths, and "image_sha256";
            "last_image_sha256" where there is one, "thresholds_sha256" and "layers_sha256" where the method reads such a file.
        run: {"device" ("cpu" or "cuda"), "dtype", "offload", "flow_shift", "vae_tiling", "lpips"}, and "cache" where the
            cell has one.
        reference: id of the dense cell it is compared with, or None for the dense cell.
        control: id of the control cell of its group, or None.
    """

    role: str
    label: str
    model: dict[str, Any]
    method: dict[str, Any]
    generation: dict[str, Any]
    run: dict[str, Any]
    reference: str | None
    control: str | None = None

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits of the SHA-256 of what decides the result: no label, no preset's name."""
        content = asdict(self)
        del content["label"], content["control"]
        content["model"] = {key: self.model[key] for key in ("name", "fingerprint")}
        text = json.dumps({"version": VERSION, **content}, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def job(self) -> Job:
        """The cell as a job of `svg generate`, image loaded.

        Raises:
            ValueError, TypeError: a value breaks its rule.
            OSError: the image cannot be read.
        """
        generation = {key: value for key, value in self.generation.items() if not key.endswith("_sha256")}
        paths = {name: generation.pop(name) for name in ("image", "last_image")}
        images = {name: read_image(path, name) for name, path in paths.items() if path is not None}
        return Job(
            model=self.model["name"],
            preset=self.model["preset"],
            config=config_from_dict(self.method),
            request=GenerationRequest(**images, **generation),
            image_path=paths["image"],
            last_image_path=paths["last_image"],
            out=Path("svg-out"),
            force=False,
            dense=True,
            control=self.role == "control",
            **self.run,
        )


def cell_of(
    job: Job, mark: str | None, *, role: str, label: str, dtype: str, device: str, reference: Cell | None = None
) -> Cell:
    """A job's cell.

    Args:
        job: the resolved job.
        mark: the model's `fingerprint`.
        role, label: as in Cell.
        dtype, device: resolved: "bf16", "fp16" or "fp32", "cpu" or "cuda".
        reference: the dense cell of the same model, prompt and seed, or None for that cell itself.

    Returns:
        The cell.

    Raises:
        OSError: the image or the thresholds cannot be read.
    """
    request = asdict(replace(job.request, image=None, last_image=None))
    request |= {
        "image": job.image_path,
        "image_sha256": None if job.image_path is None else file_sha256(job.image_path),
        "last_image": job.last_image_path,
    }
    if job.last_image_path is not None:
        request["last_image_sha256"] = file_sha256(job.last_image_path)
    for name in ("thresholds", "layers", "linears_file"):
        file = getattr(job.config, name, None)
        if file is not None:  # a file that is made again makes other cells
            request[f"{name}_sha256"] = file_sha256(file)
    if job.cache is not None and (file := cache_file(job.cache)) is not None:
        request["cache_sha256"] = file_sha256(file)
    return Cell(
        role=role,
        label=label,
        model={"name": job.model, "preset": job.preset, "fingerprint": mark},
        method=job.config.to_dict(),
        generation=request,
        run={
            "device": device,
            "dtype": dtype,
            "offload": job.offload,
            "flow_shift": job.flow_shift,
            "vae_tiling": job.vae_tiling,
            "lpips": job.lpips,
            **({} if job.cache is None else {"cache": job.cache}),
            **({} if job.peer is None else {"peer": job.peer}),  # cells without one keep their names
        },
        reference=None if reference is None else reference.id,
    )
