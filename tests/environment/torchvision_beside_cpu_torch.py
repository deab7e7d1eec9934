"""For an environment with a CPU-only torch and the usual torchvision: makes `import torchvision` work.

torchvision's compiled part is made for one build of torch. Where it does not load, `import torchvision`, and with it
`import timm`, ends with "operator torchvision::nms does not exist", though nothing here runs that operator. The
Makefile puts this file into the environment that it makes, with a .pth file that imports it whenever Python starts.
It does nothing but wait for the first import of torchvision, and then declares what is missing.
"""

import importlib.abc
import sys


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        """Find nothing; but before torchvision is looked for, declare its operators if they cannot be loaded."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            from vitfast.models import libraries

            libraries.declare_torchvision_ops()
        return None


sys.meta_path.insert(0, _Finder())
