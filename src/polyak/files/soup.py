"""``polyak.files.soup``: the mean of those checkpoints that make it better by your own evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polyak.errors import ConfigError
from polyak.errors.formatting import shown
from polyak.files.average import check_choice
from polyak.files.combine import Average
from polyak.files.inputs import check_enough, opened
from polyak.files.journal import Journal, identity
from polyak.files.kinds import is_lora
from polyak.files.kitchen import Ingredient, Kitchen, sign_of
from polyak.files.make import Job, Request, make
from polyak.files.plan import planned
from polyak.files.writing.target import check_spared
from polyak.io.atomic import as_path

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from matplotlib.axes import Axes
    from torch import Tensor

    from polyak.files.plan import Match

__all__ = ["Ingredient", "Soup", "soup"]


@dataclass(frozen=True)
class Soup:
    """The ingredients of a soup, and its file.

    Attributes:
        out: The file or folder that was written.
        ingredients: The files in the order in which they were tried.
        score: The score of the soup.
        mode: Whether large scores are good, or small ones.
        evaluations: How often the function was called; what the journal knew was not evaluated again.
    """

    out: Path
    ingredients: tuple[Ingredient, ...]
    score: float
    mode: Literal["max", "min"]
    evaluations: int

    @property
    def kept(self) -> tuple[Path, ...]:
        """The files in the soup."""
        return tuple(one.file for one in self.ingredients if one.kept)

    @property
    def gain(self) -> float:
        """How much better the soup is than the best file alone; negative if it is worse."""
        sign = sign_of(self.mode)
        best = max(sign * one.score for one in self.ingredients if math.isfinite(one.score))
        return sign * self.score - best

    def table(self) -> str:
        """Return the files, their scores, and what became of each, as text."""
        width = max(len("file"), *(len(one.file.name) for one in self.ingredients))
        lines = [f"{'file':{width}}  {'alone':>10}  {'soup':>10}  kept"]
        lines += [
            f"{one.file.name:{width}}  {one.score:10.6g}  {one.soup:10.6g}  {'yes' if one.kept else 'no'}"
            for one in self.ingredients
        ]
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None, *, label: str = "score") -> Axes:
        """Draw the score of each file alone, and the soup's score after it was tried.

        Args:
            ax: Where to draw. Defaults to a new figure.
            label: What the scores are.

        Raises:
            MissingExtraError: If matplotlib is not installed.
        """
        from polyak.plot import scores

        rows = [(one.file.name, one.score) for one in self.ingredients]
        return scores(rows, [one.soup for one in self.ingredients], ax, label=label)


def soup(
    files: Iterable[str | os.PathLike[str]],
    evaluate: Callable[[dict[str, Tensor]], float],
    *,
    how: Literal["greedy", "uniform"] = "greedy",
    rule: Literal["strict", "not_worse"] = "strict",
    mode: Literal["max", "min"] = "max",
    work: str | os.PathLike[str],
    out: str | os.PathLike[str],
    key: str | None = None,
    match: Match = "same",
    threads: int | None = None,
    shard_size: int | str | None = None,
) -> Soup:
    """Average those checkpoints that make the average better, by an evaluation of your own.

    The greedy soup evaluates each file alone, and then tries them in the order of their scores: one is kept if the mean
    with it scores better. That takes 2 n - 1 evaluations of n files at most. Each is noted in a journal in ``work``
    before the next begins: a run that was interrupted goes on where it was, and nothing is evaluated twice. The
    journal knows scores by the contents of the files, the function's name and its source.

    Source: Wortsman et al., "Model soups" (2022), arXiv:2203.05482. The paper's text keeps what is ``"not_worse"``; its
    code keeps what is strictly better.

    Args:
        files: Two checkpoints or more, fine-tuned from the same weights.
        evaluate: Returns a score for a state dict, on data that is used for nothing else.
        how: "greedy", or "uniform": all files.
        rule: "strict" keeps what makes the soup better; "not_worse" also what leaves its score.
        mode: Whether large scores are good ("max") or small ones ("min").
        work: A folder for the journal.
        out: The output, as in ``polyak.files.average``.
        key: The path of keys to the weights in a dictionary. Defaults to the one that is usual.
        match: "same" refuses files with other names; "common" leaves out names that some lack.
        threads: On how many threads the output is written.
        shard_size: The largest file in an output folder.

    Raises:
        ConfigError: If an option is wrong, or no score is a finite number.
        StateError: If a file is missing, damaged, malicious or no checkpoint.
        MismatchError: If names or shapes differ.
        NonFiniteError: If a file has a NaN or an infinity.
        WriteError: If the journal or the output cannot be written.

    Often confused with: ``best=`` of ``polyak.files.average``, which takes the best files without trying their mean.

    Examples:
        >>> import tempfile, torch
        >>> from polyak import files
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     names = [f"{folder}/{value}.pt" for value in (1.0, -2.0, 9.0)]
        ...     for value, name in zip((1.0, -2.0, 9.0), names):
        ...         torch.save({"w": torch.tensor([value])}, name)
        ...     made = files.soup(
        ...         names, lambda state: state["w"].item() ** 2, mode="min", work=f"{folder}/work", out=f"{folder}/o.pt"
        ...     )
        ...     print([file.name for file in made.kept], made.score, made.evaluations)
        ['1.0.pt', '-2.0.pt'] 0.25 5
    """
    check_choice("how", how, ("greedy", "uniform"))
    check_choice("rule", rule, ("strict", "not_worse"))
    check_choice("mode", mode, ("max", "min"))
    if not callable(evaluate):
        message = f"evaluate: got {shown(evaluate)}; expected a function that takes a state dict and returns a number"
        raise ConfigError(message)
    folder, request = as_path(work, "work"), Request.of(out, threads, shard_size, "last", hashes=True)
    with opened(files, key) as found:
        check_enough(found)
        check_spared(request.out, found)
        if any(is_lora(one.tensors) for one in found):
            message = (
                "the files hold factors of an adapter (LoRA), whose means are no adapter; merge each into its base"
            )
            raise ConfigError(message)
        entries, notes = planned(found, match=match, integers="last", dtype=None)
        kitchen = Kitchen(found, entries, evaluate, Journal(folder, identity(evaluate)))
        ingredients = kitchen.greedy(mode, rule) if how == "greedy" else kitchen.uniform(mode)
        kept = sorted(number for number, one in ingredients.items() if one.kept)  # as they were evaluated
        inputs = [found[number] for number in kept]
        final, _ = planned(inputs, match="common", integers="last", dtype=None)
        common = {name for entry in entries for name in entry.names}
        final = [entry for entry in final if common.issuperset(entry.names)]
        score = [*ingredients.values()][-1].soup
        weights = [1.0 / len(kept)] * len(kept)
        record = {
            "weights": weights, "steps": [one.step for one in inputs], "score": score, "notes": notes,
            "settings": {"how": how, "rule": rule, "mode": mode, "key": key, "match": match},
            "tried": [{"path": str(one.file), "score": one.score, "kept": one.kept} for one in ingredients.values()],
        }  # fmt: skip
        make(Job("polyak_soup", inputs, final, lambda: Average(weights, raises=True), record, inputs[-1]), request)
        return Soup(request.out, tuple(ingredients.values()), score, mode, kitchen.evaluations)
