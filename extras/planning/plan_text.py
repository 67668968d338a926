"""A plan of extras/planning/plan.py as a screen of text."""

from __future__ import annotations

from typing import Any

GIB = 2**30


def text(plan: dict[str, Any]) -> str:
    """Return a plan as a screen of text."""
    batch, compiled = plan["batch"], ", compiled" * plan["compiled"]
    rows = [
        ("device", f"{plan['device']}, {plan['precision']}{compiled}"),
        (
            "batch",
            f"{batch['images']} images, {batch['a_process']} a process, {batch['at_once']} at once",
        ),
    ]
    if memory := plan.get("memory"):
        line = f"{memory['step'] / GIB:.2f} GiB of {memory['device'] / GIB:.1f}"
        if "counted" in memory:
            line += f"; {memory['counted'] / GIB:.2f} counted for the step itself"
        rows.append(("memory", line))
    if "images" in plan.get("length", {}):
        rows += _evaluation(plan)
    elif "hours" in plan:
        rows += _speed(plan["speed"]) + _course(plan)
    if plan["does_not_fit"]:
        rows.append(("DOES NOT FIT", plan["does_not_fit"]))
    lines = [f"plan of {plan['config']}, recipe {plan['recipe']}", ""]
    lines += [f"{name:<13} {value}" for name, value in rows]
    if "assumed" in plan:
        lines += ["", "assumed:", *(f"- {line}" for line in plan["assumed"])]
    return "\n".join(lines)


def _evaluation(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of an evaluation without training."""
    rows = [
        ("speed", f"{plan['speed']['images_per_second']:.1f} images/s"),
        ("length", f"1 evaluation of {plan['length']['images']} images"),
        ("time", _time_and_parts(plan)),
    ]
    return rows + _cost(plan)


def _speed(speed: dict[str, Any]) -> list[tuple[str, str]]:
    rate = f"{1e3 * speed['step']:.0f} ms, {speed['images_per_second']:.1f} images/s"
    if "at_most" in speed:
        return [("step", f"{rate} ({speed['at_most']:.0f} if all of the data sheet were reached)")]
    processes = f"{speed['loader_processes']} processes"
    rows = [
        ("step", rate),
        ("network", f"{speed['network']:.1f} images/s"),
        ("loader", f"{speed['loader']:.1f} images/s, {processes}"),
    ]
    if "store" in speed:
        size = f"the data set has {speed['data_set'] / 1e9:.2f} GB"
        rows.append(("store", f"{speed['store'] / 1e6:.0f} MB/s; {size}"))
    return [*rows, ("limited by", speed["limit"])]


def _course(plan: dict[str, Any]) -> list[tuple[str, str]]:
    length, saved = plan["length"], plan["checkpoint"]
    room = "" if saved["free"] is None else f"; {saved['free'] / 1e9:.0f} GB are free"
    rows = [
        ("length", f"{length['steps']} steps, {length['epoch']} an epoch"),
        ("", f"{length['evaluations']} evaluations, {length['checkpoints']} checkpoints"),
        ("checkpoint", f"{saved['bytes'] / 1e9:.2f} GB, {saved['at_once']} of them{room}"),
        ("time", _time_and_parts(plan)),
    ]
    return rows + _cost(plan)


def _time_and_parts(plan: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {_time(part)}" for name, part in plan["hours_of"].items())
    return f"{_time(plan['hours'])}: {parts}"


def _cost(plan: dict[str, Any]) -> list[tuple[str, str]]:
    return [("cost", f"{plan['cost']:.2f}")] if "cost" in plan else []


def _time(hours: float) -> str:
    return f"{hours:.2f} h" if hours >= 1 else f"{60 * hours:.1f} min"
