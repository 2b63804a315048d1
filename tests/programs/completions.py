"""Complete two command lines as bash asks for it; the exit code names what was imported that takes time."""

import os
import sys

from bntool.cli.main import main

code = 0
os.environ.update(_BNTOOL_COMPLETE="complete_bash", COMP_CWORD="4")
for words in ("bntool recalibrate digits.pt --layers lay", "bntool recalibrate digits.pt --preprocess i"):
    os.environ["COMP_WORDS"] = words
    code += main([])
sys.exit(code or ",".join(name for name in ("torch", "numpy", "rich", "jinja2") if name in sys.modules) or 0)
