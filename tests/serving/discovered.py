"""A server as its discovery file tells it, of processes that there cannot be."""

from __future__ import annotations

from deepdisc_ops.serving.discovery import ServerInfo

INFO = ServerInfo(
    url="http://127.0.0.1:40001",
    token="inference-secret",
    management_url="http://127.0.0.1:40002",
    management_token="management-secret",
    metrics_url="http://127.0.0.1:40003",
    model="deepdisc",
    archive="/a/b.mar",
    model_version="abc",
    bands=("g", "r"),
    pixel_scale=0.2,
    workers=1,
    max_window=1024,
    request_bytes=1000,
    reply_bytes=2000,
    pid=2**22 + 1,  # above the largest process id of Linux
    worker_pids=(2**22 + 2,),
    supervisor_pid=2**22 + 3,
    generation=1,
    started=0.0,
    token_expires="2026-12-21T23:32:45Z",
    certificate=None,
    run_dir="/run",
    package_version="0",
)
