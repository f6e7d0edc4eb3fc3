"""The READMEs tell the truth as far as a script can see.

Without arguments: both have the same structure, name the same configuration keys as config.yaml.example, have the two
commands of the quick start, and link to nothing that is missing. With `--configurations BINARY`: config.yaml.example,
the READMEs' first configuration and the one in contrib/kubernetes.yaml pass `--check`.
"""

import os
import re
import subprocess
import sys
import tempfile

READMES = ["README.md", "README.zh-CN.md"]
QUICK_START = ["cargo run --release -- demo", "cargo test"]
VARIABLES = {"CLAUDE_LB_KEY": "key", "DATABRICKS_TOKEN_1": "one", "DATABRICKS_TOKEN_2": "two"}

problems = []


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def outside_code(text):
    """The lines that are not in a code block."""
    is_code = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code:
            yield line


def code_blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def headings(text):
    """The level of each heading."""
    return [len(match[1]) for line in outside_code(text) if (match := re.match(r"(#+) ", line))]


def table_shapes(text):
    """Rows and columns of each table; a `|` in code is written as `\\|`."""
    shapes, rows = [], []
    for line in [*outside_code(text), ""]:
        if line.startswith("|"):
            rows.append(len(re.split(r"(?<!\\)\|", line)))
        elif rows:
            shapes.append((len(rows), sorted(set(rows))))
            rows = []
    return shapes


def keys_of_readme(text):
    """The keys of the configuration table: the first cell of its rows."""
    found = (re.match(r"\| `([a-z_]+(?:\[\])?(?:\.[a-z_]+(?:\[\])?)+)` \|", line) for line in text.splitlines())
    return [match[1] for match in found if match]


def keys_of_example(text):
    """All keys that have a value of their own. A commented key follows its `#` directly, or indented as a part of a
    commented list; a sentence follows it after one blank."""
    keys, parents = [], []  # parents: (column, name)
    for line in text.splitlines():
        match = re.match(r"( *)(#(?! \S))?( *)(- )?([a-z_]+):(?: +(\S.*))?$", line)
        if not match:
            continue
        lead, _, inner, dash, name, value = match.groups()
        column = len(lead) + len(inner) + (2 if dash else 0)
        while parents and parents[-1][0] >= column:
            parents.pop()
        path = ".".join([part for _, part in parents] + [name])
        # `models.map` and `headers` hold names of the operator's own, so they count as a value.
        if value is None and name not in ("map", "headers"):
            parents.append((column, name + "[]" if name in ("endpoints", "api_keys") else name))
        elif path not in keys:
            keys.append(path)
    return keys


def check_documents():
    texts = {path: read(path) for path in READMES}
    first, second = texts.values()
    if headings(first) != headings(second):
        problems.append(f"headings differ: {len(headings(first))} and {len(headings(second))}, or their levels")
    if table_shapes(first) != table_shapes(second):
        problems.append(f"tables differ: {table_shapes(first)} and {table_shapes(second)}")
    for language in ["sh", "yaml", "json", "nginx", "text"]:
        counts = [len(code_blocks(text, language)) for text in texts.values()]
        if counts[0] != counts[1]:
            problems.append(f"code blocks ({language}) differ: {counts}")
    example = keys_of_example(read("config.yaml.example"))
    if len(example) < 40:
        problems.append(f"config.yaml.example: only {len(example)} keys understood")
    for path, text in texts.items():
        keys = keys_of_readme(text)
        for what, wrong in [
            ("missing", set(example) - set(keys)),
            ("unknown", set(keys) - set(example)),
            ("twice", {key for key in keys if keys.count(key) > 1}),
        ]:
            if wrong:
                problems.append(f"{path}: configuration keys {what}: {', '.join(sorted(wrong))}")
        if QUICK_START not in [block.splitlines() for block in code_blocks(text, "sh")]:
            problems.append(f"{path}: no block with exactly the commands {QUICK_START}")
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", "\n".join(outside_code(text))):
            if "://" not in link and not os.path.exists(link):
                problems.append(f"{path}: links to {link}, which is missing")
    return f"{len(headings(first))} headings, {len(example)} configuration keys in both READMEs"


def configurations():
    yield "config.yaml.example", read("config.yaml.example")
    for path in READMES:
        yield path, code_blocks(read(path), "yaml")[0]
    kubernetes = read("contrib/kubernetes.yaml")
    lines = re.search(r"^  config\.yaml: \|\n((?:    .*\n|\n)+)", kubernetes, re.M)[1]
    yield "contrib/kubernetes.yaml", re.sub(r"^    ", "", lines, flags=re.M)


def check_configurations(binary):
    names = []
    for name, text in configurations():
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            environment = {"PATH": os.environ["PATH"], **VARIABLES}
            run = subprocess.run(
                [binary, "--config", file.name, "--check"],
                env=environment, capture_output=True, text=True, timeout=30, check=False,
            )
        if run.returncode != 0:
            problems.append(f"{name}: --check ends with {run.returncode}: {run.stderr.strip()}")
        names.append(name)
    return "--check is content with " + ", ".join(names)


def main():
    os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
    match sys.argv[1:]:
        case []:
            summary = check_documents()
        case ["--configurations", binary]:
            summary = check_configurations(os.path.abspath(binary))
        case _:
            sys.exit(__doc__)
    if problems:
        sys.exit("\n".join(problems))
    print(summary)


main()
