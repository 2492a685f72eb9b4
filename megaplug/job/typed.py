"""From a composed configuration to the typed :class:`Job`, with every wrong key and value found at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megaplug.errors import Problem, UserError
from megaplug.job import keys
from megaplug.job.counts import count_of
from megaplug.job.schema import Job
from megaplug.job.suggest import did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}

# Numbers so large that they may be written as 15T.
_COUNTS = ("train.tokens",)
# Keys that hold a value by name: such a name, and what it names.
_TABLES = {
    "cluster.peak_tflops": ("bf16", "number format"),
    "slurm.environment": ("NAME", "variable"),
    "slurm.options": ("constraint", "option"),
}


def to_job(config: DictConfig) -> Job:
    """Check every key and type of a composed configuration.

    Raises:
        UserError: Unknown keys, values of a wrong type, or references that lead nowhere; all of them.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

    try:
        composed = OmegaConf.to_container(config, resolve=True)
    except InterpolationKeyError as error:
        raise UserError(
            f"{error.full_key}: {_first_line(error)}", hint="a ${...} names a key that is not there"
        ) from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'configuration'}: {_first_line(error)}") from error
    assert isinstance(composed, dict)
    return job_from_dict(composed)


def job_from_dict(values: dict[Any, Any]) -> Job:
    """Build a job from nested plain values, such as a composed configuration or a frozen ``job.yaml``.

    Raises:
        UserError: As :func:`to_job`.
    """
    from omegaconf import OmegaConf

    # The parts are new, so none has to be copied when it is put in its place.
    typed = OmegaConf.structured(Job, flags={"no_deepcopy_set_nodes": True})
    problems: list[Problem] = []
    for name, value in values.items():
        if name not in keys.top_level_keys():
            hint = did_you_mean(str(name), keys.top_level_keys(), show=0)
            problems.append(Problem(str(name), "there is no such key or group", hint))
        elif name not in keys.sections():
            problems.extend(_assign(typed, name, value, str(name)))
        elif not isinstance(value, dict):
            problems.append(Problem(name, f"is a group of keys, not {value!r}"))
        else:
            problems.extend(_assign_section(typed[name], name, value))
    if problems:
        raise UserError.from_problems(problems)
    job = OmegaConf.to_object(typed)
    assert isinstance(job, Job)
    return job


def _assign_section(node: DictConfig, section: str, values: dict[Any, Any]) -> list[Problem]:
    known = keys.section_keys(section)
    problems: list[Problem] = []
    for key, value in values.items():
        dotted = f"{section}.{key}"
        if key in known:
            problems.extend(_assign(node, key, value, dotted))
        else:
            problems.append(Problem(dotted, "there is no such key", did_you_mean(str(key), known)))
    return problems


def _assign(node: DictConfig, key: str, value: Any, dotted: str) -> list[Problem]:
    from omegaconf.errors import OmegaConfBaseException

    field = node._get_node(key)
    assert field is not None
    if type(value) is type(field._value()) and value == field._value():
        return []
    wanted = _WANTED.get(field._metadata.ref_type)
    if dotted in _COUNTS and isinstance(value, str) and (number := count_of(value)) is not None:
        value = number
    try:
        node[key] = value
    except OmegaConfBaseException as error:
        # 1e9 is a float to YAML, and a whole number to the person who wrote it.
        if isinstance(value, float) and value.is_integer():
            return _assign(node, key, int(value), dotted)
        if isinstance(value, str) and "ListConfig" in str(error):
            return [Problem(dotted, f"is a list, but is given {value!r}", f"write '{dotted}=[{value}]'")]
        if dotted in _TABLES:
            name, what = _TABLES[dotted]
            message = f"has a value for each {what}, but is given {_shown(value)}"
            return [Problem(dotted, message, f"such as {dotted}.{name}={_shown(value)}")]
        message = f"must be {wanted}, but is {_shown(value)}" if wanted else _first_line(error)
        ref_type = field._metadata.ref_type
        hint = _truth_hint(dotted, value, field) if ref_type is bool else _count_hint(dotted, value)
        return [Problem(dotted, message, hint)]
    # OmegaConf takes true for the number 1, and 3 for true; a person who writes tp=true has made a mistake.
    stored = node[key]
    if (
        value is not None
        and isinstance(value, bool | int | float)
        and isinstance(value, bool) != isinstance(stored, bool)
    ):
        message = f"must be {wanted or 'no truth value'}, but is {_shown(value)}"
        if isinstance(stored, str):
            return [Problem(dotted, message, f"""as a text: "{dotted}='{_shown(value)}'\"""")]
        return [Problem(dotted, message)]
    return []


def _truth_hint(dotted: str, value: Any, field: Any) -> str:
    """What can be written where true or false is meant."""
    near = did_you_mean(str(value).lower(), ("true", "false"), show=0)
    null = f", or {dotted}=null" if field._is_optional() else ""
    return near or f"{dotted}=true or {dotted}=false{null}"


def _count_hint(dotted: str, value: Any) -> str:
    """How a number with an ending is written where none is understood."""
    if not isinstance(value, str):
        return ""
    if dotted in _COUNTS:
        return f"such as {dotted}=1T, {dotted}=300B or {dotted}=1e12"
    number = count_of(value)
    return "" if number is None else f"endings are not understood here: {dotted}={number}, if that is meant"


def _shown(value: Any) -> str:
    """A value as YAML has it, texts in quotation marks."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
