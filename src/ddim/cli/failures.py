"""The one net around all commands: whatever goes wrong ends in one sentence on stderr and status 1.

With `DDIM_DEBUG=1` in the environment the traceback precedes the sentence. Ctrl-C ends with status 130.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ddim.cli.messages import to_options
from ddim.extras import missing_module
from ddim.validation import MAX_NAME_SHOWN, shorten

INTERRUPTED = 130
OS_ERRORS = {
    errno.ENOENT: "does not exist",
    errno.EACCES: "cannot be opened: you have no permission",
    errno.EPERM: "cannot be changed: you have no permission",
    errno.EEXIST: "exists already",
    errno.EISDIR: "is a folder, not a file",
    errno.ENOTDIR: "cannot be opened: a part of the path is a file, not a folder",
    errno.ENOSPC: "cannot be written: the disk is full",
    errno.EDQUOT: "cannot be written: your quota on that disk is used up",
    errno.EFBIG: "cannot be written: files may not be that large here",
    errno.EROFS: "cannot be written: the disk is read-only",
    errno.ENAMETOOLONG: "cannot be opened: its name is too long",
    errno.EMFILE: "cannot be opened: too many files are open, see ulimit -n",
    errno.EIO: "cannot be read or written: the disk reports an error",
}
"""What is wrong with a file, by the system's error number."""
LONG_WORD = re.compile(rf"\S{{{MAX_NAME_SHOWN + 1},}}")
MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "bad allocation", "bad_alloc")


class Commands(TyperGroup):
    """The commands, with the net around each of them."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was given; a failure ends the process."""
        try:
            result = super().invoke(ctx)
            # A full disk shows here, not where something is printed.
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            print("ddim: interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if hasattr(error, "format_message"):
                # Bad usage, which typer reports with status 2.
                if isinstance(message := getattr(error, "message", None), str):
                    setattr(error, "message", shorten_arguments(message))  # noqa: B010 - typer's own class
                raise
            exit_with(error, ctx.invoked_subcommand or "")


def exit_with(error: BaseException, command: str = "") -> NoReturn:
    """Print one sentence about a failure, and end the process with status 1.

    Args:
        error: what was raised.
        command: the command that raised it.
    """
    if os.environ.get("DDIM_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    sentence = " ".join(describe(error).split())
    sys.exit(f"ddim: {shorten_arguments(to_options(sentence, command))}")


def describe(error: BaseException) -> str:
    """Return what went wrong, in one sentence.

    Args:
        error: an exception of any kind. The messages of those that this package raises are sentences already.

    Returns:
        The sentence, which names arguments as the library does.

    Example:
        >>> describe(ValueError("eta must be a number of at least 0, got -1.0"))
        'eta must be a number of at least 0, got -1.0'
        >>> describe(FileNotFoundError(2, "No such file or directory", "x.yaml"))
        'x.yaml does not exist'
        >>> describe(KeyError("latents"))
        "unexpected error (KeyError: 'latents'); DDIM_DEBUG=1 in the environment shows where"
    """
    text = re.sub(r"\[Errno -?\d+\] ", "", str(error))
    if isinstance(error, ModuleNotFoundError) and error.name and text.startswith("No module named"):
        return missing_module("this", error.name)
    if isinstance(error, OSError) and error.strerror:
        return _describe_os_error(error)
    if isinstance(error, MemoryError) or any(words in text for words in MEMORY_WORDS):
        return f"memory does not suffice{f' ({text})' if text else ''}; fewer images at once require less"
    if text.startswith("Exceeds the limit"):
        return "a number has thousands of digits"
    is_sentence = isinstance(error, ValueError | TypeError | OSError | RuntimeError | ImportError)
    if is_sentence and text and not isinstance(error, UnicodeError | RecursionError | NotImplementedError):
        return text
    kind = type(error).__name__
    return f"unexpected error ({f'{kind}: {text}' if text else kind}); DDIM_DEBUG=1 in the environment shows where"


def shorten_arguments(message: str) -> str:
    """Cut long arguments of the command line where a message repeats them.

    Args:
        message: the message.

    Returns:
        The message with the start of each.
    """
    values = {
        part for argument in sys.argv[1:] for part in (argument, argument.partition("=")[2], repr(argument)[1:-1])
    }
    for value in sorted(values, key=len, reverse=True):
        if len(value) > MAX_NAME_SHOWN:
            message = message.replace(value, shorten(value))
    # Parts of arguments, such as a path without its last separator.
    return LONG_WORD.sub(lambda match: shorten(match[0]), message)


def _describe_os_error(error: OSError) -> str:
    """Return the system's error in words, with the file's name."""
    name = error.filename2 or error.filename
    words = OS_ERRORS.get(error.errno or 0)
    if name is None:
        # A write to an open file does not name it.
        return {errno.ENOSPC: "the disk is full", errno.EDQUOT: "your disk quota is used up"}.get(
            error.errno or 0, f"the system reports: {(error.strerror or '').lower()}"
        )
    shown_name = os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
    return f"{shown_name} {words}" if words else f"{shown_name} cannot be opened: {(error.strerror or '').lower()}"
