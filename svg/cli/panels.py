"""How help looks: options in panels by what they are about, commands by what they are for.

rich-click draws it; it is a dependency, but nothing else of the program needs it, and without it help is click's own.
"""

from __future__ import annotations

from typing import Any

import click

COMMANDS = {
    "Make videos": ("generate",),
    "Compare": ("evaluate", "sweep", "page"),
    "Tune": ("tune", "record", "sparge-tune", "adapt", "adapt-linears"),
    "Look around": ("presets", "models", "doctor", "bench"),
}
# An option has one meaning, and so one place, in every command that has it.
OPTIONS = {
    "Target": ("--min-psnr", "--max-lpips", "--target-speedup", "--worst"),
    "Model": ("--model", "--revision", "--variant", "--preset", "--lora"),
    "Method": (
        *("--method", "--methods", "--level", "--budget", "--budgets", "--density", "--top-p", "--num-q-clusters"),
        *("--num-k-clusters", "--topk", "--cdf", "--thresholds", "--order", "--attention-sink", "--warmup-steps"),
        "--warmup-noise",
        *("--warmup-layers", "--dense-backend", "--linears", "--max-error", "--set", "--cache", "--caches"),
    ),
    "Video": (
        *("--prompt", "--prompts", "--held-out", "--negative-prompt", "--image", "--last-image", "--height"),
        *("--width", "--frames", "--steps", "--guidance", "--true-cfg", "--flow-shift", "--fps", "--seed", "--seeds"),
    ),
    "Search": (
        "--keep-warmup",
        "--keep-refresh",
        "--keep-granule",
        "--keep-precision",
        "--rounds",
        "--tune-steps",
        "--probe",
        "--l1",
        "--l2",
        "--blocks",
        "--rows",
        "--min-cosine",
    ),
    "Recording": ("--record-steps", "--record-layers", "--record-branches", "--recorded"),
    "Machine": (
        "--device",
        "--dtype",
        "--offload",
        "--vae-tiling",
        "--compile",
        "--yes",
        "--gpus",
        "--split",
        "--ray",
        "--workers",
    ),
    "Comparison": ("--fast", "--no-dense", "--no-control", "--lpips", "--clip", "--metric", "--peers"),
    "Results": (
        *("--out", "--force", "--json", "--csv", "--plots", "--keep-frames", "--no-run", "--save", "--docs"),
        *("--sweep", "--markdown"),
    ),
    "Help": ("--help", "--version"),
}

Command: type[click.Command] = click.Command
Group: type[click.Group] = click.Group
SETTINGS: dict[str, Any] = {}
try:
    from rich_click import RichCommand, RichGroup
except ModuleNotFoundError:
    pass
else:

    class _Group(RichGroup):
        """rich-click's, whose errors stay with the caller as click's do."""

        def main(self, *args: Any, **options: Any) -> Any:
            return click.Group.main(self, *args, **options)

    Command, Group = RichCommand, _Group
    SETTINGS = {
        "rich_help_config": {
            "text_markup": None,
            "text_paragraph_linebreaks": "\n\n",
            "max_width": 120,
            "style_options_panel_border": "dim",
            "style_commands_panel_border": "dim",
            "command_groups": {"svg": [{"name": name, "commands": list(names)} for name, names in COMMANDS.items()]},
            "option_groups": {"svg*": [{"name": name, "options": list(names)} for name, names in OPTIONS.items()]},
        }
    }
