"""Runs code in processes that are as good as new, but have imported torch."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# Each line of the input is a job. Nothing of OpenMMLab is imported here, nor
# this package, but what they import, which takes far longer than they do.
_SERVER = """
import gc
# What is imported is there to stay: there is no garbage to look for.
gc.disable()
import json
import os
import sys
import tempfile
import traceback

import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.optim
for name in ('cv2', 'matplotlib.backends.backend_agg', 'matplotlib.figure',
             'rich.console', 'rich.logging', 'rich.progress', 'rich.table',
             'yaml'):
    try:
        __import__(name)
    except ImportError:
        pass

# Collections of garbage would copy all of that in every fork.
gc.collect()
gc.freeze()

def run(code):
    status = 1
    try:
        exec(code, dict(__name__='__main__'))
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    return status

for line in sys.stdin:
    job = json.loads(line)
    files = tempfile.TemporaryFile('w+'), tempfile.TemporaryFile('w+')
    child = os.fork()
    if child == 0:
        for file, stream in zip(files, (sys.stdout, sys.stderr)):
            os.dup2(file.fileno(), stream.fileno())
        os.chdir(job['cwd'])
        sys.path[:0] = job['path']
        status = run(job['code'])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read())
    print(json.dumps([status, *texts]), flush=True)
"""


@contextlib.contextmanager
def start_forks():
    """Start the process that is forked.

    Yields:
        callable: Takes code, where it works, and further places to import
        from. Returns ``returncode``, ``stdout`` and ``stderr``, as
        :func:`subprocess.run` does.
    """
    with subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def run(code, cwd, *path):
            path = [str(folder) for folder in (cwd, *path)]
            job = dict(code=code, cwd=str(cwd), path=path)
            print(json.dumps(job), file=server.stdin, flush=True)
            status, stdout, stderr = json.loads(server.stdout.readline())
            return SimpleNamespace(
                returncode=status, stdout=stdout, stderr=stderr
            )

        yield run
        server.stdin.close()


def make_run_logged(run):
    """Stand-in for ``shared.processes.run_logged`` of the benchmarks' tools.

    Args:
        run (callable): See :func:`start_forks`.

    Returns:
        callable: Runs a script of Python's in a fork, without its start-up of
        seconds; one that has to succeed.
    """

    async def run_logged(command, environment, log_path, timeout=None):
        _, script, *arguments = map(str, command)
        code = f"""
import os
import runpy
import sys
os.environ.update({dict(environment)!r})
sys.argv = {[script, *arguments]!r}
runpy.run_path(sys.argv[0], run_name='__main__')
"""
        paths = environment.get('PYTHONPATH', '').split(os.pathsep)
        done = run(code, Path.cwd(), Path(script).parent, *paths)
        Path(log_path).write_text(done.stdout + done.stderr)
        assert done.returncode == 0, done.stderr
        return dict(result='ok', message=None)

    return run_logged
