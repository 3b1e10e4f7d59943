"""What a comparison becomes when it is resumed: what it was, and what was added."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from adarankgrad.compare.kinds import Kind, kind_of
from adarankgrad.compare.plan import (
    RATES,
    Method,
    Plan,
    list_of,
    load_plan,
    make_plan,
    tables_of,
)
from adarankgrad.train.errors import UserError
from adarankgrad.train.record import method_name
from adarankgrad.train.settings import effective_setting, is_same_setting


def plan_to_resume(output: Path, given: dict[str, Any]) -> Plan:
    """Build the plan of a resumed comparison from the saved one and what this call adds.

    Methods that are named are added, or have the given rates added if they are there already;
    given rates without names are added to every method. Seeds are added. A new method without
    rates takes those of the comparison.

    Args:
        output: Folder of the comparison.
        given: As for `make_plan`; everything that is not given stays as it was.

    Raises:
        UserError: The folder holds no comparison, or finished runs depend on what would change.
    """
    saved = load_plan(output)
    _check_same_kind(output, saved.kind, kind_of({**saved.shared, **given}))
    tables = {method.label: _table(method, given) for method in saved.methods}
    new_tables = tables_of(given.get("methods", {}))
    tables |= new_tables
    names = given.get("optimizers") or list(new_tables or tables)
    grid = {key: list(getattr(saved, key)) for key in RATES}
    settings = {**saved.shared, "seeds": list(saved.seeds), **grid, **given, "methods": tables}
    settings["optimizers"] = [_label(name, tables) for name in list_of(names, str, "optimizers")]
    return grown(saved, make_plan(output, settings))


def grown(saved: Plan, plan: Plan) -> Plan:
    """Return a saved plan with the methods, rates and seeds that another one adds.

    Raises:
        UserError: A setting of finished runs would change.
    """
    check_same_settings(saved, plan)
    added = {method.label: method for method in plan.methods}
    methods = [
        _with_rates(saved, method, added.pop(method.label, method)) for method in saved.methods
    ]
    grid: dict[str, Any] = {key: _union(getattr(saved, key), getattr(plan, key)) for key in RATES}
    result = replace(
        saved,
        methods=(*methods, *added.values()),
        seeds=tuple(dict.fromkeys([*saved.seeds, *plan.seeds])),
        **grid,
    )
    result.check()
    return result


def check_same_settings(saved: Plan, plan: Plan) -> None:
    """See that what runs depend on is the same in two plans, whether it is given or by default.

    Raises:
        UserError: Naming what is not.
    """
    _check_same_kind(plan.output, saved.kind, plan.kind)
    specs = plan.kind.fields
    for name in sorted({*saved.shared, *plan.shared}):
        then, now = saved.shared.get(name), plan.shared.get(name)
        if not is_same_setting(specs[name], now, then):
            then, now = (effective_setting(specs[name], value) for value in (then, now))
            raise UserError(
                f"{plan.output} holds another comparison, with {name} = {then!r} instead of "
                f"{now!r}: name another --output."
            )
    known = {method.label: method.settings for method in saved.methods}
    for method in plan.methods:
        before = known.get(method.label, method.settings)
        names = {*before, *method.settings}
        if any(not is_same_setting(specs[n], method.settings.get(n), before.get(n)) for n in names):
            raise UserError(
                f"{plan.output} holds a comparison whose {method.label} has the settings "
                f"{before}: give the new one another label, or name another --output."
            )


def _check_same_kind(output: Path, saved: Kind, kind: Kind) -> None:
    if type(saved) is not type(kind):
        raise UserError(
            f"{output} holds a comparison of runs of {saved.config_class.command}, not "
            f"{kind.config_class.command}: name another --output."
        )


def _table(method: Method, given: dict[str, Any]) -> dict[str, Any]:
    """Return the table of a saved method; given rates take the place of its own."""
    own = {key: list(getattr(method, key)) for key in RATES if key not in given}
    return {**method.settings, **own}


def _label(name: str, tables: dict[str, Any]) -> str:
    """Return the label that a name of an optimizer has in the tables, if it is there."""
    return name if name in tables or method_name(name) not in tables else method_name(name)


def _with_rates(saved: Plan, method: Method, other: Method) -> Method:
    rates: dict[str, Any] = {}
    for key in RATES:
        old, new = getattr(method, key), getattr(other, key)
        if new and not old:
            raise UserError(
                f"{saved.output} holds runs of {method.label} at its default rate, to which "
                f"{key} cannot be added: name another --output."
            )
        rates[key] = _union(old, new)
    return replace(method, **rates)


def _union(old: tuple[float, ...], new: tuple[float, ...]) -> tuple[float, ...]:
    return old if set(new) <= set(old) else tuple(sorted({*old, *new}))
