"""The package as a whole: documentation, exports, versions, imports and the environment report."""

from __future__ import annotations

import doctest
import importlib
import importlib.resources
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch

import fastnn
from fastnn import env
from repository import REPOSITORY

pytestmark = pytest.mark.cpu_only("the package as it is installed")


def module_names() -> list[str]:
    """fastnn and all of its Python modules that can be imported here."""
    # The extension isn't Python source: it has no docstring examples and no ``__all__``.
    found = {module.name for module in pkgutil.walk_packages(fastnn.__path__, "fastnn.")}
    return ["fastnn", *sorted(found - {"fastnn._C"})]


def public_modules() -> list[ModuleType]:
    """The modules with an ``__all__``, which defines what is public."""
    return [importlib.import_module(name) for name in module_names() if "._" not in name]


def public_objects() -> dict[str, object]:
    """Each public function and class by its full name."""
    return {
        f"{module.__name__}.{name}": thing
        for module in public_modules()
        for name, thing in vars(module).items()
        if name in module.__all__ and (inspect.isclass(thing) or inspect.isroutine(thing))
    }


every_module = pytest.mark.parametrize("module_name", module_names())
every_public_object = pytest.mark.parametrize("name", public_objects())


# --- documentation --------------------------------------------------------------------------------


@every_module
def test_doctests_pass(module_name):
    result = doctest.testmod(importlib.import_module(module_name))
    assert result.failed == 0


def test_the_package_and_all_public_modules_are_walked():
    """Guards against a walk that finds nothing, which would pass."""
    expected = {"autograd", "env", "functional", "nn", "optim", "reference"}
    assert {f"fastnn.{name}" for name in expected} <= set(module_names())
    assert len(public_objects()) >= 4 + 4 + 4 + 5 + 1 + 2 + 1  # of the modules above, is_available


@every_public_object
def test_every_public_object_has_an_example(name):
    finder = doctest.DocTestFinder(exclude_empty=True, recurse=False)
    examples = [e for test in finder.find(public_objects()[name], name) for e in test.examples]
    assert len(examples) >= 2, "an import alone is no example"


@every_module
def test_every_module_has_a_docstring(module_name):
    assert importlib.import_module(module_name).__doc__.strip()


def own_docstring(thing: object) -> str:
    """A class's own docstring: ``inspect.getdoc`` would also find its parent's."""
    return (
        inspect.cleandoc(vars(thing).get("__doc__") or "")
        if inspect.isclass(thing)
        else (inspect.getdoc(thing) or "")
    )


def documented_arguments(docstring: str) -> set[str]:
    """The names before the colons in the "Args" section; "``a, b: ...``" names two."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n|\n)+)", docstring + "\n", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w[\w, ]*):", section[1], re.MULTILINE) if section else []
    return {name.strip() for entry in entries for name in entry.split(",")}


def referenced(docstring: str) -> Iterator[object]:
    """The functions of fastnn that the docstring refers the reader to."""
    for module, name in re.findall(r"see\s+:func:`(fastnn\.\w+)\.(\w+)`", docstring):
        yield getattr(importlib.import_module(module), name)


def arguments_of(thing: object) -> set[str]:
    parameters = inspect.signature(thing).parameters
    return {name for name in parameters if not name.startswith("_")}


@every_public_object
def test_every_argument_is_documented_here_or_where_the_docstring_points(name):
    thing = public_objects()[name]
    docstring = own_docstring(thing)
    assert docstring
    documented = documented_arguments(docstring)
    for target in referenced(docstring):
        documented |= documented_arguments(own_docstring(target))
    subject = thing.apply if hasattr(thing, "apply") and not is_module(thing) else thing
    assert arguments_of(subject) <= documented


def is_module(thing: object) -> bool:
    return inspect.isclass(thing) and issubclass(thing, torch.nn.Module)


@pytest.mark.parametrize(
    "name", [n for n in public_objects() if n.split(".")[1] in ("nn", "functional")]
)
def test_operators_and_layers_document_their_shapes(name):
    docstring = own_docstring(public_objects()[name])
    assert re.search(r"Shape:|``\(\*?,? ?\w+.*\)``|any shape", docstring)


# --- exports and files ----------------------------------------------------------------------------


@pytest.mark.parametrize("module", public_modules(), ids=lambda module: module.__name__)
def test_exported_names_exist_and_are_sorted_and_complete(module):
    # In the linter's order: constants first, and MLP is spelt like one.
    names = sorted(set(module.__all__), key=lambda name: (not name.isupper(), name))
    assert list(module.__all__) == names
    defined_here = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    assert defined_here <= set(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name)


def test_type_marker_is_shipped():
    assert importlib.resources.files("fastnn").joinpath("py.typed").is_file()
    package_data = re.search(r"^fastnn = \[(.*)\]", read("pyproject.toml"), re.MULTILINE)
    assert '"py.typed"' in package_data[1]


SDIST = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"


def test_the_source_distribution_holds_what_a_build_reads_and_nothing_that_one_leaves(tmp_path):
    """`make dist` also builds a wheel from it, which takes minutes."""
    copy = tmp_path / "copy"
    caches = shutil.ignore_patterns("__pycache__")
    for part in ("build_support", "csrc", "fastnn", "tests", "tools"):
        shutil.copytree(REPOSITORY / part, copy / part, ignore=caches)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    (copy / "fastnn" / "_build_info.json").write_text("{}")
    (copy / "fastnn" / "_C.so").touch()

    # In pip's builds the folder isn't on the path either.
    name = run_python("-I", "-c", SDIST, cwd=copy).splitlines()[-1]
    assert name == f"fastnn-{fastnn.__version__}.tar.gz"  # for any torch
    with tarfile.open(copy / "dist" / name) as archive:
        files = {Path(*Path(member.name).parts[1:]) for member in archive if member.isfile()}
    sources = {path.relative_to(copy) for path in (copy / "csrc").rglob("*") if path.is_file()}
    folders = ("build_support", "fastnn")
    modules = {path.relative_to(copy) for name in folders for path in (copy / name).rglob("*.py")}
    needed = {Path(name) for name in ("setup.py", "pyproject.toml", "fastnn/py.typed", "LICENSE")}
    about = {Path(name) for name in ("README.md", "MANIFEST.in", "PKG-INFO", "setup.cfg")}
    written = {path for path in files if path.parts[0] == "fastnn.egg-info"} | about
    assert len(sources) > 50
    assert files - written == sources | modules | needed


def read(name: str) -> str:
    return (REPOSITORY / name).read_text()


PAGES = ["README.md", "docs/install.md", "docs/faq.md", "docs/index.md", "CITATION.cff"]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_no_other_version(page):
    named = re.findall(r"fastnn[ =v-]+(\d+\.\d+\.\d+)|(\d+\.\d+\.\d+)\+torch", read(page))
    assert {own or other for own, other in named} <= {fastnn.__version__}


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1]
    assert first == fastnn.__version__


# --- imports --------------------------------------------------------------------------------------


def run_python(*arguments: str, cwd: Path = REPOSITORY) -> str:
    """The output of a fresh interpreter."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(fastnn.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


IMPORT_ALL = "\n".join(f"import {name}" for name in module_names())

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tqdm", "matplotlib", "PIL", "pytest", "setuptools"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""


def test_import_needs_no_optional_package():
    output = run_python("-c", f"{BLOCKER}\n{IMPORT_ALL}\nprint(fastnn.__version__)")
    assert output.strip() == fastnn.__version__


def test_blocker_blocks():
    """Guards against a blocker that blocks nothing, with which the test above would pass."""
    script = f"{BLOCKER}\ntry:\n    import tqdm\nexcept ImportError as error:\n    print(error)"
    assert run_python("-c", script).strip() == "tqdm is blocked"


def test_import_loads_nothing_but_torch_numpy_and_the_standard_library():
    script = f"""
import sys, torch, numpy
before = set(sys.modules)
{IMPORT_ALL}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
allowed = {{"fastnn", "torch", "numpy"}} | sys.stdlib_module_names
print(sorted(new - allowed), "fastnn" in new)
"""
    assert run_python("-c", script).strip() == "[] True"


def test_import_changes_no_global_state():
    """The product below is subnormal: with a library linked with -ffast-math it would be 0."""
    script = f"""
import torch
torch.set_num_threads(3)
def state():
    return [
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.random.get_rng_state().tolist(),
        1e-308 * float("0.01"),
        (torch.tensor([1e-308], dtype=torch.float64) * 0.01).item(),
    ]
before = state()
{IMPORT_ALL}
print(state() == before, before[-1] > 0)
"""
    assert run_python("-c", script).strip() == "True True"


# --- python -m fastnn.env -------------------------------------------------------------------------

FACTS = [
    "fastnn",
    "installed as",
    "torch",
    "numpy",
    "python",
    "platform",
    "system",
    "cpu",
    "memory",
    "huge pages",
    "extension",
    "built for torch",
    "compiler",
    "build flags",
    "instruction sets built",
    "instruction set in use",
    "instruction set of torch",
    "libraries of torch",
    "threads",
    "environment",
    "cuda of fastnn",
    "cuda of torch",
]


def test_env_collects_every_fact():
    facts = env.collect()
    assert list(facts) == FACTS
    assert all(isinstance(value, str) and value.strip() for value in facts.values())
    assert all("\n" not in value for value in facts.values())


def test_env_tells_the_truth():
    facts = env.collect()
    assert facts["fastnn"] == fastnn.__version__
    assert facts["torch"] == torch.__version__
    assert facts["numpy"] == numpy.__version__
    assert facts["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert facts["threads"].split()[0] == str(torch.get_num_threads())
    assert (facts["extension"] == "available") == fastnn.is_available()
    assert (facts["instruction set in use"] != "none") == fastnn.is_available()
    assert facts["cuda of torch"].startswith(torch.version.cuda or "not built")


def test_env_says_why_there_is_no_extension(monkeypatch):
    monkeypatch.setattr(fastnn._extension, "extension", None)
    monkeypatch.setattr(fastnn._extension, "unavailable_reason", "the reason")
    facts = env.collect()
    assert facts["extension"] == "not available: the reason"
    assert facts["instruction set in use"] == "none"


def test_env_shows_the_build(monkeypatch):
    info = {
        "torch": "9.9.9",
        "compiler": "g++ 99",
        "flags": "-O3 -Wall",
        "simd_targets": {"generic": "", "avx2": "-mavx2"},
        "cuda": True,
        "cuda_toolkit": "13.0",
        "cuda_architectures": "8.0;9.0+PTX",
    }
    monkeypatch.setattr(fastnn._extension, "build_info", lambda: info)
    facts = env.collect()
    assert facts["built for torch"] == "9.9.9"
    assert facts["compiler"] == "g++ 99"
    assert facts["build flags"] == "-O3 -Wall"
    assert facts["instruction sets built"] == "generic, avx2"
    assert facts["cuda of fastnn"] == "built with 13.0 for 8.0;9.0+PTX"


def test_env_shows_the_variables_that_matter(monkeypatch):
    for name in [n for n in os.environ if re.match(r"FASTNN|.*CUDA|.*TORCH|.*NUM_THREADS", n)]:
        monkeypatch.delenv(name)
    assert env.collect()["environment"] == "nothing set"
    monkeypatch.setenv("FASTNN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    variables = "CUDA_VISIBLE_DEVICES=, FASTNN_CPU_CAPABILITY=default, OMP_NUM_THREADS=3"
    assert env.collect()["environment"] == variables


def test_env_names_the_processors_that_a_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for usable, expected in ((8, "on 8 processors"), (2, "on 2 of 8 processors")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=usable: set(range(n)))
        assert env.collect()["threads"].endswith(expected)


def test_env_names_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    assert env.collect()["cuda of torch"] == "13.0, GPU 0 (9.0), GPU 1 (9.1)"


def test_env_runs_as_a_module():
    lines = run_python("-m", "fastnn.env").splitlines()
    printed = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    assert list(printed) == FACTS
    assert printed["fastnn"] == fastnn.__version__
    assert printed["extension"] == env.collect()["extension"]
