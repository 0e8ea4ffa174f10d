"""How docstrings of this project differ from what the reader of API pages expects."""

from __future__ import annotations

from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Reads the section ``Example:`` as the code that it is; the parser knows ``Examples:``."""

    def on_object(self, *, obj: griffe.Object, **unused: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
