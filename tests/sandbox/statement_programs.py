"""Programs for ``test_statements``: what Python's syntax and a model's habits offer.

Those of ``programs/*.txt`` follow a line ``=== name`` each; here are those whose white space or
line ends an editor would change.
"""

from __future__ import annotations

import sys
from pathlib import Path


def _read(name: str) -> dict[str, str]:
    text = Path(__file__).parent.joinpath("programs", f"{name}.txt").read_text(encoding="utf-8")
    programs = [part.split("\n", 1) for part in ("\n" + text).split("\n=== ")[1:]]
    return {title: program.removesuffix("\n") + "\n" for title, program in programs}


# Each ends normally, raises or exits.
VALID = _read("valid") | {
    "empty": "",
    "newlines": "\n\n\n",
    "only a comment": "# nothing",
    "no newline at the end": "print(1)",
    "spaces at the end": "print(1)\n   ",
    "future without newline": "from __future__ import (\n    annotations,\n)",
    "triple quotes at column 0": "s = '''\nif x:\ndef f(\n# \\'\\'\\' \n'''\nprint(s)\n",
    "form feeds": "x = 1\n\f\nif x:\n    print(1)\n\fprint(2)\n\f  \nprint('\f')\n",
    "odd line separators": "s = 'a\u2028b\x1cc\x85d'\nprint(ascii(s))\nprint(1)\nnone\n",
    "tabs": "if 1:\n\tprint(1)\n\tif 1:\n\t\tprint(2)\nprint(3)\n",
    "carriage returns": "if 1:\r\n    print('''a\r\nb''')\r\nelse:\r\n    x\r\nprint(2)\r\nx.y",
    "lone carriage returns": "x = 1\rif x:\r    print(x)\rprint(2)\rx.y",
    "raises at the end": "print(1)\nundefined_name",
}
if sys.version_info >= (3, 12):
    VALID |= _read("valid_from_312")

# None of these compiles.
INVALID = _read("invalid") | {
    "incomplete": "print(1)\nx =",
    "tabs and spaces": "if 1:\n        print(1)\n\tprint(2)\n",
    "non-printable": "print(1)\nx = 1\u00a0+ 2\n",
    "backslash at the end": "print(1)\nx = 1 \\",
    "space after a backslash": "print(1)\nx = 1 + \\ \n2\n",
}

# Refused in other words when read from a file.
INVALID_AS_TEXT = {
    "bytes with non-ASCII": "print(1)\nx = b'ä'\n",
    "no body at the end": "print(1)\ndef f():\n",
    "byte order mark": "\ufeffprint(1)\n",
    "byte order mark later": "print(1)\n\ufeffprint(2)\n",
    "deep nesting": f"import sys\nsys.setrecursionlimit(10**6)\nx = {'(' * 300}1{')' * 300}\n",
    "NUL": "print(1)\nx = '\0'\nprint(2)\n",
    "surrogate": "print(1)\nx = '\ud800'\nprint(2)\n",
    "surrogate in a comment": "print(1)\n# \ud800\nprint(2)\n",
}

# Each would show that its statements run one by one, or what has not arrived yet.
REVEALING = {
    "trace": "import sys\nsys.settrace(lambda *a: print(a[1]))\nx = 1\ny = 2\n",
    "profile": "import sys\nsys.setprofile(lambda *a: None)\nx = 1\ny = 2\n",
    "builtins": "x = 1\n__builtins__ = {'print': print}\nprint(x)\nlen\n",
    "no namespace": "x = 1\nglobals().clear()\nprint(2)\n",
    "frame": "x = 1\nimport sys\nprint(sys._getframe().f_code.co_names)\ny = 1\n",
    "own source": "y = 1\nimport inspect\nclass A:\n    pass\nprint(inspect.getsource(A))\n",
    "stack": "x = 1\nimport traceback\ntraceback.print_stack()\n",
    "warning elsewhere": "x = 1\nimport warnings\nwarnings.warn('x', stacklevel=2)\n",
    "counts of references": "import sys\nx = 1000\nprint(sys.getrefcount(x))\n",
    "fork": "import os\npid = os.fork()\nif pid:\n    os.wait()\nprint('both')\nx = 1\n",
    "warns late": "print(1)\nx = 1\nprint(x is 1)\n",
    "warns, then fails": "print(1)\nassert (1, 'x')\nreturn 5\n",
}

# A block whose statements have distinct effects on a list, one text per statement.
TYPICAL = [
    "import math\nran.append(0)\n",
    "def solve(n):\n    t = 0\n\n    for i in range(n):\n        t += i\n    return ran.append\n\n",
    "ran.append(2)  # simple\n",
    "if ran:\n    ran.append(3)\nelif math:\n    pass\nelse:\n    pass\n\n",
    "ran.append(\n    4,\n)\n",
    'text = """\na\n"""\nran.append(5)\n',
    "for i in range(1):\n    ran.append(6)\n",
    "try:\n    ran.append(7)\nfinally:\n    pass\n",
    "print(solve(4), len(ran))\n",
]
