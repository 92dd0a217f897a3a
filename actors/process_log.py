"""What our processes tell, in the files that Ray keeps of them."""

import logging
from typing import Final

LINE: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def keep_log() -> None:
    """Have what this process tells, from INFO on, on its standard error, which Ray keeps as
    `worker-*.err` among the session's logs. Ray itself shows warnings alone there, without times.

    Idempotent; where somebody has given the process handlers, they are left as they are.
    """
    log = logging.getLogger("remora")
    log.setLevel(logging.INFO)
    if log.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(LINE))
    log.addHandler(handler)
