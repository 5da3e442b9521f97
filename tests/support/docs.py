"""The code of a documentation page."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def code_blocks(page, language="python"):
    """The fenced blocks of `language` in a page of docs/, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


def defined_by(code, name="docs"):
    """The module that `code` makes: dataclasses look their module up."""
    import sys
    import types

    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(code, name, "exec"), module.__dict__)
    return module
