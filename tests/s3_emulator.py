"""moto's server of S3, as a process of its own.

python tests/s3_emulator.py PORT      serves an empty bucket named "bucket" until it is killed
"""

import sys
import threading

from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

if __name__ == "__main__":
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket("bucket", "us-east-1")
    ThreadedMotoServer("localhost", int(sys.argv[1]), verbose=False).start()
    threading.Event().wait()
