"""What evolution preserved: tasks of lm-evaluation-harness on all candidates of a population."""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from cycleqd_jax.merging.low_rank import decompose_low_rank
from cycleqd_jax.merging.spectral import expert_gains, materialise
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import load_model
from cycleqd_jax.models.lora import is_adapter, load_adapter
from cycleqd_jax.models.specs import roles
from cycleqd_jax.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.language.harness import PopulationLM
from cycleqd_jax.runs.language.local_tasks import LOCAL_TASKS
from cycleqd_jax.runs.records.folder import RunFiles, read_config
from cycleqd_jax.runs.workspace import Workspace

Scores = dict[str, dict[str, float]]
"""Task -> metric -> value, with the standard error of a metric under ``METRIC_stderr``."""

_NOT_METRICS = ("name", "alias", "sample_len", "sample_count")


class Tasks:
    """Tasks of the harness, loaded once, to be asked of any number of models.

    Args:
        names: of the harness's tasks, groups and tags, of `LOCAL_TASKS`, files of YAML, or configs.
        num_fewshot: examples in every prompt, where a task does not insist on none.
        limit: ask only the first questions of a task; below 1 a share of them.
        gen_kwargs: take the place of a task's own options of generation.
        include_path: a folder with further tasks in YAML.
        options: of `lm_eval.evaluator.evaluate`, such as ``apply_chat_template`` (True or a name),
            ``system_instruction``, ``log_samples``, ``bootstrap_iters``.

    The harness's own tasks download their questions unless the data sets are on this machine
    already; ``HF_DATASETS_OFFLINE=1`` forbids it. `LOCAL_TASKS` never do.

    Raises:
        ValueError: no task, or one that nobody knows.
    """

    def __init__(
        self,
        names: Sequence[str | Mapping[str, Any]],
        *,
        num_fewshot: int | None = None,
        limit: float | None = None,
        gen_kwargs: Mapping[str, Any] | None = None,
        include_path: str | Path | None = None,
        **options: Any,
    ) -> None:
        from lm_eval.tasks import TaskManager

        if not names:
            raise ValueError("tasks: expected at least one, found none")
        specs = [
            LOCAL_TASKS[name]() if isinstance(name, str) and name in LOCAL_TASKS else name
            for name in names
        ]
        # Reading the index of the harness's thousands of tasks takes seconds.
        index = any(isinstance(spec, str) for spec in specs)
        manager = TaskManager(
            include_defaults=index, include_path=None if include_path is None else str(include_path)
        )
        try:
            self._loaded = manager.load(specs)
        except KeyError as error:
            raise ValueError(
                f"tasks: {error.args[0]} (local ones: {', '.join(LOCAL_TASKS)})"
            ) from None
        for task in self._loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if num_fewshot is not None and own != 0:
                task.set_config(key="num_fewshot", value=num_fewshot)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            if gen_kwargs and task.get_config("output_type") == "generate_until":
                task.set_config(key="generation_kwargs", value=dict(gen_kwargs), update=True)
        self._limit = limit
        self._options = {"log_samples": False, **options}

    def evaluate(self, population: PopulationLM, seed: int = 1234) -> list[dict[str, Any]]:
        """The harness's results for every candidate, in their order.

        Args:
            population: the models.
            seed: of the examples in the prompts: the same ones for every candidate, whose requests
                are therefore the same, and are answered in one batch.
        """
        from lm_eval.evaluator import evaluate

        results = []
        for model in population.models:
            # Some tasks draw from the global generators; the harness seeds them too.
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            for task in self._loaded["tasks"].values():
                task.set_fewshot_seed(seed)
            results.append(evaluate(model, self._loaded, limit=self._limit, **self._options))
        population.forget()
        return results


def population_of(workspace: Workspace, gains: Any, **options: Any) -> PopulationLM:
    """The candidates of a run, such as its elites, as models that are measured together.

    Args:
        workspace: the run's models and basis.
        gains: genotypes, leaves (candidates, ...), as `CyclicRepertoire.gather` gives them.
        options: of `PopulationLM`.
    """
    params = workspace.population(gains)
    return PopulationLM(workspace.architecture, workspace.tokenizer, params, **options)


def each_model(
    folders: Mapping[str, str | Path], base: str | Path | None = None, **options: Any
) -> Iterator[tuple[str, PopulationLM]]:
    """Models from their folders, one in memory at a time.

    Those of one architecture and one tokenizer are one `PopulationLM` with other weights, so that
    nothing is compiled again: be done with a model before the next one is asked for.

    Args:
        folders: name -> folder of a model, or of a LoRA adapter of `base`.
        base: folder of the model that adapters belong to.
        options: of `PopulationLM`.

    Raises:
        ValueError: no model that this library reads, or an adapter without `base`.
    """
    population: PopulationLM | None = None
    for name, folder in folders.items():
        config, params, tokenizer = _load(Path(folder), base)
        known = population is not None and (
            population.scorer.config == config
            and tokenizer_fingerprint(population.tokenizer) == tokenizer_fingerprint(tokenizer)
        )
        if population is None or not known:
            population = PopulationLM(config, tokenizer, params, **options)
        else:
            population.use(params)
        del params
        yield name, population
        population.release()  # before the next one is read


def _load(folder: Path, base: str | Path | None) -> tuple[LlamaConfig, Any, Any]:
    if not is_adapter(folder):
        return *load_model(folder), load_tokenizer(folder)
    if base is None:
        raise ValueError(f"{folder}: expected the folder of the adapter's base too, found none")
    config, params = load_model(base)
    basis, _ = decompose_low_rank(load_adapter(folder, config), roles(config))
    return config, jax.jit(materialise)(params, basis, expert_gains(basis, 0)), load_tokenizer(base)


def models_of_run(folder: Path) -> tuple[str, dict[str, Path]]:
    """The base's folder and the named folders of all models of a finished run.

    Returns:
        The base's folder, and ``base``, ``expert/NAME``, ``cycleqd/best``, ``cycleqd/aggregate``,
        each with its folder.

    Raises:
        RunFolderError: the folder holds no run, or one of another version of the library.
        ValueError: the run is not finished.
    """
    config, files = RunConfig.from_json(read_config(folder)), RunFiles(folder)
    models = {"base": Path(config.base)}
    models |= {f"expert/{name}": Path(path) for name, path in config.experts.items()}
    found = {"cycleqd/best": files.best, "cycleqd/aggregate": files.aggregate}
    missing = [str(path) for path in found.values() if not path.is_dir()]
    if missing:
        raise ValueError(
            f"{folder}: expected a finished run, found no {', '.join(missing)}: start the run's "
            "command again to finish it"
        )
    return config.base, models | found


def scores_of(results: Mapping[str, Any]) -> Scores:
    """The numbers of one candidate's results: ``acc``, or ``exact_match/strict-match``."""
    scores: Scores = {}
    for task, row in results["results"].items():
        metrics = {}
        for key, value in row.items():
            if key in _NOT_METRICS or not isinstance(value, int | float):
                continue
            metric, _, chosen = key.partition(",")
            metrics[metric if chosen in ("", "none") else f"{metric}/{chosen}"] = float(value)
        scores[task] = metrics
    return scores


def retention_table(models: Mapping[str, Scores], title: str = "Language retention") -> Table:
    """A row a model, a column a metric, with standard errors where there are some."""
    columns = list(
        dict.fromkeys(
            (task, metric)
            for scores in models.values()
            for task, metrics in scores.items()
            for metric in metrics
            if "_stderr" not in metric
        )
    )
    table = Table(title=title, title_style="bold", title_justify="left")
    table.add_column("model", no_wrap=True)
    for task, metric in columns:
        table.add_column(f"{task}\n{metric}", justify="right")
    for name, scores in models.items():
        table.add_row(name, *(_cell(scores.get(task, {}), metric) for task, metric in columns))
    return table


def _cell(metrics: Mapping[str, float], metric: str) -> str:
    if metric not in metrics:
        return "–"
    name, slash, chosen = metric.partition("/")
    error = metrics.get(f"{name}_stderr{slash}{chosen}")
    return f"{metrics[metric]:.3f}" + ("" if error is None else f" ±{error:.3f}")
