"""The errors of the commands: each says how the command ends."""


class UserError(Exception):
    """A user's mistake: one line that names the file, key or value and what to do. The command exits with code 2."""


class DiskFull(UserError):
    """A disk has no room left. The command stops at once: its other tasks would fail for the same reason."""


class LeaseLost(UserError):
    """Another command took over the folder that this one writes. The command stops at once."""


class ShareDone(Exception):
    """The share of this element of a job array is done. The command says so and exits with code 0."""


class TasksFailed(Exception):
    """Some tasks failed and all others are done. The command names each failure and exits with code 1."""

    def __init__(self, failures: list[str], tasks: int) -> None:
        super().__init__("\n".join(failures))
        self.failures, self.tasks = failures, tasks
