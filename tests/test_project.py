"""The project's own rules, checked on its text: they hold without anybody remembering them."""

import ast
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "diffx").rglob("*.py"))
README = (ROOT / "README.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def tracked() -> list[Path]:
    """Every file that is or would be committed, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(files):
    return pytest.mark.parametrize("path", files, ids=name_of)


# README


def test_the_file_tree_is_the_disk():
    described, folders = set(), []
    for line in next(block for block in blocks("text") if block.startswith("README.md")).splitlines():
        depth, entry = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = [*folders[:depth], entry]
        described.add("".join(folders))
    present = set()
    for file in tracked():
        parents = [f"{parent.as_posix()}/" for parent in file.parents if parent.name]
        # Two levels everywhere; in the library one folder more, and every source file.
        present |= {folder for folder in parents if folder.count("/") <= (3 if folder.startswith("diffx/") else 2)}
        if len(file.parts) <= 2 or (file.parts[0] == "diffx" and file.suffix == ".py"):
            present.add(file.as_posix())
    assert sorted(present - described) == [], "on the disk, not in the README"
    assert sorted(described - present) == [], "in the README, not on the disk"


def test_readme_makefile_and_ci_name_the_same_commands():
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = re.findall(r"^make ([a-z-]+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert named[:2] == ["demo", "test"]
    assert set(named) | {"demo", "test", "test-slow", "lint", "bench"} == targets
    assert re.findall(r"^make .*", ci, re.MULTILINE) == ["make lint", "make test"]
    assert "pip install -c constraints.txt" in makefile
    assert ci.rstrip().endswith("make test")  # so that pytest's closing line is the last


def test_ci_is_executable():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


SNIPPETS = blocks("python") + blocks("python", (ROOT / "CONTRIBUTING.md").read_text())


@pytest.mark.parametrize("block", SNIPPETS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_snippets_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "snippet", "exec"), {"__name__": "__main__"})


def shell_lines() -> list[str]:
    from diffx.cli import app

    examples = [re.search(r"Example:\[/bold\] (.*)", command.callback.__doc__).group(1) for command in app.registered_commands]
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith("diffx ")] + examples


@pytest.mark.parametrize("line", shell_lines())
def test_commands_in_readme_and_help_have_the_flags_they_use(line):
    from typer.core import TyperGroup
    from typer.main import get_command

    from diffx.cli import app

    _, name, *words = shlex.split(line, comments=True)
    command = get_command(app).commands[name]
    if isinstance(command, TyperGroup):  # distill and train: a command per method
        command = command.get_command(None, words[0])
        assert command, f"{name} has no {words[0]}"
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


# packaging


def test_constraints_pin_what_is_installed_by_default_and_for_tests():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    project = PYPROJECT["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"], *project["optional-dependencies"]["dev"]]:
        need = Requirement(text)
        assert need.name in pins, f"constraints.txt does not pin {need.name}"
        assert need.specifier.contains(pins[need.name]), (
            f"constraints.txt pins {need.name}=={pins[need.name]}, pyproject asks {need.specifier}"
        )
    assert "torchvision" not in pins  # its build for CUDA breaks transformers beside a CPU torch


@pytest.mark.slow  # builds the distribution
def test_the_wheel_has_the_sources_and_the_models(tmp_path):
    for file in tracked():
        (tmp_path / "source" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / "source" / file)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, tmp_path / "source"]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("diffx_diffusers-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {file.as_posix() for file in tracked() if file.parts[0] == "diffx"}


def test_no_text_installs_the_foreign_package():
    # The name on PyPI belongs to another project, so the command must never be printed.
    forbidden = re.compile("pip install " + r"diffx(?!-diffusers)\b")
    for file in tracked():
        if file.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ""} and file != Path("LICENSE"):
            assert not forbidden.search((ROOT / file).read_text(errors="replace")), file


# source


@each(LIBRARY)
def test_sources_are_ascii(path):
    assert path.read_text().isascii()


@each(LIBRARY)
def test_library_neither_prints_nor_guesses(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}: the caller decides what is shown; yield or return it"
            assert node.func.id != "hasattr", f"line {node.lineno}: say which types are meant"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: name the exception"
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                assert not re.match(r"self\.config[.\[]", ast.unparse(target)), f"line {node.lineno}: a config is never changed"
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert not re.search(r"# type: ignore\s*$", line), f"line {number}: say which error and why"


@each(LIBRARY)
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the file says in one sentence what it holds"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def solvers() -> list[tuple[Path, ast.FunctionDef]]:
    """Functions that make the rows of a table."""
    files = (ROOT / "diffx" / "schedulers").glob("*.py")
    functions = [(path, node) for path in files for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [
        (path, node)
        for path, node in functions
        if node.returns and re.search(r"\bRow\b", ast.unparse(node.returns)) and node.name[0] != "_"
    ]


def test_solvers_name_their_source():
    assert solvers()
    for path, node in solvers():
        assert "Source:" in (ast.get_docstring(node) or ""), f"{name_of(path)}: {node.name}"


def imported(path: Path) -> set[str]:
    """Absolute names of what a file imports, the modules of this package written out."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])]) if node.level else node.module
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


@each([path for path in LIBRARY if name_of(path).startswith("diffx/schedulers/")])
def test_schedulers_stand_on_torch_and_diffusers_alone(path):
    for name in imported(path):
        top = name.split(".")[0]
        assert top in {"numpy", "torch", "diffusers"} or top in sys.stdlib_module_names or name.startswith("diffx.schedulers"), name


@each([path for path in LIBRARY if not name_of(path).startswith(("diffx/cli/", "diffx/__main__"))])
def test_nobody_knows_the_command_line(path):
    assert not {name for name in imported(path) if name.startswith("diffx.cli")}


# the tests themselves


def test_a_test_cannot_reach_the_network():
    with socket.socket() as outside, pytest.raises(AssertionError, match="know only this machine"):
        outside.connect(("192.0.2.1", 80))  # an address reserved for documentation
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
