"""What a run imports, for `kill_resume` to import once and fork processes from."""

import callbacks  # noqa: F401
import checkpoints  # noqa: F401
import data  # noqa: F401
import main  # noqa: F401
import model  # noqa: F401
import optimizer  # noqa: F401
import recipes  # noqa: F401
import validate  # noqa: F401
import watch  # noqa: F401
