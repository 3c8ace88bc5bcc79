"""The house rules as tests: each rule reads one parsed file, and each is shown to fail on a planted bad one."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fla_dispatch/"

#: Files that may have up to 600 lines, each with its reason.
LONG_FILES: dict[str, str] = {}

#: Public functions that may take **kwargs, each with its reason.
KWARGS_ALLOWED = {
    "fla_dispatch/dispatch/handle.py:OpHandle.__call__": "passes a call through to the contract, which names every parameter",
    "fla_dispatch/dispatch/handle.py:OpHandle.explain": "the same call, explained",
    "fla_dispatch/dispatch/handle.py:OpHandle.bind": "the same call, bound",
    "fla_dispatch/dispatch/bound.py:BoundHandle.__call__": "the bound call's tensors, by the contract's names",
    "fla_dispatch/dispatch/handle.py:use": "names of ops are the keywords",
    "fla_dispatch/dispatch/explanation.py:explain": "names of sizes are the keywords; each op lists its own",
    "fla_dispatch/kernels/_shared/token_cases.py:row": "names of a case's fields are the keywords; the dataclass checks them",
    "fla_dispatch/settings.py:override": "names of settings are the keywords; dataclasses.replace checks them",
}

#: Files that may hold an autograd.Function, each with its reason.
AUTOGRAD = {
    "fla_dispatch/dispatch/function.py": "the one of all recurrences",
    "fla_dispatch/kernels/_shared/pair.py": "the one of maps around them that have kernels (decision 0010)",
}

#: Parameters of kernels that hold numbers, beside sizes (capitals), strides (s_), indices (i_) and constexprs.
NUMBERS = {"scale", "eps", "low", "high", "length", "total", "rows", "per_row"}

#: Arguments that change from call to call without any change of the compiled code being worth having (promise 4).
UNSPECIALIZED = {"T", "N", "scale", "total"}


@dataclasses.dataclass(frozen=True)
class File:
    """A source file: its path from the repository root, its text and its syntax tree."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def in_package(self) -> bool:
        return self.path.startswith(PACKAGE)


def dotted(node: ast.AST) -> str:
    """`torch.autograd.Function` of a Name or Attribute (calls are looked through), else ''."""
    if isinstance(node, ast.Call):
        return dotted(node.func)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def jit_functions(file: File) -> Iterator[ast.FunctionDef]:
    """Functions under @triton.jit or @gluon.jit."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef) and any(dotted(d).split(".")[-1] == "jit" for d in node.decorator_list):
            yield node


def kernels(file: File) -> Iterator[ast.FunctionDef]:
    """Jitted functions that are launched: those that ask for their program id."""
    for function in jit_functions(file):
        if any(dotted(node).endswith("program_id") for node in ast.walk(function)):
            yield function


def imports(file: File) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import statement, wherever it stands."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or ""


# ---- rules: a file -> what is wrong with it ----


def short_files(file: File) -> Iterator[str]:
    limit = 600 if file.path in LONG_FILES else 400
    if len(file.lines) > limit:
        yield f"{len(file.lines)} lines, at most {limit}: split it by meaning"


def short_kernels(file: File) -> Iterator[str]:
    for function in jit_functions(file):
        size = function.body[-1].end_lineno - function.body[0].lineno + 1
        if size > 150:
            yield f"{function.name}: a body of {size} lines, at most 150"


def environment_in_settings(file: File) -> Iterator[str]:
    if not file.in_package or file.path == PACKAGE + "settings.py":
        return
    for node in ast.walk(file.tree):
        if dotted(node) in ("os.environ", "os.getenv", "os.putenv", "os.environb"):
            yield f"line {node.lineno}: reads the environment; settings.py alone does"
        if isinstance(node, ast.ImportFrom) and node.module == "os" and {a.name for a in node.names} & {"environ", "getenv"}:
            yield f"line {node.lineno}: reads the environment; settings.py alone does"


def triton_in_kernels(file: File) -> Iterator[str]:
    if not file.in_package or file.path.startswith((PACKAGE + "kernels/", PACKAGE + "tuning/")):
        return
    for line, module in imports(file):
        if module.split(".")[0] == "triton":
            yield f"line {line}: imports triton; kernels/ and tuning/ alone do"


def autograd_in_one_place(file: File) -> Iterator[str]:
    if not file.in_package or file.path in AUTOGRAD:
        return
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ClassDef) and any(re.fullmatch(r"(.*autograd\.)?Function", dotted(base)) for base in node.bases):
            yield f"line {node.lineno}: class {node.name} is an autograd.Function; {' and '.join(AUTOGRAD)} hold those there are"


def no_kwargs(file: File) -> Iterator[str]:
    if not file.in_package:
        return

    def visit(body: list[ast.stmt], owner: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body, f"{owner}{node.name}.")
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.args.kwarg:
                hidden = node.name.startswith("_") and not node.name.startswith("__")
                if not hidden and f"{file.path}:{owner}{node.name}" not in KWARGS_ALLOWED:
                    yield f"line {node.lineno}: {owner}{node.name} takes **{node.args.kwarg.arg}; name every parameter"

    yield from visit(file.tree.body, "")


def shape_comments(file: File) -> Iterator[str]:
    for function in kernels(file):
        for arg in function.args.args:
            number = arg.arg in NUMBERS or arg.arg[0].isupper() or arg.arg.startswith(("s_", "i_"))
            if arg.annotation is None and not number and not re.search(r"#.*\[.*\]", file.lines[arg.lineno - 1]):
                yield f"line {arg.lineno}: {function.name}: tensor argument {arg.arg} has no `# [shape]` comment"


def kernel_docstrings(file: File) -> Iterator[str]:
    if not file.in_package or not any(kernels(file)):
        return
    text = ast.get_docstring(file.tree) or ""
    if not re.search(r"\(\d+\)", text):
        yield "the docstring of a kernel's file names its equations, as in (4)"
    if "grid" not in text.lower():
        yield "the docstring of a kernel's file states its grid"


def no_recompiles(file: File) -> Iterator[str]:
    for function in kernels(file):
        listed: set[str] = set()
        for decorator in function.decorator_list:
            for keyword in getattr(decorator, "keywords", []):
                if keyword.arg == "do_not_specialize":
                    listed = {ast.literal_eval(item) for item in keyword.value.elts}
        present = {a.arg for a in function.args.args if a.annotation is None} & UNSPECIALIZED
        if present - listed:
            yield f"{function.name}: do_not_specialize lacks {sorted(present - listed)}: each new value would compile again"


def no_swallowing(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        names = [dotted(t) for t in node.type.elts] if isinstance(node.type, ast.Tuple) else [dotted(node.type)] if node.type else [""]
        if not {"", "Exception", "BaseException"} & set(names):
            continue
        if "#" not in file.lines[node.lineno - 1]:
            yield f"line {node.lineno}: a handler this wide states its reason in a comment on its line"
        if all(
            isinstance(s, (ast.Pass, ast.Continue)) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in node.body
        ):
            yield f"line {node.lineno}: swallows every error"


def no_autotune(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if dotted(node) in ("triton.autotune", "triton.heuristics", "triton.Config") and not isinstance(node, ast.Call):
            yield f"line {node.lineno}: {dotted(node)}; configs are chosen above the kernel"
        named = {a.name for a in node.names} if isinstance(node, ast.ImportFrom) and node.module in ("triton", "triton.runtime") else set()
        if named & {"autotune", "heuristics", "Autotuner"}:
            yield f"line {node.lineno}: imports Triton's autotuner; configs are chosen above the kernel"


Rule = Callable[[File], Iterator[str]]

HEAD = '"""Equation (1). Grid: (N,)."""\n'
#: rule -> (path, a source that breaks it)
PLANTED: dict[Rule, tuple[str, str]] = {
    short_files: ("fla_dispatch/a.py", "x = 1\n" * 401),
    short_kernels: ("fla_dispatch/kernels/r/a.py", HEAD + "@triton.jit\ndef f():\n" + "    x = 1\n" * 151),
    environment_in_settings: ("fla_dispatch/a.py", "import os\nx = os.environ.get('A')\n"),
    triton_in_kernels: ("fla_dispatch/dispatch/a.py", "def f():\n    import triton.language as tl\n"),
    autograd_in_one_place: ("fla_dispatch/kernels/r/a.py", "class F(torch.autograd.Function): ...\n"),
    no_kwargs: ("fla_dispatch/a.py", "class A:\n    def f(self, **options): ...\n"),
    shape_comments: ("fla_dispatch/kernels/r/a.py", HEAD + "@triton.jit\ndef f(\n    q,\n    T,\n):\n    i = tl.program_id(0)\n"),
    kernel_docstrings: ("fla_dispatch/kernels/r/a.py", '"""A kernel."""\n@triton.jit\ndef f():\n    i = tl.program_id(0)\n'),
    no_recompiles: ("fla_dispatch/kernels/r/a.py", '@triton.jit(do_not_specialize=["N"])\ndef f(T, N):\n    i = tl.program_id(0)\n'),
    no_swallowing: ("fla_dispatch/a.py", "try:\n    f()\nexcept Exception:  # a reason\n    pass\n"),
    no_autotune: ("fla_dispatch/kernels/r/a.py", "@triton.autotune(configs=[], key=[])\ndef f(): ...\n"),
}

#: A file that keeps every rule, so that a rule which always fails is found too.
GOOD = '''"""Equations (1) and (2). Grid: (N * HV,)."""
import os

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "scale"])
def kernel(
    q,  # [B, T, H, K]
    T,
    scale,
    s_q,
    BT: tl.constexpr,
):
    i_t = tl.program_id(0)


def launch(*, size: int) -> None:
    try:
        os.stat("x")
    except Exception as error:  # whatever a file system may raise is shown with the path
        raise ValueError("x") from error
'''


def source_files() -> list[File]:
    found = [p for top in ("fla_dispatch", "tests", "benchmarks") for p in sorted((ROOT / top).rglob("*.py"))]
    return [File(p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8")) for p in found]


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    # this file holds bad sources as strings, which no rule reads as code
    found = [f"{file.path}: {text}" for file in source_files() for text in rule(file)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_rule_can_fail(rule: Rule) -> None:
    path, bad = PLANTED[rule]
    assert list(rule(File(path, bad)))
    assert not list(rule(File("fla_dispatch/kernels/r/good.py", GOOD)))


def test_every_rule_is_listed() -> None:
    """A rule that is written but not in the table would never run."""
    returns = {n for n, f in globals().items() if callable(f) and getattr(f, "__annotations__", {}).get("return") == "Iterator[str]"}
    assert returns == {rule.__name__ for rule in PLANTED}


def test_listed_exceptions_exist() -> None:
    """An exception whose function or file is gone is taken off the list."""
    assert all((ROOT / path).exists() for path in LONG_FILES)
    for place in KWARGS_ALLOWED:
        path, name = place.split(":")
        function = name.split(".")[-1]
        assert re.search(rf"def {function}\(", (ROOT / path).read_text()), place


def test_one_autograd_function() -> None:
    text = (ROOT / "fla_dispatch/dispatch/function.py").read_text()
    assert len(re.findall(r"^class \w+\((?:torch\.)?(?:autograd\.)?Function\)", text, re.M)) == 1


def room_faults(names: dict[str, set[str]], registered: tuple[str, ...]) -> list[str]:
    """names: room -> its files."""
    wanted = {"ops.py", "reference.py", "cases.py", "variants.py"}
    faults = [f"{room} lacks {sorted(wanted - files)}" for room, files in names.items() if wanted - files]
    if sorted(names) != sorted(registered):
        faults.append(f"rooms on disk {sorted(names)}, registered {sorted(registered)}")
    return faults


def test_rooms_are_complete() -> None:
    from fla_dispatch.registry import ROOMS

    rooms = [p for p in (ROOT / "fla_dispatch/kernels").iterdir() if p.is_dir() and p.name[0] not in "_."]
    assert not room_faults({room.name: {f.name for f in room.iterdir()} for room in rooms}, ROOMS)
    assert room_faults({"a": {"ops.py"}}, ("a",)) and room_faults({}, ("a",))


def test_import_contracts(tmp_path: Path) -> None:
    """The layers of pyproject.toml, by import-linter; and the contracts do fail on an import that goes up."""
    pytest.importorskip("importlinter")

    def lint(root: Path) -> subprocess.CompletedProcess[str]:
        code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
        return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)

    clean = lint(ROOT)
    assert clean.returncode == 0, clean.stdout + clean.stderr

    import shutil

    shutil.copytree(ROOT / "fla_dispatch", tmp_path / "fla_dispatch", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "fla_dispatch/errors.py").open("a") as file:
        file.write("\nfrom . import registry\n")
    broken = lint(tmp_path)
    assert broken.returncode == 1 and "errors" in broken.stdout, broken.stdout + broken.stderr
