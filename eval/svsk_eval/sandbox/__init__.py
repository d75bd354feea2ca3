# SPDX-License-Identifier: Apache-2.0
"""Running and judging Python programs that a model wrote.

A program is a candidate and its asserts, as in HumanEval and MBPP.

Each program gets a fresh Python process that gives up its rights before the program is compiled
(:mod:`svsk_eval.sandbox.child`). A program passes if it runs to its end; an exception, an exit by
any means, a signal or a limit is a failure of its own kind. Linux on x86-64 or aarch64 only:
elsewhere nothing is run.

What is refused by the kernel, through a seccomp filter that allows a list of system calls and no
other:

* network: no socket of any family can be made;
* processes: no fork, no exec and no threads either (``threading``, ``asyncio`` and ``subprocess``
  raise);
* files: none can be opened for writing, made, renamed, truncated, linked, deleted, or have its
  mode, owner, times or attributes changed. There is no exception for a temporary folder;
* other processes: no signal (by ``F_SETOWN`` neither), no ptrace, no reading or writing of their
  memory;
* everything not on the list, such as io_uring, bpf, keyctl, mount, unshare, userfaultfd and calls
  of later kernels.

Further limits: wall-clock and processor time, address space, open files, no core dumps, no locked
memory, no Linux capabilities (as root too), no new privileges; the output goes to /dev/null,
standard input is empty, the environment holds none of the caller's variables but
``LD_LIBRARY_PATH``. Where the kernel has Landlock, only Python's own folders, its site-packages and
the system libraries can be read; where it has not, a warning says that a program can read what the
user can (it has no way to send it anywhere but the first characters of an error message in its
verdict).

What this is not: a virtual machine. A hole in the kernel's remaining system calls is a way out. Nor
is it proof against a program that means to deceive the scorer: candidate and asserts share an
interpreter, in which a candidate can redefine equality or search memory for the secret that reports
success. What cannot pass is a program that exits early, dies, or writes to every file descriptor
there is.

A program is run as a module called ``program`` (so ``__name__ == "__main__"`` is false), with hash
seed 0 so that the order of sets does not change between runs, ``.pth`` files unread, and numpy's
libraries held to one thread.
"""

from svsk_eval.sandbox.limits import CONSENT_VARIABLE, CodeLimits, Outcome, Verdict, consent_given
from svsk_eval.sandbox.run import run_programs

__all__ = ["CONSENT_VARIABLE", "CodeLimits", "Outcome", "Verdict", "consent_given", "run_programs"]
