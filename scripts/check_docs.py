"""Do the documents tell the truth, and plainly? Links lead somewhere; commands and their flags exist.

A command counts where it stands as one: at the start of an inline code span, or of a line in a fenced shell block.
Flags are checked in the fenced blocks, which a reader copies. README, CONTRIBUTING and docs/ are for those who learned
English later: no sentence is longer than 35 words, and no word only decorates.
"""

import os
import re
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

from potstill.cli import main

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(
    r"(?:\$ )?(?:\w+=\S+ )*(?:\.venv/bin/)?"
    r"(?:(?:python -m )?potstill (?P<sub>study [a-z]+|[a-z][\w-]*)|python3? (?P<script>[\w/]+\.py)"
    r"|make (?P<target>[\w-]+))"
)
PAGE = re.compile(r"\bdocs/[\w/-]+\.md\b")
FLAG = re.compile(r"(?<!\S)--?[a-z][\w-]*")
LONGEST = 35  # words of a sentence
BLOCK = re.compile(
    r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|\n(?=\|)|(?<!\\)\|"
)  # paragraphs, items, rows and cells of tables
SENTENCE = re.compile(r"(?<=[.!?])[*_\"')\]]*\s+(?=[\W\d]*[A-Z`])")
DECORATION = re.compile(
    r"\b(?:simply|just|easily|obviously|clearly|basically|actually|very|really|quite|seamless\w*|robust\w*|powerful\w*"
    r"|leverag\w+|utili[sz]\w+|state-of-the-art|cutting-edge|blazing\w*|etc)\b",
    re.IGNORECASE,
)


@cache
def help_text(*command: str) -> str | None:
    """All options, as `python COMMAND` prints them, None where it fails: there is no such command.

    All in this process: the imports would take longer than the rest.
    """
    module, *words = command
    path, arguments, shown = sys.path.copy(), sys.argv.copy(), StringIO()
    sys.argv = [module, *words, "--help" if "/" in module else "--help-all"]
    sys.path.insert(0, str((ROOT / module).parent))
    try:
        with redirect_stdout(shown), redirect_stderr(StringIO()):
            if module == "potstill":
                main(sys.argv[1:])
            else:
                runpy.run_path(str(ROOT / module), run_name="__main__")
    except SystemExit as stop:
        return None if stop.code else shown.getvalue()
    except FileNotFoundError:
        return None
    finally:
        sys.path[:], sys.argv[:] = path, arguments
    return shown.getvalue()


def broken_links(page: Path, prose: str) -> list[str]:
    targets = [(markdown or html).split("#")[0] for markdown, html in LINK.findall(prose)]
    relative = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    return [f"link to {target}, which does not exist" for target in relative if not (page.parent / target).exists()]


def broken_command(line: str, check_flags: bool) -> list[str]:
    found = COMMAND.match(line)
    if not found:
        return []
    if target := found["target"]:
        known = re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return [] if known else [f"make {target}: no such target"]
    command = (found["script"],) if found["script"] else ("potstill", *found["sub"].split())
    text = help_text(*command)
    if text is None:
        return [f"{found[0]}: no such command"]
    if command[0] == "potstill":  # options that go with every command stand in its own help
        text += help_text("potstill") or ""
    flags = FLAG.findall(re.sub(" #.*", "", line), found.end()) if check_flags else []
    return [f"{found[0]} has no {flag}" for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", text)]


def hard_to_read(prose: str) -> list[str]:
    """What a reader whose second language it is would stumble over. `prose` holds no fenced blocks."""
    text = re.sub(r"<!--(?s:.*?)-->|^#.*$", "", prose, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", SPAN.sub("`code`", text))
    found = []
    for block in BLOCK.split(text):
        for sentence in SENTENCE.split(" ".join(block.split())):
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            if len(words) > LONGEST:
                found.append(f"{len(words)} words in one sentence: {' '.join(words[:8])} ...")
    return found + [f"the word {word!r} only decorates" for word in DECORATION.findall(text)]


def errors(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    prose = FENCE.sub("", text)
    shell = "\n".join(body for language, body in FENCE.findall(text) if language in ("", "sh", "bash", "console"))
    lines = [line.strip() for line in shell.replace("\\\n", " ").splitlines()]
    found = broken_links(page, SPAN.sub("", prose))
    if (page.name in ("README.md", "CONTRIBUTING.md") and page.parent == ROOT) or ROOT / "docs" in page.parents:
        found += hard_to_read(prose)
    found += [error for span in SPAN.findall(prose) for error in broken_command(span, check_flags=False)]
    return found + [error for line in lines for error in broken_command(line, check_flags=True)]


def named_pages() -> list[str]:
    """Pages that code or a plan names, and that do not exist."""
    files = [path for room in ("src", "plans", "scripts", "figures", "examples") for path in (ROOT / room).rglob("*.*")]
    named = [
        (path, page) for path in files if path.suffix in (".py", ".toml") for page in PAGE.findall(path.read_text())
    ]
    return [f"{path.relative_to(ROOT)}: names {page}" for path, page in named if not (ROOT / page).exists()]


def check() -> int:
    os.environ |= {"COLUMNS": "240", "NO_COLOR": "1", "TERM": "dumb"}
    pages = [
        p for p in sorted(ROOT.rglob("*.md")) if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)
    ]
    found = [f"{page.relative_to(ROOT)}: {error}" for page in pages for error in errors(page)]
    found += named_pages()
    print("\n".join(found) if found else f"{len(pages)} pages: links and commands hold, no sentence is too long")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(check())
