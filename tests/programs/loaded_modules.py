"""Print, in one last line, the modules that are loaded after ``import MODULE...`` or after a command of bntool."""

import sys

before = set(sys.modules)
if sys.argv[1] == "import":
    for name in sys.argv[2:]:
        __import__(name)
    code = 0
else:
    from bntool.cli.main import main

    try:
        code = main(sys.argv[1:])
    except SystemExit as end:  # --help
        code = end.code
sys.stdout.flush()
print("", *sorted(set(sys.modules) - before))
sys.exit(code)
