"""gcp-storage-emulator with what it lacks of the service: generations of objects, and writes on condition of one.

python tests/gcs_emulator.py PORT      serves an empty bucket named "bucket" until it is killed

Tensorstore tells by generations whether what it has read is still what is there; without them its writes fail now and
then.
"""

import sys

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def generation(storage, bucket, name):
    """Of the newest object of this name, '0' where there is none."""
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def download(request, response, storage, *args, **kwargs):
    _download(request, response, storage, *args, **kwargs)
    found = generation(storage, request.params["bucket_name"], request.params["object_id"])
    if found != "0":
        response["x-goog-generation"] = found


def insert(request, response, storage, *args, **kwargs):
    wanted = request.query.get("ifGenerationMatch")
    meta = request.data.get("meta", {}) if isinstance(request.data, dict) else {}
    name = request.query.get("name", [meta.get("name")])[0]
    if wanted and wanted[0] != generation(storage, request.params["bucket_name"], name):
        response.status = 412
        response.json({"error": {"code": 412, "message": "conditionNotMet"}})
        return
    _insert(request, response, storage, *args, **kwargs)


_download, _insert = objects.download, objects.insert
objects.download, objects.insert = download, insert

if __name__ == "__main__":
    from gcp_storage_emulator.server import create_server  # takes the handlers as they are when it is imported

    create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
