"""What it costs to read this package: counts of its source, and of what one small run executes.

    python -m benchmarks.reading                      # prints the table
    python -m benchmarks.reading --out benchmarks/results/reading

Beside each count stand the figure before the package was rebuilt in November 2026, and the aim that was set then.
CONTRIBUTING.md gives the reason for each aim that is missed. Nothing here is timed.

A run is followed with a profiler. Every function of the package that was entered counts once, with its source lines,
decorators and docstring included. Lines of a function inside another one count with the outer one.

Four things are not counted, because a reader does not pay for them:

- methods among the names that several files define: a class says whose method it is (`score` of an objective or of a
  scorer, `forward` of a module, `state_dict` of a source), and a Protocol declares most of them;
- functions of one name that modules of one folder must define because a table calls them by it (PROTOCOLS); `main`;
- parameters of Triton kernels: pointers and sizes, which cannot travel in a record. They have a row of their own;
- declarations without a body (`...`) among the functions that read few fields of what they take.

The figures before are of an earlier script, which did count the last three.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffalign"
MANY_PARAMETERS = 6
FEW_FIELDS = 3
WHOLE = {"Run", "Config", "Context", "AnyConfig", "PreferenceRun", "PreferenceModelConfig"}
Function = ast.FunctionDef | ast.AsyncFunctionDef
# Folder -> names that modules there and below define under one protocol; a name counts once another folder defines it.
PROTOCOLS = {
    "data/formats": {"layout"},  # of each column layout; `data/table/open.py` calls it through `_LAYOUTS`
    "cli": {"add_arguments", "run"},  # of each command; `cli/commands.py` calls them by the command's name
}

TOP, FOLDER = "names at the top of diffalign/", "most files in a folder"
PARAMETERS = "functions with more than 6 parameters"
WHOLES = "functions that take a whole Run, Config or Context and read at most 3 fields"
TWICE, README, MYPY = "public names defined in two or more files", "lines of README", "errors of mypy in strict mode"
RUN, STEP, SETUP = "a cached DPO run", "of it: one step", "of it: all but the step"
IMAGE = "one image of evaluate"
# Row -> the figure before, and the aim: an upper bound, in lines where a run is followed.
AIMS = {
    TOP: (28, 16),
    FOLDER: (35, 12),
    PARAMETERS: (46, 12),
    WHOLES: (51, 10),
    TWICE: (38, 8),
    README: (349, 150),
    RUN: (3223, 2300),
    STEP: (749, 600),
    SETUP: (2243, 1400),
    IMAGE: (1717, 1200),
    MYPY: (238, 0),
}


def modules() -> dict[Path, ast.Module]:
    """Every file of the package, parsed."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def functions(tree: ast.Module) -> Iterator[Function]:
    """Functions and methods, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def parameters(function: Function) -> list[ast.arg]:
    """All parameters but `self` and `cls`."""
    of = function.args
    found = [*of.posonlyargs, *of.args, *of.kwonlyargs]
    return [arg for arg in found if arg.arg not in ("self", "cls")]


def fields_read(function: Function, name: str) -> set[str] | None:
    """Attributes of parameter `name` that a function reads; None where it passes the whole object on."""
    inside = [node for statement in function.body for node in ast.walk(statement)]
    owners = {id(node.value) for node in inside if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    uses = [node for node in inside if isinstance(node, ast.Name) and node.id == name]
    if any(id(use) not in owners for use in uses):
        return None
    return {
        node.attr
        for node in inside
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }


def is_kernel(function: Function) -> bool:
    """Whether Triton compiles it."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def is_declaration(function: Function) -> bool:
    """Whether it has no body, as the methods of a Protocol."""
    last = function.body[-1]
    return isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant) and last.value.value is Ellipsis


def takes_more_than_it_reads(function: Function) -> bool:
    """Whether a whole run, config or context is taken and at most a few of its fields are read."""
    if is_declaration(function):
        return False
    for arg in parameters(function):
        names = (
            {node.id for node in ast.walk(arg.annotation) if isinstance(node, ast.Name)} if arg.annotation else set()
        )
        if names & WHOLE:
            read = fields_read(function, arg.arg)
            if read is not None and len(read) <= FEW_FIELDS:
                return True
    return False


def shared_names(trees: dict[Path, ast.Module]) -> list[str]:
    """Public functions and classes at the top of two or more files, but for those of one protocol."""
    defined: dict[str, set[Path]] = {}
    for path, tree in trees.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith(
                "_"
            ):
                defined.setdefault(node.name, set()).add(path)
    found = []
    for name, paths in defined.items():
        agreed = any(
            name in names and all(path.is_relative_to(PACKAGE / folder) for path in paths)
            for folder, names in PROTOCOLS.items()
        )
        if len(paths) > 1 and name != "main" and not agreed:
            found.append(name)
    return sorted(found)


def static() -> dict[str, Any]:
    """Counts that need no run."""
    trees = modules()
    every = [(path, function) for path, tree in trees.items() for function in functions(tree)]
    many = [(path, function) for path, function in every if len(parameters(function)) > MANY_PARAMETERS]
    kernels = [function for _, function in many if is_kernel(function)]
    long = [(len(parameters(f)), f"{path.relative_to(PACKAGE)}:{f.name}") for path, f in many if f not in kernels]
    top = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in trees}
    in_folder = {
        path.parent.relative_to(PACKAGE).as_posix(): sum(
            p.parent == path.parent and p.name != "__init__.py" for p in trees
        )
        for path in trees
    }
    twice = shared_names(trees)
    return {
        TOP: len(top - {"__init__", "__main__"}),
        FOLDER: max((n, name) for name, n in in_folder.items() if name not in ("objectives", "world")),
        PARAMETERS: len(long),
        "the longest of them": sorted(long, reverse=True)[:3],
        "Triton kernels with more than 6 parameters": len(kernels),
        WHOLES: sum(takes_more_than_it_reads(f) for _, f in every),
        TWICE: len(twice),
        "those names": twice,
        README: len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()),
        "lines of the package": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in trees),
    }


class Followed:
    """Functions of the package that were entered while it was active."""

    def __init__(self) -> None:
        self.codes: set[CodeType] = set()

    def __enter__(self) -> Followed:
        sys.setprofile(self._event)
        threading.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def _event(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            self.codes.add(frame.f_code)

    def counts(self) -> dict[str, int]:
        """Functions, files, lines, and what those lines are."""
        return counted(self.codes)


def counted(codes: set[CodeType]) -> dict[str, int]:
    """Functions, files and source lines of code objects; of those lines, refusals and the code that refuses nothing.

    Module bodies, lambdas and comprehensions are left out.
    """
    spans: dict[Path, dict[int, tuple[int, int]]] = {}
    lines: set[tuple[Path, int]] = set()
    found = 0
    for code in codes:
        if code.co_name.startswith("<"):
            continue
        path = Path(code.co_filename)
        if path not in spans:
            spans[path] = {
                min([f.lineno, *(d.lineno for d in f.decorator_list)]): (f.lineno, f.end_lineno or f.lineno)
                for f in functions(ast.parse(path.read_text(encoding="utf-8")))
            }
        if code.co_firstlineno in spans[path]:
            found += 1
            first, last = spans[path][code.co_firstlineno]
            lines |= {(path, line) for line in range(min(first, code.co_firstlineno), last + 1)}
    files = {path for path, _ in lines}
    refusals = {(path, line) for path in files for line in lines_of_refusals(path)} & lines
    code = {(path, line) for path in files for line in lines_of_code(path)} & lines
    return {
        "functions": found,
        "files": len(files),
        "lines": len(lines),
        "lines of refusals": len(refusals),
        "lines of code": len(code - refusals),
    }


def lines_of_refusals(path: Path) -> set[int]:
    """Lines of `raise` statements, and of the conditions that lead to nothing else."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        only_raises = isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise) and not node.orelse
        if isinstance(node, ast.Raise) or only_raises:
            found |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def lines_of_code(path: Path) -> set[int]:
    """Lines that are no docstring, no comment and not blank."""
    source = path.read_text(encoding="utf-8")
    code = {
        number
        for number, line in enumerate(source.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#")
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function | ast.ClassDef) and ast.get_docstring(node) is not None:
            code -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return code


def executed() -> dict[str, Any]:
    """A cached DPO run on the embedded world, one of its steps, all but the step, and one image of `evaluate`."""
    from diffalign.config.schema import load_config, packaged_config
    from diffalign.evaluation.evaluate import evaluate
    from diffalign.evaluation.sampling import Sampling
    from diffalign.training.run import run_training
    from diffalign.training.trainable import Run
    from diffalign.world import base_path

    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"data.cache_dir={folder}/cache",
            "data.max_pairs=8",
            "training.train_batch_size=2",
            "training.max_train_steps=2",
            "training.logging_steps=1",
            "training.checkpointing_steps=2",
            "training.report_to=none",
        ]
        whole, step = Followed(), Followed()
        _silently(
            lambda: run_training(
                load_config(packaged_config("world/dpo.yaml"), [*settings, f"output_dir={folder}/first"])
            )
        )
        original = Run.step

        def followed_step(*args: Any) -> None:
            sys.setprofile(step._event)
            original(*args)
            sys.setprofile(whole._event)

        Run.step = followed_step  # type: ignore[method-assign]
        try:
            with whole:
                _silently(
                    lambda: run_training(
                        load_config(packaged_config("world/dpo.yaml"), [*settings, f"output_dir={folder}/run"])
                    )
                )
        finally:
            Run.step = original  # type: ignore[method-assign]
        image = Followed()
        prompts = ["a red circle on a black background"]
        with image:
            _silently(
                lambda: evaluate(
                    str(base_path()),
                    {"dpo": f"{folder}/run"},
                    prompts,
                    [0],
                    scorers=["world"],
                    out_dir=f"{folder}/eval",
                    sampling=Sampling(num_inference_steps=1),
                )
            )
    return {
        RUN: counted(whole.codes | step.codes),
        STEP: step.counts(),
        SETUP: counted(whole.codes - step.codes),
        IMAGE: image.counts(),
    }


def _silently(run: Callable[[], Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run()


def mypy_errors() -> int:
    """Errors of mypy over the whole package with the project's settings."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "diffalign"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    last = done.stdout.strip().splitlines()[-1]
    return 0 if last.startswith("Success") else int(last.split()[1])


def table(found: dict[str, Any]) -> str:
    """The counts as a Markdown table, with the former figure and the aim where there is one."""
    rows = ["| measured | count | before | aim | |", "|---|---|---|---|---|"]
    for name, value in found.items():
        number = value
        if isinstance(value, dict):
            number = value["lines"]
            code, refusals = value["lines of code"], value["lines of refusals"]
            text = f"{value['functions']} functions, {value['files']} files, {number:,} lines: {code:,} of code that "
            text += f"refuses nothing, {refusals:,} of refusals, the rest docstrings, comments and blank lines"
        elif isinstance(value, tuple):
            number, text = value[0], " in ".join(map(str, value))
        elif isinstance(value, list):
            text = ", ".join(" ".join(map(str, each)) if isinstance(each, tuple) else each for each in value) or "none"
        else:
            text = f"{value:,}"
        before, aim = AIMS.get(name, (None, None))
        aims = "| |" if aim is None else f"{before:,} | ≤ {aim:,} | {'met' if number <= aim else 'missed'}"
        rows.append(f"| {name} | {text} | {aims} |")
    return "\n".join(rows)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md as well")
    args = parser.parse_args()
    found = {**static(), **executed(), MYPY: mypy_errors()}
    print(table(found))
    if args.out is not None:
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(table(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
