"""What `svg tune` and `svg sweep --recorded` measured on heads, for the page."""

from .cells import page_data

_DIGITS = 4
_MEASURES = ("density", "recall", "error")


def load_recorded(recorded, folder):
    """Read a recorded.json that stands alone, see docs/sweep-format.md.

    Args:
        recorded: its content.
        folder: where it lies.

    Returns:
        dict of `page_data`, without cells.

    Raises:
        ValueError: another format version.
    """
    source = recorded["source"]
    size = source.get("generation") or {}
    about = [source.get("model"), size.get("prompt"), source.get("dtype")]
    return page_data(
        kind="recorded",
        title=f"Recorded attention of {source.get('model') or 'a model'}",
        cells=[],
        notes=[", ".join(str(part) for part in about if part)] if any(about) else [],
        command=recorded["command"],
        versions=source.get("versions"),
    )


def load_rows(recorded, folder):
    """The rows of a recorded.json by method: means, and a map of every measure.

    Args:
        recorded: its content.
        folder: where it lies.

    Returns:
        {"methods": [{"label", "method", "density", "recall", "error", "worst", "maps"}]}, maps being
        {transformer, steps, layers, heads, values: {measure: [step][layer][head]}} with means over the branches.

    Raises:
        ValueError: another format version.
    """
    _check(recorded, "recorded.json", "svg-recorded")
    groups = {}
    for row in recorded["rows"]:
        groups.setdefault(row["label"], []).append(row)
    return {"methods": [_method(label, rows) for label, rows in groups.items()]}


def load_tune(tune, folder):
    """What a tune.json says of the search and its result.

    Args:
        tune: its content.
        folder: where it lies.

    Returns:
        dict: title (of the page), target, unit, steps, saved, saved_at_equal_quality, winner, preset, trials, rows (of
        the result's table), unit_of_budgets ("head" or "layer"), budgets and curves of these.

    Raises:
        ValueError: another format version.
    """
    _check(tune, "tune.json", "svg-tune")
    config, field = (tune["tuned"].get("config") or {}), _head_field(tune["method"])
    # Heads that share their layer's budget have one curve.
    units = len(tune["density"][0])
    budgets = config.get(field) and [row[:units] for row in config[field]]
    unit = "layer" if tune.get("budgets", "heads") != "heads" else "head"
    names = {
        "tuned": f"Budgets per {unit}" if budgets else "One budget and fewer dense steps",
        "uniform": "One budget for all, at the target",
        "uniform_at_equal_cost": "One budget for all, at equal cost",
    }
    weighted = [
        [[e * w for e in head] for head, w in zip(heads, weights)]
        for heads, weights in zip(tune["error"], tune["weight"])
    ]
    return {
        "title": f"Tuning of {tune['model']['name']}",
        **{key: tune[key] for key in ("state", "target", "saved", "winner", "preset", "levels", "density")},
        # Files of earlier versions have neither.
        **{key: tune.get(key) for key in ("steps", "saved_at_equal_quality")},
        "unit": tune["cost"]["unit"],
        "budget": field.removeprefix("head_"),
        "prompts": {key: len(value) for key, value in tune["prompts"].items()},
        "rows": [{"name": text, **_trial(tune[key])} for key, text in names.items() if (tune[key] or {}).get("label")],
        "trials": [_trial(trial) for trial in tune["trials"]],
        "unit_of_budgets": unit,
        "budgets": budgets,
        "loss": weighted,
        "command": tune["command"],
    }


def _check(content, name, form):
    found = content.get("format"), content.get("version")
    if found != (form, 1):
        raise ValueError(
            f"{name} must be {form!r} version 1, got {found[0]!r} version {found[1]!r}: use the svg that wrote it"
        )


def _head_field(method):
    return next(key for key in method if key.startswith("head_"))


def _trial(trial):
    keys = (
        "label",
        "family",
        "videos",
        "value",
        "density",
        "attention_seconds",
        "dense_attention_seconds",
        "psnr",
        "lpips",
    )
    return {**{key: trial[key] for key in keys}, "met": trial.get("met"), "dense_steps": trial.get("dense_steps")}


def _method(label, rows):
    worst = max(rows, key=lambda row: row["error"])
    transformers = dict.fromkeys(row["transformer"] for row in rows)
    return {
        "label": label,
        "method": rows[0]["method"]["method"],
        **{name: _mean([row[name] for row in rows]) for name in _MEASURES},
        "worst": {key: worst[key] for key in ("error", "step", "layer", "head", "branch")},
        "maps": [_maps(name, [row for row in rows if row["transformer"] == name]) for name in transformers],
    }


def _maps(transformer, rows):
    places = {}
    for row in rows:
        places.setdefault((row["step"], row["layer"], row["head"]), []).append(row)
    steps, layers, heads = (sorted({place[axis] for place in places}) for axis in range(3))

    def table(name):
        return [
            [[_mean([row[name] for row in places.get((s, layer, h), [])]) for h in heads] for layer in layers]
            for s in steps
        ]

    return {
        "transformer": transformer,
        "steps": steps,
        "layers": layers,
        "heads": len(heads),
        "values": {name: table(name) for name in _MEASURES},
    }


def _mean(values):
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), _DIGITS) if known else None
