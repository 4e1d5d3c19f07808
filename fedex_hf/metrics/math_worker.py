"""The process that runs math-verify: a JSON line with `gold` and `prediction` in, `true` or `false` out.

Its first line says that it is ready.

math-verify limits its time by a signal, which only the main thread of a process may set; here it is the main thread
whoever asks. Run as a script, so that it imports nothing but math-verify.
"""

import json
import sys


sys.path.pop(0)  # this folder, whose modules are not to be taken for others' of the same name


def main() -> None:
    """Answer until the input ends."""
    from math_verify import parse, verify
    from sympy import nan, zoo

    def read(text: str) -> list:
        # What has no value, such as the time 6:00 read as a ratio, would equal everything else that has none.
        return [answer for answer in parse(text) if isinstance(answer, str) or answer not in (nan, zoo)]

    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a parser prints must not look like an answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        pair = json.loads(line)
        try:
            equal = bool(verify(read(pair["gold"]), read(pair["prediction"])))
        except Exception:  # of any of the libraries, on text that a model made up
            equal = False
        print(json.dumps(equal), file=answers, flush=True)


if __name__ == "__main__":
    main()
