"""The laboratory uses public names of the compiler only.

A name is public if it is in the `__all__` of `starkv_compile`, of one of its packages, or of a
module directly under `starkv_compile/`. The test reads the source and imports nothing for it, so
it finds lazy imports and imports for types as well.
"""

import ast
from pathlib import Path

import pytest
import starkv_lab

import starkv_compile

CORE = "starkv_compile"
CORE_FOLDER = Path(starkv_compile.__file__).parent
LAB_FOLDER = Path(starkv_lab.__file__).parent


def public_names(module):
    """The `__all__` of a module of the compiler; none where other packages may not import it."""
    *packages, last = module.split(".")[1:] or [""]
    folder = CORE_FOLDER.joinpath(*packages)
    file = folder / last / "__init__.py"
    if not file.exists() and not packages:
        file = folder / f"{last}.py"
    if not file.exists():
        return []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def private_uses(folder):
    """File, line and code of each use of a name that is not public."""
    found = []
    for file in sorted(folder.rglob("*.py")):
        name = file.relative_to(folder).as_posix()
        found += [f"{name}:{line}: {code}" for line, code in private_uses_of(file)]
    return found


def private_uses_of(file):
    nodes = list(ast.walk(ast.parse(file.read_text())))
    core = set()  # what this file calls the compiler
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and not node.level and is_core(node.module):
            public = public_names(node.module)
            for alias in node.names:
                if alias.name not in public:
                    yield node.lineno, f"from {node.module} import {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == CORE:
                    core.add(alias.asname or CORE)
                elif is_core(alias.name):  # `from` says which names of the module are used
                    yield node.lineno, f"import {alias.name}"
    public = public_names(CORE)
    for node in nodes:
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner in core and node.attr not in public:
                yield node.lineno, f"{owner}.{node.attr}"


def is_core(module):
    return module.split(".")[0] == CORE


def test_the_laboratory_uses_public_names_only():
    assert private_uses(LAB_FOLDER) == []


PRIVATE = {
    "a module inside a package": "from starkv_compile.cache.layer import StarKVLayer",
    "a module that nobody has": "from starkv_compile.nowhere import StarKVLayer",
    "a name that a package keeps for itself": "from starkv_compile.cache import _layers",
    "a module without public names": "from starkv_compile.validation import number",
    "a package as a name": "from starkv_compile import cache",
    "all names": "from starkv_compile import *",
    "a plain import of a module": "import starkv_compile.cache",
    "an attribute": "import starkv_compile\nstarkv_compile.frontend",
    "an attribute of another name": "import starkv_compile as compiler\ncompiler.frontend",
}

PUBLIC = (
    "import starkv_compile\nstarkv_compile.compile",
    "from starkv_compile import StarKVConfig, compile, policies",
    "from starkv_compile.kernels.reference import best_first",
    "from starkv_compile.optional import needs",
    "from .starkv_compile import cache",
    "import torch.nn\nfrom torch import nn",
)

PLACES = {
    "at the top": "{}",
    "in a function": "def late():\n{}",
    "for types": "if TYPE_CHECKING:\n{}",
}


def made_up_file(folder, place, code):
    """A file with `code` in that place."""
    indent = "" if place == "at the top" else "    "
    code = "\n".join(indent + line for line in code.splitlines())
    (folder / "made_up.py").write_text(PLACES[place].format(code) + "\n")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("code", PRIVATE.values(), ids=PRIVATE)
def test_a_private_name_is_found(tmp_path, place, code):
    made_up_file(tmp_path, place, code)
    (found,) = private_uses(tmp_path)
    file, line, use = found.split(":", 2)
    lines = (tmp_path / "made_up.py").read_text().splitlines()
    assert file == "made_up.py"
    assert use.strip() == lines[int(line) - 1].strip() == code.splitlines()[-1]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("code", PUBLIC)
def test_public_names_are_allowed(tmp_path, place, code):
    made_up_file(tmp_path, place, code)
    assert private_uses(tmp_path) == []


def test_each_name_of_an_import_is_looked_up(tmp_path):
    made_up_file(tmp_path, "at the top", "from starkv_compile import compile, cache, session")
    assert private_uses(tmp_path) == [
        "made_up.py:1: from starkv_compile import cache",
        "made_up.py:1: from starkv_compile import session",
    ]
