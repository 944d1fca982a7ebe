"""`svg presets`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import click

from .panels import Command


@click.command(cls=Command)
@click.argument("name", required=False)
def presets(name: str | None) -> None:
    """List the presets, or show one.

    \b
    Example:
      svg presets wan2.1-t2v-720p
    """
    import yaml

    from svg.configs import load_preset, preset_names

    if name is None:
        for preset in map(load_preset, preset_names()):
            size = preset.generation
            methods = ", ".join(method for method in preset.methods if method != "dense")
            video = f"{size.frames} x {size.height} x {size.width}, {size.steps} steps"
            click.echo(f"{preset.name:<20} {preset.model:<40} {video:<30} {methods}")
        return
    preset = load_preset(name)
    content = {"model": preset.model, "source": preset.source, "generation": vars(preset.generation)}
    methods = {method: config.to_dict() for method, config in preset.methods.items()}
    click.echo(yaml.safe_dump({**content, **methods}, sort_keys=False), nl=False)
