"""Print, in one last line, the modules that are loaded after ``import MODULE...`` or after commands of bntool.

One command is parted from the next by ``;``, and each must end with 0 but the last.
"""

import sys

before = set(sys.modules)
if sys.argv[1] == "import":
    for name in sys.argv[2:]:
        __import__(name)
    code = 0
else:
    from bntool.cli.main import main

    words, code = sys.argv[1:], 0
    while words and code == 0:
        end = words.index(";") if ";" in words else len(words)
        try:
            code = main(words[:end])
        except SystemExit as ended:  # --help
            code = ended.code
        words = words[end + 1 :]
    assert not words, f"{code}, before {words}"
sys.stdout.flush()
print("", *sorted(set(sys.modules) - before))
sys.exit(code)
