"""``polyak plan``: what an average will cost for a model that you cannot run here."""

from __future__ import annotations

from typing import Annotated

import typer

from polyak.cli.reporting import errors_reported
from polyak.cli.tables import Listing, show
from polyak.errors.formatting import byte_size
from polyak.planning.budget import Budget, Hardware, Job, budget

__all__ = ["plan"]

_SHARES = (0.001, 0.01, 0.05)
_TIMES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def _count(text: str) -> float:
    """Return a number that is written as 70e9 or 70B."""
    times = _TIMES.get(text[-1:].upper())
    try:
        return float(text) if times is None else float(text[:-1]) * times
    except ValueError:
        message = f"got {text!r}; expected a number, such as 70e9 or 70B (K, M, B and T are 1e3, 1e6, 1e9 and 1e12)"
        raise typer.BadParameter(message) from None


def plan(  # noqa: PLR0913, PLR0917 - typer makes an option of each
    params: Annotated[float, typer.Option(parser=_count, help="Values in the model: 70e9, or 70B.")],
    ranks: Annotated[int, typer.Option(help="Processes, one accelerator each.")] = 1,
    replicas: Annotated[int, typer.Option(help="Copies of the sharded model (HSDP); as many as ranks: DDP.")] = 1,
    weights: Annotated[
        str, typer.Option(help="Dtype of the weights that are averaged (FSDP2: the master's).")
    ] = "float32",
    dtype: Annotated[str, typer.Option(help="Dtype of the averages.")] = "float32",
    device: Annotated[str, typer.Option(help="Where they live: cuda, with the model, or cpu, on the host.")] = "cuda",
    averages: Annotated[int, typer.Option(help="How many there are, as in a bank.")] = 1,
    checked: Annotated[bool, typer.Option("--checked", help='As with nonfinite="skip".')] = False,  # noqa: FBT002 - a flag
    step: Annotated[float | None, typer.Option(help="Seconds that a training step takes.")] = None,
    tokens: Annotated[
        float | None, typer.Option(parser=_count, help="Tokens in a step of all ranks, in place of --step: 4M.")
    ] = None,
    memory: Annotated[float, typer.Option(help="GB/s of an accelerator's memory.")] = 3350,
    link: Annotated[float, typer.Option(help="GB/s from an accelerator to the host.")] = 25,
    host: Annotated[float, typer.Option(help="GB/s of a host's memory, for all of its ranks.")] = 300,
    node: Annotated[int, typer.Option(help="Ranks on a host.")] = 8,
    flops: Annotated[float, typer.Option(help="TFLOP/s that an accelerator sustains in training.")] = 400,
) -> None:
    """Estimate what averages will cost each rank, on paper: memory, traffic, time, and which every= keeps it small."""
    with errors_reported():
        job = Job(params, ranks, replicas, weights, step, tokens)
        hardware = Hardware(memory * 1e9, link * 1e9, host * 1e9, node, flops * 1e12)
        cost = budget(job, hardware, dtype=dtype, device=device, averages=averages, checked=checked)
    show(Listing(("each rank", "figure", "what it is"), _rows(cost, on_host=device == "cpu"), wraps=2))
    for line in _cadence(cost):
        typer.echo(line)


def _rows(cost: Budget, *, on_host: bool) -> list[tuple[str, ...]]:
    rows = [
        ("values", f"{cost.elements:.4g}", "of its shard"),
        ("averages", byte_size(cost.averages), "on the host" if on_host else "on the accelerator"),
    ]
    if on_host:
        rows += [
            ("staging", byte_size(cost.staging), "page-locked memory on the host"),
            ("host memory", byte_size(cost.on_node), "of all ranks of a node together"),
            ("sent", byte_size(cost.sent), "to the host, each update"),
            ("host traffic", byte_size(cost.on_host), "through the host's memory, each update"),
        ]
    return [
        *rows,
        ("accelerator traffic", byte_size(cost.moved), "through its memory, each update"),
        ("update", _time(cost.seconds), "at these speeds, if nothing else uses them"),
        ("applied()", byte_size(cost.exchange), "moved to put an average in, and at most to take it out"),
        ("kept aside", byte_size(cost.aside), "the weights meanwhile, where the average cannot hold them"),
        ("between ranks", byte_size(0), "shards are averaged where they are"),
        ("checkpoint", byte_size(cost.saved), "of all ranks together, without the model's"),
        ("full state dict", byte_size(cost.gathered), "on rank 0, for averaged_state_dict(full=True)"),
    ]


def _cadence(cost: Budget) -> list[str]:
    if cost.step is None:
        return ["Give --step or --tokens to see what share of the training that is."]
    whole = f"A step takes {_time(cost.step)}: an update at each is {cost.seconds / cost.step:.2%} of it."
    return [whole, *(f"every={cost.every(share)} keeps it under {share:.1%}." for share in _SHARES)]


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
