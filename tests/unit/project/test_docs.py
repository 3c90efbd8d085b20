"""Files, sections, links, commands with options and make targets that docs and comments name exist."""

from __future__ import annotations

import ast
import posixpath
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
import typer

from crosslift import app

ROOT = Path(__file__).parents[3]
DOCS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
# Names and files of other projects that docs and comments name.
NAMES_ELSEWHERE = {"SBATCH_ACCOUNT"}
ELSEWHERE = {"evaluate.py", "utils_preprocess.py", "datasets/xtreme/xtreme.py", "utils.py"}

CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SECTION = re.compile(r"`?((?:docs/)?\w+\.md)`?,\s+(?:#\s+)?section\s+(\d+(?:\.\d+)*)")
PLACEHOLDER = re.compile(r"[*{}<>$]|\.\.\.|[A-Z]{3}")


def tracked() -> list[str]:
    """Files under version control and new files that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


FILES = tracked()
FOLDERS = {str(parent) for name in FILES for parent in PurePosixPath(name).parents}
TOP_FOLDERS = {folder for folder in FOLDERS if "/" not in folder}
BASENAMES = {PurePosixPath(name).name for name in FILES}
SOURCES = [name for name in FILES if name.endswith((".py", ".yaml", ".toml")) or name == "Makefile"]


def exists(name: str, beside: str) -> bool:
    """Whether a file or folder has this path from the root or from `beside`, or, without a folder, this name."""
    name = name.rstrip("/")
    paths = {name, posixpath.normpath(f"{beside}/{name}")}
    inside = any(path.endswith("/" + name) for path in FILES) if "/" in name else name in BASENAMES
    return inside or bool(paths & {*FILES, *FOLDERS})


def headings(file: str) -> set[str]:
    """Numbers of a document's sections: `## 3. Order` and `### 3.1 Rows` give 3 and 3.1."""
    return set(re.findall(r"^#+ (\d+(?:\.\d+)*)\.? ", (ROOT / file).read_text(), re.MULTILINE))


def commands() -> dict[str, set[str]]:
    """Each command of the command line, such as `data plan`, with its options."""

    def below(group: object, prefix: str) -> Iterator[tuple[str, set[str]]]:
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            if hasattr(command, "commands"):
                yield from below(command, f"{prefix}{name} ")
            else:
                yield (
                    prefix + name,
                    {option for each in command.params for option in (*each.opts, *each.secondary_opts)},
                )

    return dict(below(typer.main.get_command(app), ""))


COMMANDS = commands()
GROUPS = {name.split()[0] for name in COMMANDS if " " in name}


def command_faults(line: str) -> list[str]:
    """Commands and options in a `crosslift ...` line that do not exist; `a|b` are alternatives."""
    words = [word for word in re.split(r"\s+|(?<=\w)(?=\])", line.replace("[", " ").replace("]", " ")) if word][1:]
    if not words or words[0].startswith("-") or PLACEHOLDER.search(words[0]):
        return []
    names = [[name] for name in words[0].split("|")]
    if words[0] in GROUPS and len(words) > 1:
        names = [[words[0], name] for name in words[1].split("|")]
    found = [" ".join(name) for name in names if " ".join(name) in COMMANDS]
    unknown = [" ".join(name) for name in names if " ".join(name) not in COMMANDS and " ".join(name) not in GROUPS]
    options = {word.split("=")[0].rstrip(",;:.)") for word in words if word.startswith("--")}
    known = {"--help"}.union(*(COMMANDS[name] for name in found))
    return [f"command {name}" for name in unknown] + [f"option {each}" for each in options - known if not unknown]


class Code:
    """What the source defines: functions by name, classes with their members and fields, base classes included."""

    def __init__(self) -> None:
        files = [name for name in SOURCES if name.endswith(".py") and not name.startswith(("tests/", "benchmarks/"))]
        nodes = [node for name in files for node in ast.walk(ast.parse((ROOT / name).read_text()))]
        self.functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        self.classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}

    def lineage(self, name: str) -> list[ast.ClassDef]:
        """A class after its base classes, as far as the source defines them."""
        if name not in self.classes:
            return []
        bases = [ast.unparse(base).split("[")[0] for base in self.classes[name].bases]
        return [*(each for base in bases for each in self.lineage(base)), self.classes[name]]

    def members(self, name: str) -> set[str]:
        """Methods, fields and attributes of a class."""
        found = set()
        for node in (node for each in self.lineage(name) for node in ast.walk(each)):
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                found |= {ast.unparse(each).removeprefix("self.") for each in targets}
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
        return found

    def signatures(self, owner: str, name: str) -> list[tuple[list[str], int]]:
        """The parameters, and how many of them are required, of each function or class that a call may mean."""
        within = [node for each in self.lineage(owner) for node in each.body] or self.functions
        if name in self.classes:
            within = [node for each in self.lineage(name) for node in each.body]
            fields = [
                node for node in within if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node)
            ]
            if not any(isinstance(node, ast.FunctionDef) and node.name == "__init__" for node in within):
                names = [ast.unparse(node.target) for node in fields]
                return [(names, sum(node.value is None for node in fields))]
            name = "__init__"
        found = []
        for node in within:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                names = [each.arg for each in node.args.args if each.arg not in ("self", "cls")]
                required = len(names) - len(node.args.defaults)
                found.append(([*names, *(each.arg for each in node.args.kwonlyargs)], required))
        return found


CODE = Code()


def code_faults(code: str) -> list[str]:
    """What `Class.member` or a call with arguments names and does not exist; a call may end with `...` for the rest.

    An argument that is a name is the parameter's; any value may stand for another. `f()` is just the name.
    """
    path, bracket, _ = code.partition("(")
    if not re.fullmatch(r"\w+(\.\w+)?", path):
        return []
    owner, _, name = path.rpartition(".")
    if owner in CODE.classes and name not in CODE.members(owner):
        return [code]
    try:
        call = ast.parse(code, mode="eval").body
    except SyntaxError:
        return []
    if not bracket or not isinstance(call, ast.Call) or not (call.args or call.keywords):
        return []
    given = [ast.unparse(each) for each in call.args]
    open_end = given[-1:] == ["..."]
    names = [each.arg for each in call.keywords]
    signatures = CODE.signatures(owner, name)

    def fits(parameters: list[str], required: int) -> bool:
        positional = given[: len(given) - open_end]
        matching = all(
            each == parameter or not each.isidentifier()
            for each, parameter in zip(positional, parameters, strict=False)
        )
        enough = open_end or len(positional) + len(names) >= required
        return matching and enough and len(positional) <= len(parameters) and set(names) <= set(parameters)

    return [code] if signatures and not any(fits(*each) for each in signatures) else []


def doc_commands(text: str) -> Iterator[str]:
    """Command lines of a document: in code blocks, with continued lines joined, and in inline code."""
    for block in CODE_BLOCK.findall(text):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            yield re.sub(r"(?:^|\s)#\s.*|\s{3,}\S.*", "", line).strip()
    yield from INLINE_CODE.findall(CODE_BLOCK.sub("", text))


def test_the_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_files_that_a_document_names_exist(doc: Path) -> None:
    text = doc.read_text()
    beside = str(doc.parent.relative_to(ROOT))
    missing = [link for link in LINK.findall(text) if "://" not in link and not exists(link.split("#")[0], beside)]
    for code in INLINE_CODE.findall(CODE_BLOCK.sub("", text)):
        name = code.split("::")[0]
        is_source = re.fullmatch(r"[\w./-]+\.(py|md)", name) is not None
        is_path = re.fullmatch(r"[\w.-]+(/[\w.-]*)+", name) is not None and name.split("/")[0] in TOP_FOLDERS
        if (is_source or is_path) and name not in ELSEWHERE and not exists(name, beside):
            missing.append(name)
    assert not missing


def test_every_guarantee_names_code_and_a_test_that_exist() -> None:
    rows = [
        line.split(" | ") for line in (ROOT / "docs/guarantees.md").read_text().splitlines() if line.count(" | ") == 2
    ]
    rows = [row for row in rows if row[0] != "| promise"]
    missing = []
    for promise, *columns in rows:
        for column in columns:
            names = INLINE_CODE.findall(column)
            assert names, promise
            folder = ""
            for name in names:
                path = PurePosixPath(name) if "/" in name else PurePosixPath(folder) / name
                folder = str(path.parent)
                missing += [f"{promise}: {path}"] * (not {str(path)} & {*FILES, *FOLDERS})
        assert re.search("`(tests|benchmarks)/", columns[-1]), promise
    assert len(rows) > 25
    assert not missing


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_test_functions_that_a_document_names_exist(doc: Path) -> None:
    named = {code for code in INLINE_CODE.findall(doc.read_text()) if re.fullmatch(r"test_\w+", code)}
    tests = "".join((ROOT / name).read_text() for name in FILES if name.startswith("tests/") and name.endswith(".py"))
    assert not {name for name in named if f"def {name}(" not in tests}


@pytest.mark.parametrize("doc", [doc for doc in DOCS if doc.name != "methods.md"], ids=lambda doc: doc.name)
def test_names_of_code_that_a_document_uses_exist(doc: Path) -> None:
    """Functions, classes, attributes and keys of run files. docs/methods.md has the symbols of formulas instead."""
    words = set(re.findall(r"\w+", "".join((ROOT / name).read_text() for name in SOURCES))) | NAMES_ELSEWHERE
    shown = [code.split("(")[0] for code in INLINE_CODE.findall(CODE_BLOCK.sub("", doc.read_text()))]
    names = {code for code in shown if re.fullmatch(r"[A-Za-z_][\w.]*", code) and "TASK" not in code}
    names = {name for name in names if not name.endswith((".py", ".md", ".txt"))}
    assert not {name for name in names if not set(re.findall(r"\w+", name)) <= words}


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_members_and_arguments_that_a_document_names_exist(doc: Path) -> None:
    text = CODE_BLOCK.sub("", doc.read_text())
    assert not [fault for code in re.findall(r"`([^`]+)`", text) for fault in code_faults(" ".join(code.split()))]


def test_files_that_comments_name_exist() -> None:
    missing = []
    for source in SOURCES:
        for number, line in enumerate((ROOT / source).read_text().splitlines(), 1):
            named = [name for code in INLINE_CODE.findall(line) if re.fullmatch(r"[\w./-]+\.(py|md)", name := code)]
            named += re.findall(r"(?<![\w/])docs/\w+\.md", line)
            beside = str(PurePosixPath(source).parent)
            missing += [f"{source}:{number}: {n}" for n in named if n not in ELSEWHERE and not exists(n, beside)]
    assert not missing


def test_sections_that_are_cited_exist() -> None:
    missing, cited = [], 0
    for name in [*SOURCES, *(str(doc.relative_to(ROOT)) for doc in DOCS)]:
        for document, section in SECTION.findall((ROOT / name).read_text()):
            cited += 1
            file = document if document.startswith("docs/") else f"docs/{document}"
            if not (ROOT / file).is_file() or section not in headings(file):
                missing.append(f"{name}: {document}, section {section}")
    assert not missing
    assert cited > 10


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_commands_that_a_document_shows_exist(doc: Path) -> None:
    faults = []
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in doc_commands(doc.read_text()):
        if re.match(r"crosslift\s", line):
            faults += [f"{line}: {fault}" for fault in command_faults(line)]
        elif target := re.fullmatch(r"make (\w+)", line):
            faults += [line] * (target[1] not in targets)
        elif (module := re.search(r"\bpython -m ((?:training|benchmarks)[\w.]*)", line)) is not None:
            path = module[1].replace(".", "/")
            faults += [line] * (not {f"{path}.py", f"{path}/__main__.py"} & set(FILES))
    assert not faults


def test_commands_that_comments_and_messages_show_exist() -> None:
    faults = []
    for source in (name for name in SOURCES if not name.startswith("tests/")):
        text = (ROOT / source).read_text()
        shown = [code for code in INLINE_CODE.findall(text) if re.match(r"crosslift [a-z]", code)]
        shown += re.findall(r"(?:Example: |^#\s+)(crosslift [a-z][^\"\n]*)", text, re.MULTILINE)
        faults += [f"{source}: {line}: {fault}" for line in shown for fault in command_faults(line)]
    assert not faults


def test_unknown_commands_options_and_files_are_found() -> None:
    assert command_faults("crosslift compare A B") == ["command compare"]
    assert command_faults("crosslift data prepare CONFIG") == ["command data prepare"]
    assert command_faults("crosslift train CONFIG --gpus 8") == ["option --gpus"]
    assert command_faults("crosslift status|logs RUN") == []
    assert command_faults(shlex.join(["crosslift", "data", "plan", "CONFIG", "--steps", "0:1"])) == []
    assert code_faults("Planner.steps") == ["Planner.steps"]
    assert code_faults("Trainer.save(2)") == ["Trainer.save(2)"]
    assert code_faults("LossTerm(sum, per, weight)") == ["LossTerm(sum, per, weight)"]
    assert code_faults('Partner("itself", row=1, step=0)') == ['Partner("itself", row=1, step=0)']
    assert code_faults("scaling.learning_rate(step, ...)") == []
    assert code_faults("tokenizer.apply_chat_template(messages)") == []
    assert not exists("training/utils.py", "docs")
    assert "1.1" in headings("docs/methods.md")
