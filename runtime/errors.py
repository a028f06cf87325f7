"""The errors a user can meet. Each message is one sentence that says what to do next."""


class LawcatError(Exception):
    """A user's mistake or a bad file; the command line prints the message and exits with 2."""

    exit_code = 2


class CheckFailed(LawcatError):  # noqa: N818 (it reads as what happened)
    """A check ran and did not pass; the command line exits with 1."""

    exit_code = 1


class BundleFault(LawcatError):  # noqa: N818
    """A file of the bundle is to blame and not what was asked of it; a server answers 500."""
