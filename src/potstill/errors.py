"""The one error that is the user's to fix, and words for the system's."""


class InputError(Exception):
    """Bad input, said in one clear line: what was wrong and what would be right.

    The command line prints it as `potstill: <line>` on stderr and exits with code 2, without a traceback.
    """


class DivergedError(Exception):
    """Something is no longer a finite number. Says where and why; what was saved before stands."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, where no loop waits for it to save first: unwinds what is open, as Ctrl-C does."""


def reason(error: OSError) -> str:
    """'no space left on device': why the system refused, without error number or path."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]
