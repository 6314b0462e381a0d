"""moto's server in place of an S3 store: it makes buckets, keeps objects in memory, checks no signature."""

import sys
import threading

import boto3
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="0.0.0.0", port=8333)  # noqa: S104 - for the containers of its network
server.start()
for bucket in sys.argv[1:]:
    boto3.client("s3", endpoint_url="http://127.0.0.1:8333").create_bucket(Bucket=bucket)
threading.Event().wait()
