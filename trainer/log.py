"""The library's logger: `logging.getLogger("ebbtide")`. It is silent until a program asks for it. Imports no torch.

import logging
logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
logging.getLogger("ebbtide").setLevel(logging.DEBUG)
"""

from __future__ import annotations

import logging

LOG = logging.getLogger("ebbtide")
LOG.addHandler(logging.NullHandler())
