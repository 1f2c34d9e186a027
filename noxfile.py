# /// script
# requires-python = ">=3.11"
# dependencies = ["nox[uv]>=2025.5"]
# ///
"""Everything that is checked, one session each. ``python3 noxfile.py`` needs only Python >= 3.11 and pip."""

import importlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

BOOT = Path(__file__).resolve().parent / ".nox" / "boot"
sys.path.insert(0, str(BOOT))
os.environ["PATH"] += os.pathsep + str(BOOT / "bin")  # uv
# Where it is set, every process compiles torch's sources anew: longer than most tests take.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
try:
    import nox
except ImportError:
    print(f"nox is missing: installing it into {BOOT}", flush=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-qqU", f"--target={BOOT}", "nox[uv]>=2025.5"], check=True)
    importlib.invalidate_caches()
    import nox

# uv, because its environments share one copy of torch on disk, where pip makes one for each.
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]

PLUGINS = sorted(str(path.parent) for path in Path("plugins").glob("*/pyproject.toml"))
MODELS = ("resnet18", "resnet50", "convnext_tiny", "vit_b_16", "gpt2", "tiny-tensors", "batchnorms")
BENCH = {
    "update": ["update", *(f"--model={name}" for name in MODELS)],
    "construction": ["construction", "--model=resnet50", "--model=tiny-tensors", "--model=batchnorms"],
    "host": ["host", *(f"--model={name}" for name in MODELS)],
    "precision": ["precision", "--model=resnet50", "--seconds=40"],
    "bank": ["bank", "--model=resnet50", "--seconds=30"],
    "adamw": ["adamw", "--model=resnet50", "--model=gpt2", "--model=tiny-tensors", "--seconds=30"],
    "scaling": ["scaling", "--seconds=120", "--kernel=auto", "--kernel=foreach"],
    "step": ["step", "--model=resnet18", "--model=gpt2"],
    "ranks": ["ranks", "--model=resnet50", "--model=gpt2", "--ranks=1", "--ranks=2", "--ranks=4"],
}
ON_GPUS = ("update", "host", "precision", "bank", "adamw")  # cases of BENCH that nox -s gpu measures
PERFORMANCE = ("docs/performance.md", "docs/performance-tables.md")
LEVELS = ["default", "avx2", "avx512"]  # kernels of torch for x86-64; a processor has all up to its own
COMPILERS = [
    {"NUMBA_CPU_NAME": "generic"},  # torch's variable does not change what Numba compiles
    {"NUMBA_DISABLE_JIT": "1"},
    {"PYTHONPATH": str(Path("tests/without_numba").resolve())},
]
PORTABLE = [
    "tests/tensors",
    "tests/parity",
    "tests/laws/test_kernels_agree.py",
    "tests/test_bank.py",
    "tests/test_into.py",
    "tests/test_verdict.py",
    "tests/optim",
    "tests/test_testing.py",
]
SMOKE = "import polyak as p, torch; m = torch.nn.Linear(2, 1); p.average(m, 'ema').update(); print(*p.strategies())"


def install(session: nox.Session, *args: str) -> None:
    """Install the host with its extras, every plugin of this repository, and ``args``."""
    session.install(*(f"--editable={path}" for path in (".[all]", *PLUGINS)), *args)


def pytest(session: nox.Session, *args: str, env: Mapping[str, str] | None = None) -> None:
    """Run pytest on at most four cores, in an order that is shuffled and always the same."""
    # All tests of a module stay on one worker: many share what it makes once.
    workers = ["--numprocesses=auto", "--maxprocesses=4", "--dist=loadscope"]
    options = [*workers, "--randomly-seed=1", *args]
    session.run("python", "-m", "pytest", *options, env={"OMP_NUM_THREADS": "1", **(env or {})})


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests (default); pass pytest's arguments after ``--``."""
    install(session, "--group=test")
    pytest(session, *session.posargs)


@nox.session
def portable(session: nox.Session) -> None:
    """Run kernels, optimiser and parity as on other processors, and without Numba; pytest's arguments follow --."""
    install(session, "--group=test")
    ask = "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"
    own = str(session.run("python", "-c", ask, silent=True)).strip()
    levels = LEVELS[: LEVELS.index(own)] if own in LEVELS else ["default"]  # its own is that of the session tests
    machines = [*({"ATEN_CPU_CAPABILITY": level} for level in levels), *COMPILERS]
    failed = []
    for machine in machines:
        session.log(f"as with {machine}")
        try:
            pytest(session, *(session.posargs or PORTABLE), env=machine)
        except nox.command.CommandFailed:
            failed.append(machine)
    if failed:
        session.error(f"failed with {failed}")


@nox.session
def exhaustive(session: nox.Session) -> None:
    """Run properties and fuzzers on many cases, by a seed that differs each time; or by that after --."""
    install(session, "--group=test")
    seed = session.posargs[0] if session.posargs else str(secrets.randbelow(1 << 32))
    session.log(f"to repeat these cases: python3 noxfile.py -s exhaustive -- {seed}")
    seeds = ["--hypothesis-profile=exhaustive", f"--hypothesis-seed={seed}", f"--randomly-seed={seed}"]
    pytest(session, "-m", "(exhaustive or property) and not gpu and not distributed", "--timeout=3600", *seeds)


def measure(session: nox.Session, options: dict[str, list[str]], pages: Sequence[str]) -> None:
    """Run ``polyak bench`` with some options for each report in docs/assets, and refresh pages by the reports."""
    reports = {f"docs/assets/{name}.json": each for name, each in options.items()}
    for report, each in reports.items():
        session.run("python", "-m", "polyak", "bench", *each, f"--json={report}")
    session.run("python", "-m", "polyak.bench.page", *pages, *reports)


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the tests that need CUDA, then refresh docs/performance-gpu.md; or only the tests, with what follows --."""
    install(session, "--group=test")
    session.run("python", "-m", "pytest", "-m", "gpu", *session.posargs)
    if not session.posargs:
        options = {f"gpu-{name}": [*BENCH[name], "--device=cuda"] for name in ON_GPUS}
        measure(session, options, ["docs/performance-gpu.md"])


@nox.session
def distributed(session: nox.Session) -> None:
    """Run the larger tests of averages on several ranks, which need more processes than two cores like."""
    install(session, "--group=test")
    session.run("python", "-m", "pytest", "-m", "distributed", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def integrations(session: nox.Session) -> None:
    """Run the tests with the trainers of other libraries; pytest's arguments follow --."""
    install(session, "--group=integrations")
    trainers(session, *session.posargs)


@nox.session
def mergekit(session: nox.Session) -> None:
    """Compare the merges with mergekit's own, which brings transformers and more."""
    install(session, "--group=integrations")
    session.install("mergekit>=0.1.4")
    trainers(session, "-k", "mergekit", *session.posargs)


def trainers(session: nox.Session, *args: str) -> None:
    """Run the tests of tests/integrations, whose configuration and filters of warnings are their own."""
    workers = ["--numprocesses=auto", "--maxprocesses=4", "--dist=loadscope"]
    session.run("python", "-m", "pytest", "tests/integrations", *workers, *args, env={"OMP_NUM_THREADS": "1"})


@nox.session(python="3.11")
def minimums(session: nox.Session) -> None:
    """Run the tests with the lowest supported version of everything; the trainers' too, unless arguments follow --."""
    install(session, "--group=test", "--resolution=lowest-direct")
    # Old releases use what the newest releases below them deprecate; that is no defect of ours.
    old = ["-W", "ignore::DeprecationWarning", "-W", "ignore:TypedStorage is deprecated:UserWarning"]
    # The compiler of torch 2.6 takes the page for the source of the function on it.
    page = "tests/test_docs.py::test_every_block_of_a_page_runs_and_prints_what_the_page_says[docs/performance.md]"
    pytest(session, *old, f"--deselect={page}", *session.posargs)
    if not session.posargs:
        install(session, "--group=integrations", "--resolution=lowest-direct")
        trainers(session, *old)


@nox.session
def demo(session: nox.Session) -> None:
    """Train on real data and show what averaging bought; its options may follow its name."""
    install(session, "--group=examples")
    session.run("python", "examples/digits.py", *session.posargs)


@nox.session
def matrix(session: nox.Session) -> None:
    """Compare every strategy with the libraries it is named after, on real architectures."""
    install(session, "--group=test")
    session.run("python", "-m", "tests.matrix", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what averaging costs and refresh its pages in docs; or run ``polyak bench`` with what follows --."""
    install(session, "--group=test")
    if session.posargs:
        session.run("python", "-m", "polyak", "bench", *session.posargs)
        return
    measure(session, {f"performance-{name}": options for name, options in BENCH.items()}, PERFORMANCE)
    measure(session, {"files": ["files"]}, ["docs/checkpoints.md"])


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package, its plugins and the user code in tests/typing."""
    install(session, "--group=types")
    session.run("mypy", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and layers."""
    session.install("--group=lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", env={"PYTHONPATH": "src"})


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into build/site, warnings as errors."""
    session.install("--group=docs")
    said = str(session.run("zensical", "build", "--clean", "--strict", silent=True))
    session.log(said)
    if "griffe:" in said:  # zensical does not count what the reader of the docstrings says
        session.error("the reference is incomplete: see the lines above that begin with griffe")


@nox.session
def build(session: nox.Session) -> None:
    """Build every distribution and try the wheels where only their own dependencies are installed."""
    session.install("build[uv]")
    shutil.rmtree("build/dist", ignore_errors=True)
    for path in (".", *PLUGINS):
        session.run("python", "-m", "build", "--installer=uv", "--outdir=build/dist", path)
    wheels = [f"--with={wheel}" for wheel in Path("build/dist").glob("*.whl")]
    alone = ["uv", "run", "--no-project", "--isolated", *wheels, "python"]
    session.run(*alone, "-c", SMOKE)
    told = session.run(*alone, "-m", "polyak", silent=True, success_codes=[1, 2])
    if "pip install rich typer" not in str(told):
        session.error(f"`polyak` without its command line extra should say what to install; it said: {told}")


if __name__ == "__main__":
    match sys.argv:
        case [_, "-s", "demo", str(option), *_] if option.startswith("--") and option != "--":
            sys.argv.insert(3, "--")
    nox.main()
