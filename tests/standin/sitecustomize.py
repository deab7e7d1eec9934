"""Every Python that starts with this folder on its path has the stand-in for a GPU, if VITFAST_STANDIN (JSON) sets it.

So whole commands run as they would on a GPU, with all the processes that they start. See helpers/standin.py.
"""

import os

if "VITFAST_STANDIN" in os.environ:
    import json

    from helpers import standin

    standin.start(**json.loads(os.environ["VITFAST_STANDIN"]))
