"""Composes ``conf/`` and a person's own words into a job, with Hydra but without its application machinery.

Hydra's ``@hydra.main`` makes folders, log files and a changed directory; only its composition is wanted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megaplug.errors import UserError
from megaplug.job import overrides as words
from megaplug.job.meant import several_hint
from megaplug.job.schema import Job
from megaplug.job.suggest import did_you_mean
from megaplug.job.sweep_space import Space, space_of
from megaplug.job.sweep_values import combinations
from megaplug.job.typed import to_job

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

CONFIG_NAME = "train"


@dataclass(frozen=True)
class ConfigSource:
    """Where configuration is read from.

    Attributes:
        name: The primary file, without ``.yaml``.
        extra_dir: A person's own folder, laid beside the shipped one; None if there is none.
    """

    name: str = CONFIG_NAME
    extra_dir: Path | None = None

    @property
    def folders(self) -> list[Path]:
        """The folders in the order they are searched."""
        return [conf_dir(), *([self.extra_dir] if self.extra_dir is not None else [])]


def conf_dir() -> Path:
    """The shipped ``conf/``: inside the package when it is installed, else beside it in the repository."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def group_options(source: ConfigSource) -> dict[str, list[str]]:
    """The options of every config group, ours and the user's."""
    found: dict[str, set[str]] = {}
    for folder in source.folders:
        for file in folder.glob("*/*.yaml"):
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(options) for group, options in sorted(found.items())}


def compose_config(typed_words: Sequence[str], source: ConfigSource | None = None) -> DictConfig:
    """Compose one configuration.

    Args:
        typed_words: Overrides such as ``model=llama3_8b`` or ``train.iters=100``.
        source: Where to look; the shipped ``conf/train.yaml`` if not given.

    Raises:
        UserError: Misspelt keys, groups or options, or a configuration that Hydra cannot compose.
    """
    source = source or ConfigSource()
    parsed, _ = _parsed(typed_words, source)
    sweeping = [override.input_line for override in parsed if override.is_sweep_override()]
    if sweeping:
        key, _, value = sweeping[0].partition("=")
        raise UserError(f"{sweeping[0]} names several values", hint=several_hint(key, value))
    return _compose([*words.for_hydra(parsed), *words.other_lengths_out(parsed)], source)


def compose_job(typed_words: Sequence[str], source: ConfigSource | None = None) -> Job:
    """Compose one configuration and give it its types; see :func:`compose_config`."""
    return to_job(compose_config(typed_words, source))


def sweep_points(typed_words: Sequence[str], source: ConfigSource | None = None) -> list[list[str]]:
    """The overrides of every point of a sweep, checked for misspellings.

    Raises:
        UserError: As :func:`compose_config`.
    """
    source = source or ConfigSource()
    parsed, groups = _parsed(typed_words, source)
    return combinations(parsed, groups)


def sweep_space(typed_words: Sequence[str], source: ConfigSource) -> Space:
    """What the words of a sweep leave open, and those that hold for every point.

    Raises:
        UserError: As :func:`compose_config`.
    """
    parsed, groups = _parsed(typed_words, source, intervals=True)
    return space_of(parsed, groups)


def _parsed(
    typed_words: Sequence[str], source: ConfigSource, *, intervals: bool = False
) -> tuple[list[Override], dict[str, list[str]]]:
    """Words without a misspelling, and the options of every config group."""
    _check_source(source)
    groups = group_options(source)
    parsed = words.parse(typed_words, groups)
    if problems := words.problems_of(parsed, groups, intervals=intervals):
        raise UserError.from_problems(problems)
    return parsed, groups


def _check_source(source: ConfigSource) -> None:
    if source.extra_dir is not None and not source.extra_dir.is_dir():
        raise UserError(f"--config-dir: {source.extra_dir} is not a folder")
    names = sorted({file.stem for folder in source.folders for file in folder.glob("*.yaml")})
    if source.name not in names:
        raise UserError(
            f"--config-name: there is no {source.name}.yaml in {', '.join(map(str, source.folders))}",
            hint=did_you_mean(source.name, names),
        )


def _compose(hydra_words: list[str], source: ConfigSource) -> DictConfig:
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.conf import HydraConf
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    # Hydra finds the primary file only in the first folder, and everything else in all of them.
    first, *others = sorted(source.folders, key=lambda folder: not (folder / f"{source.name}.yaml").is_file())
    extra = [f"hydra.searchpath=['file://{folder.resolve()}']" for folder in others]
    # Launcher, sweeper, log formats: Hydra's own groups would be read and composed for nothing.
    own = [(group, option) for default in HydraConf().defaults for group, option in default.items()]
    extra += [f"hydra/{group}=[]" for group, option in own if option is not None]
    try:
        with initialize_config_dir(str(first.resolve()), version_base="1.3", job_name="megaplug"):
            return compose(config_name=source.name, overrides=[*hydra_words, *extra])
    except yaml.YAMLError as error:
        raise UserError(f"a configuration is not YAML: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException) as error:
        # Further lines are Hydra's search path, options and trace; the first ones say what is wrong.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            " ".join(lines[:2]).removesuffix("Config search path:").strip(),
            hint="python launch/train.py --help lists groups and keys",
        ) from error
    finally:
        GlobalHydra.instance().clear()
