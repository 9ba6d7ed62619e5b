# SPDX-License-Identifier: Apache-2.0
"""What a test of programs says: a line for each thing shown, their number last. The first that fails ends it."""
passed = 0


def ok(what):
    global passed
    passed += 1
    print("ok", what, flush=True)


def done():
    print(f"{passed} passed, 0 failed")
