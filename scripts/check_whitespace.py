"""Finds trailing whitespace, and files that do not end with exactly one newline.

python -m scripts.check_whitespace README.md docs/index.md
"""

import pathlib
import sys
from collections.abc import Sequence


def main(paths: Sequence[str] | None = None) -> int:
    """Prints every problem; returns 1 if there is one."""
    found = [p for path in (sys.argv[1:] if paths is None else paths) for p in problems(pathlib.Path(path))]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


def problems(path: pathlib.Path) -> list[str]:
    """A message for each line with trailing whitespace, and one for a wrong end of the file."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = [f"{path}:{i}: trailing whitespace" for i, line in enumerate(lines, 1) if line != line.rstrip()]
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        found.append(f"{path}:{len(lines)}: the file must end with one newline")
    return found


if __name__ == "__main__":
    sys.exit(main())
