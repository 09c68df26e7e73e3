"""Whether a text is one command, which `exec` can put in the shell's place: ends with 1 and says why if it isn't.

Of `a && b`, `exec` would run a and never come back for b, and the job would call that a success.
"""

import re
import shlex
import sys

BETWEEN_COMMANDS = {"&&", "||", "|", "|&", "&"}


def trouble(command: str) -> str | None:
    """What is wrong with `command`; None if nothing is. An operator that is quoted by itself counts as one."""
    words = shlex.shlex(command, posix=True, punctuation_chars=True)
    words.whitespace_split, words.commenters = True, ""
    try:
        found = list(words)
    except ValueError as error:
        return str(error)
    if not found:
        return "there is none"
    if re.match(r"[A-Za-z_]\w*\+?=", found[0]):
        return f"{found[0].partition('=')[0]} is assigned before it, which belongs into env"
    signs = [word.strip("()") for word in found if set(word) <= set("();<>|&")]
    return next((f"there is a {sign} in it" for sign in signs if sign in BETWEEN_COMMANDS or ";" in sign), None)


if __name__ == "__main__":
    said = trouble(sys.argv[1])
    if said:
        sys.exit(said)
