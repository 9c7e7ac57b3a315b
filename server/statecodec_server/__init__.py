"""The conversion service: resumable uploads in, durable jobs, verified downloads out.

Everything numerical happens in child processes that call the public API of `statecodec`. `client` needs only httpx,
so that a machine without the service's packages can talk to one.
"""
