"""What a reader of times and budgets must know, found in the cells themselves."""

from collections import defaultdict
from typing import Any

_LEAST_SPREAD = 1.5  # densities this many times apart should show in the time
_FOLLOWS = 1 / 3  # of what the densities save, at least so much should be saved
_SAME = 0.01  # relative difference of densities that are one


def remarks(cells, budgets):
    """Notes on methods whose time does not follow their budget, and on budgets that compute the same.

    Args:
        cells: of `svg.eval.page.cells.cell`.
        budgets: names of the settings that say how much is computed.

    Returns:
        Texts.
    """
    sparse = [one for one in cells if one["role"] == "accelerated" and one["status"] == "finished" and _density(one)]
    return [*_launch_bound(cells, sparse), *_collapsed(sparse, budgets)]


def _launch_bound(cells, sparse):
    """Times are those of a GPU only: elsewhere no speed is claimed."""
    by_id = {one["id"]: one for one in cells}
    for (_, method), own in _grouped(sparse, lambda one: (one["group"], one["method"])):
        own = [one for one in own if one["device_type"] == "cuda" and (one["seconds"] or {}).get("attention")]
        settings = sorted(
            (_mean(_density(one) for one in same), _mean(one["seconds"]["attention"] for one in same))
            for _, same in _grouped(own, lambda one: one["label"])
        )
        if not settings:
            continue
        (low, fast), (high, slow) = settings[0], settings[-1]
        dense = [by_id[one["reference"]] for one in own if one["reference"] in by_id]
        whole = _mean(one["seconds"]["attention"] for one in dense if (one["seconds"] or {}).get("attention"))
        if high >= _LEAST_SPREAD * low and 1 - fast / slow < _FOLLOWS * (1 - low / high):
            yield (
                f"launch-bound: attention of {method} takes {fast:.3g} s at density {low:.2f} and {slow:.3g} s at {high:.2f}: "
                f"at this size launches and planning take the time, not what is computed"
            )
        elif whole is not None and high < 1 and fast > whole:
            yield (
                f"launch-bound: attention of {method} takes {fast:.3g} s at density {low:.2f} where dense takes {whole:.3g} s: "
                f"at this size launches and planning take the time; more tokens are where it pays"
            )


def _collapsed(sparse, budgets):
    """Settings of one family that differ in the budget and compute the same share."""

    def family(one):
        rest = {name: value for name, value in one["settings"].items() if name not in budgets}
        return one["group"], one["prompt"], one["seed"], repr(sorted(rest.items()))

    found = {}
    for _, own in _grouped(sparse, family):
        own = sorted({one["label"]: one for one in own}.values(), key=_density)
        for one, other in zip(own, own[1:]):
            if _density(other) - _density(one) <= _SAME * _density(other):
                found.setdefault((one["label"], other["label"]), _density(other))
    for (one, other), density in found.items():
        yield (
            f"{one} and {other} compute the same share of attention ({density:.3f}): warm-up, a floor or whole blocks decide "
            f"there, not the budget"
        )


def _density(one) -> Any:
    return one["density"]["all_calls"] if one["density"] else None


def _grouped(items, key):
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups.items()


def _mean(values) -> Any:
    values = list(values)
    return sum(values) / len(values) if values else None
