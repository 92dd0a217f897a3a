"""The page docs/commands.md, from the code: every command, its flags, exit statuses, environment.

    .venv/bin/python -P -m remora.cluster.command_page > docs/commands.md

What a flag does is its help text; `tests/unit/test_command_page.py` holds the page against it.
"""

from argparse import SUPPRESS, Action, ArgumentParser, _SubParsersAction
from collections.abc import Iterator, Sequence

from remora.cluster.cli import FLAGS, parser

KEYS = {(flag, key) for flag, key, _, _ in FLAGS}

ENVIRONMENT = {
    "REMORA_ADMIN_KEYS": "keys of `/v1/ep/*`, comma separated, beside those of"
    " `http.admin_keys_file`",
    "REMORA_API_KEYS": "API keys, comma separated, beside those of `http.api_keys_file`",
    "REMORA_CACHE_DIR": "compiled layers between starts, by default `~/.cache/remora`",
    "REMORA_ISA": "instruction set of the kernels at most: `portable`, `avx2`, `avx512`,"
    " `avx512_bf16` or `amx_bf16`; `amx_emulated` emulates the tiles, slowly",
    "REMORA_NO_KERNELS": "`1`: torch in the place of our C++, as without a compiler",
    "REMORA_RUNTIME_DIR": "where `remora serve` writes down what runs, for the other commands; by"
    " default the folder for temporary files",
    "RAY_ADDRESS": "Ray cluster of a deployment that is named, where no `remora serve` of this"
    " machine runs it; as `--ray-address`",
}

_HEAD = """\
# Commands, flags, environment

Made from the code by `.venv/bin/python -P -m remora.cluster.command_page`, which a test holds it
against.

| exit status | |
|---|---|
| 0 | done |
| 1 | the cluster or an operation failed; a replayed decision or a simulated history differs |
| 2 | what was asked for cannot be: configuration, model, file, command line |
| 3 | there is no such deployment |
| 130 | ended by Ctrl-C; `serve` itself ends with 0 |
| 141 | nobody reads the output any more |

Every command takes `--json`: the answer is then JSON on standard output, and so is an error
(`{"error": {"type": ..., "message": ...}}`), but for one of the command line itself. `remora serve
--json` prints a line when it is ready. A deployment has to be named where several run, and with
`--ray-address`."""
_CONFIGURED = """\
## Flags of the configuration

`remora serve`, `plan` and `bench` take a MODEL (a checkpoint directory or a hub id) and these. All
other keys: `--set KEY=VALUE` ([configuration.md](configuration.md))."""
_ENVIRONMENT = """\
## Environment variables

They count where a process reads them: what kernels and ingresses look at must be in the environment
of Ray's processes, which `remora serve` without `--ray-address` gives them."""


def main() -> None:
    """Prints the page."""
    print(page(), end="")


def page() -> str:
    """All of it, ending in a newline."""
    top = parser()
    (commands,) = (action for action in top._actions if isinstance(action, _SubParsersAction))
    configured = [a for a in commands.choices["plan"]._actions if named(a)]
    parts = [_HEAD, _CONFIGURED, "\n".join(_table(configured))]
    said = {flag for action in configured for flag in named(action)}
    for words, help_text, command in leaves(top, ()):
        without = said if words[0] in ("serve", "plan", "bench") else {"--json"}
        needed = " ".join(["remora", *words, *operands(command)])
        parts.append(f"## `{needed}`\n\n{help_text[:1].upper()}{help_text[1:]}.")
        own = [action for action in command._actions if not without.issuperset(named(action))]
        parts += ["\n".join(_table(own))] if own else []
    rows = [f"| `{name}` | {ENVIRONMENT[name]} |" for name in sorted(ENVIRONMENT)]
    parts += [_ENVIRONMENT, "\n".join(["| variable | meaning |", "|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def leaves(
    top: ArgumentParser, words: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str, ArgumentParser]]:
    """Words, help text and parser of every command that does something."""
    for action in top._actions:
        if isinstance(action, _SubParsersAction):
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for word, below in action.choices.items():
                if any(isinstance(inner, _SubParsersAction) for inner in below._actions):
                    yield from leaves(below, (*words, word))
                else:
                    yield (*words, word), texts[word], below


def named(action: Action) -> Sequence[str]:
    """Its flags; none for an operand, or for --help."""
    return [] if action.default is SUPPRESS else action.option_strings


def operands(command: ArgumentParser) -> list[str]:
    """What stands behind the words of a command, as a usage line has it."""
    found = []
    for action in command._actions:
        if not action.option_strings:
            name = str(action.metavar or action.dest).upper()
            found.append({"?": f"[{name}]", "+": f"{name} ..."}.get(str(action.nargs), name))
    return found


def _table(actions: Sequence[Action]) -> list[str]:
    lines = ["| flag | meaning |", "|---|---|"]
    for action in actions:
        is_key = any((flag, action.dest) in KEYS for flag in named(action))
        key = f"`{action.dest}`: " if is_key else ""
        needed = "required; " if action.required else ""
        shown = ", ".join(f"`{flag}{_value(action)}`" for flag in named(action))
        lines.append(f"| {shown} | {key}{needed}{action.help} |")
    return lines


def _value(action: Action) -> str:
    """What follows a flag."""
    if action.nargs == 0:
        return ""
    name = str(action.metavar or action.dest.rpartition(".")[2].upper())
    return f" {name} ..." if action.nargs == "+" else f" {name}"


if __name__ == "__main__":
    main()
